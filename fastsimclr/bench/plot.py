"""A report of batches as a picture: images/s with their ranges, and how long the steps take."""

from __future__ import annotations

from pathlib import Path

from fastsimclr.bench.record import Report


def plot(result: Report, path: Path) -> None:
    """Bars of the median images/s of each variant with the range of its rounds; the distribution of its step times.

    path: .png, .pdf or .svg. ValueError for another ending; needs matplotlib.
    """
    from matplotlib.figure import Figure  # an extra; StageBench says so where it is missing

    rows = result["rows"]
    figure = Figure(figsize=(13, 2 + 0.4 * len(rows)), layout="constrained")
    bars, steps = figure.subplots(1, 2)
    names = [row["name"] for row in rows]
    rates = [row["images_per_s"] for row in rows]
    reach = [[rate["median"] - rate["min"] for rate in rates], [rate["max"] - rate["median"] for rate in rates]]
    colours = [f"C{index % 10}" for index in range(len(rows))]
    bars.barh(names, [rate["median"] for rate in rates], xerr=reach, color=colours, capsize=3)
    bars.invert_yaxis()
    bars.set_xlabel("images/s, median and range of the rounds")
    for row, colour in zip(rows, colours, strict=True):
        times = sorted(1e3 * second for turn in row["rounds"] for second in turn["step_s"])
        share = [100 * index / len(times) for index in range(len(times) + 1)]
        steps.step([times[0], *times], share, where="post", label=row["name"], color=colour)
    steps.set_xlabel("ms a step")
    steps.set_ylabel("% of the steps took no longer")
    steps.set_ylim(0, 100)
    steps.legend(fontsize="small")
    facts = result["environment"]
    figure.suptitle(f"bench {result['bench']} on {facts['device']}, torch {facts['torch']}, commit {facts['commit']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
