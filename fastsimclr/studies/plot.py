"""Pictures of studies: lines with error bars, a grid, curves over epochs. They need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsimclr.studies.cells import Row
from fastsimclr.studies.table import axes_of, means


def lines(rows: Sequence[Row], path: Path, *, x: str, unit: str, logarithmic: bool, title: str) -> None:
    """Top-1 over axis `x`, a line for each method and value of the other axes; bars are standard deviations."""
    found, axes = means(rows), axes_of(rows)
    place = axes.index(x)
    values = list(dict.fromkeys(point[place] for point, _ in found))
    plain = all(isinstance(value, float | int) and not isinstance(value, bool) for value in values)
    values = sorted(values) if plain else values
    where = {value: value if plain else k for k, value in enumerate(values)}
    figure, axis = _figure(7, 4.5)
    series: dict[str, list[tuple[Any, float, float]]] = {}
    for (point, method), mean in found.items():
        others = [f"{a} {v}" for k, (a, v) in enumerate(zip(axes, point, strict=True)) if k != place]
        name = ", ".join([*others, method])
        series.setdefault(name, []).append((where[point[place]], mean.mean, mean.deviation))
    for name, entries in series.items():
        entries.sort()
        xs, ys, bars = zip(*entries, strict=True)
        axis.errorbar(xs, ys, yerr=bars, label=name, marker="o", markersize=4, capsize=3)
    if logarithmic and plain:
        axis.set_xscale("log")
    if not plain:
        axis.set_xticks(range(len(values)), [str(value) for value in values])
    axis.set_xlabel(unit or x)
    axis.set_ylabel("top-1 on validation images")
    seeds = len({row.seed for row in rows})
    axis.set_title(title + (f", mean and standard deviation of {seeds} seeds" if seeds > 1 else ""), fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def grid(
    names: Sequence[str], values: dict[tuple[str, str], float], path: Path, *, title: str, axes: tuple[str, str]
) -> None:
    """A square of accuracies: values[row, column], of those that are there."""
    figure, axis = _figure(1.5 + 0.8 * len(names), 1.2 + 0.7 * len(names))
    shown = [[values.get((row, column), float("nan")) for column in names] for row in names]
    picture = axis.imshow(shown, cmap="viridis")
    middle = (min(values.values()) + max(values.values())) / 2
    for (row, column), value in values.items():
        place = names.index(column), names.index(row)
        axis.text(*place, f"{100 * value:.1f}", ha="center", va="center", color="white" if value < middle else "black")
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylabel(axes[0])
    axis.set_xlabel(axes[1])
    axis.set_title(title, fontsize=10)
    figure.colorbar(picture, ax=axis, shrink=0.8, label="top-1")
    figure.savefig(path, dpi=150)


def panels(
    curves: dict[str, dict[str, list[dict[str, list[float]]]]], path: Path, *, measures: Sequence[tuple[str, str]]
) -> None:
    """A column of panels for each point, a row for each measure (key, label), a colour a method, a line a seed.

    curves[point][method]: of each seed, "epoch" and the measures, lists of equal length; an absent one is not drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 3 * len(measures)), layout="constrained")
    axes = figure.subplots(len(measures), len(curves), squeeze=False)
    methods = list(dict.fromkeys(method for found in curves.values() for method in found))
    for column, (point, found) in enumerate(curves.items()):
        for row, (key, label) in enumerate(measures):
            axis = axes[row][column]
            for method, repeats in found.items():
                for k, repeat in enumerate(repeats):
                    pairs = [(x, y) for x, y in zip(repeat["epoch"], repeat[key], strict=True) if y == y]
                    if not pairs:
                        continue
                    xs, ys = zip(*pairs, strict=True)
                    colour = f"C{methods.index(method)}"
                    axis.plot(xs, ys, color=colour, linewidth=1, label=method if k == 0 else None)
            axis.grid(alpha=0.3)
            axis.set_ylabel(label)
            if row == 0:
                axis.set_title(point, fontsize=10)
            if row == len(measures) - 1:
                axis.set_xlabel("epoch")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
