"""The rows of a study as CSV, and their means with spread as Markdown."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastsimclr.studies.cells import Cell, Row, Value
from fastsimclr.studies.jobs import Outcomes


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Over the seeds: mean, sample standard deviation (0 for one), and how many."""

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of one value or more."""
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(mean=statistics.mean(values), deviation=deviation, n=len(values))

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.deviation:.3f}" if self.n > 1 else "")


def rows_of(cells: Iterable[Cell], outcomes: Outcomes) -> list[Row]:
    """The rows of those cells whose job has finished."""
    rows = []
    for cell in cells:
        result = outcomes.results.get(cell.job.name)
        if result is None:
            continue
        whole = sum(outcomes.results[job.name]["seconds"] for job in cell.job.chain if job.name in outcomes.results)
        rows.append(
            Row(
                point=cell.point,
                method=cell.method,
                seed=cell.seed,
                run=cell.job.name,
                top1=result["metrics"]["top1"],
                top5=result["metrics"].get("top5"),
                labels=result.get("labels", 0),
                parameters=result["parameters"],
                seconds=result["seconds"],
                whole_seconds=round(whole, 2),
            )
        )
    return rows


def as_csv(rows: Sequence[Row], study: str) -> str:
    """A line a cell: the study, the axes, method, seed and what was measured."""
    axes = axes_of(rows)
    plain = ("method", "seed", "top1", "top5", "labels", "parameters", "seconds", "whole_seconds", "run")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["study", *axes, *plain])
    for row in rows:
        writer.writerow(
            [study, *(row.point.get(axis, "") for axis in axes), *(_cell(getattr(row, key)) for key in plain)]
        )
    return text.getvalue()


def _cell(value: Any) -> Any:
    return "" if value is None else round(value, 6) if isinstance(value, float) else value


def axes_of(rows: Iterable[Row]) -> list[str]:
    """The names of the axes, in order of appearance."""
    return list(dict.fromkeys(axis for row in rows for axis in row.point))


def means(rows: Iterable[Row], of: str = "top1") -> dict[tuple[tuple[Value, ...], str], Mean]:
    """(the values of the axes, the method) -> the mean over the seeds of a row's field."""
    rows = list(rows)
    axes = axes_of(rows)
    groups: dict[tuple[tuple[Value, ...], str], list[float]] = {}
    for row in rows:
        groups.setdefault((tuple(row.point.get(axis, "") for axis in axes), row.method), []).append(getattr(row, of))
    return {key: Mean.of(values) for key, values in groups.items()}


def as_markdown(rows: Sequence[Row]) -> str:
    """Two tables, a line a point and a column a method: top-1, and the seconds of the stage's steps."""
    tables = []
    for title, of in (("top-1", "top1"), ("seconds of training", "seconds")):
        found = means(rows, of)
        points = list(dict.fromkeys(point for point, _ in found))
        methods = list(dict.fromkeys(method for _, method in found))
        head = [*axes_of(rows), *(f"{method}" for method in methods)]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for point in points:
            cells = [found.get((point, method)) for method in methods]
            texts = ["-" if cell is None else _text(cell, of) for cell in cells]
            lines.append("| " + " | ".join([*(_named(value) for value in point), *texts]) + " |")
        tables.append("\n".join([f"{title}, mean ± standard deviation over the seeds:", "", *lines]))
    return "\n\n".join(tables)


def _text(cell: Mean, of: str) -> str:
    if of == "top1":
        return str(cell)
    return f"{cell.mean:,.0f}" + (f" ± {cell.deviation:,.0f}" if cell.n > 1 else "")


def _named(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def crossing(xs: Sequence[float], baseline: Sequence[float], challenger: Sequence[float]) -> float | None:
    """Where `challenger` begins to be above `baseline` for good, linear between the points in log x; None: nowhere.

    xs: rising, above 0. At the first point already: that point.
    """
    ahead = [b - a for a, b in zip(baseline, challenger, strict=True)]
    if ahead[-1] <= 0:
        return None
    behind = [k for k, value in enumerate(ahead) if value <= 0]
    if not behind:
        return xs[0]
    k = behind[-1]
    share = ahead[k] / (ahead[k] - ahead[k + 1])
    return math.exp(math.log(xs[k]) + share * (math.log(xs[k + 1]) - math.log(xs[k])))
