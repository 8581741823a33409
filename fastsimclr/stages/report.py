"""What a stage or a chain gave, as lines for people."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from fastsimclr.runs.text import aligned
from fastsimclr.stages.published import published_line

Results = dict[str, dict[str, Any]]

# (row, stage, metric, whether the row is about the stage's own trained network)
_ROWS = (
    ("kNN on raw pixels", "knn", "raw_pixels_top1", False),
    ("kNN on the untrained network", "knn", "untrained_top1", False),
    ("kNN on the pretrained network", "knn", "top1", True),
    ("linear on the pretrained network", "linear", "top1", True),
    ("supervised from scratch", "supervised", "top1", True),
    ("fine-tuned", "finetune", "top1", True),
    ("self-distilled", "self-distill", "top1", True),
    ("distilled student", "distill", "top1", True),
)
_WEAKEST = 3  # classes that are named
_GAINS = (("fine-tuned - supervised", "finetune", "supervised"), ("student - teacher", "distill", "finetune"))
_SELF_FIRST_GAINS = (
    _GAINS[0],
    ("self-distilled - fine-tuned", "self-distill", "finetune"),
    ("student - teacher", "distill", "self-distill"),
    ("student - fine-tuned", "distill", "finetune"),
)


def summary(runs: Sequence[Results]) -> str:
    """One line a stage; over several runs mean ± standard deviation, and of the differences the standard error too."""
    first = runs[0]
    rows = [("", "top-1", "labels", "parameters", "seconds")]
    known: list[str] = []
    for name, stage, metric, own in _ROWS:
        if stage in first and metric in first[stage]["metrics"]:
            labels, parameters = first[stage].get("labels", 0), first[stage]["parameters"]
            seconds = statistics.mean(run[stage]["seconds"] for run in runs)
            rows.append(
                (
                    name,
                    spread([run[stage]["metrics"][metric] for run in runs]),
                    f"{labels:,}",
                    f"{parameters:,}" if own else "",
                    f"{seconds:.0f}" if own else "",
                )
            )
            if own and (line := published_line(first[stage])):
                known.append(f"{name}: {line}")
    gains = [
        (name, [run[a]["metrics"]["top1"] - run[b]["metrics"]["top1"] for run in runs])
        for name, a, b in (_SELF_FIRST_GAINS if "self-distill" in first else _GAINS)
    ]
    training = first["pretrain"]["training"]
    seconds = statistics.mean(run["pretrain"]["seconds"] for run in runs)
    data, where = first["pretrain"]["data"], first["pretrain"]["environment"]
    ranks = f", {where['ranks']} ranks" if where.get("ranks", 1) > 1 else ""
    return "\n".join(
        [
            f"{data['source']}: {data['images']:,} images for training, {data['val']:,} for validation",
            f"pretraining: {training['steps']:,} steps in {seconds:.0f} s on {where['device']}{ranks}",
            "",
            *aligned(rows),
            "",
            *known,
            *(f"{name}: {spread(values, signed=True)}{_standard_error(values)}" for name, values in gains),
        ]
    )


def evaluation_lines(evaluation: dict[str, Any]) -> list[str]:
    """The table of `fastsimclr evaluate`, a row a protocol; - where something was not measured or is not comparable."""
    rows = [("protocol", "labels", "top-1", "top-5", "ECE", "published", "seconds")]
    known = []
    for row in evaluation["protocols"]:
        published, labels = row["published"], row["labels"]
        shown = [row["top1"], row["top5"], row["ece"], published and published["top1"]]
        cells = ("-" if value is None else f"{value:.4f}" for value in shown)
        rows.append((row["protocol"], "-" if labels is None else f"{labels:,}", *cells, f"{row['seconds']:.0f}"))
        if published:
            known.append(f"{row['protocol']}: {published_line({'published': [published]})}")
        if (worst := row.get("worst_subgroup")) and "report" not in evaluation:
            known.append(f"{row['protocol']}: worst subgroup {_share(worst)}")
    network = evaluation["network"]
    if "report" in evaluation:
        known += ["", *result_lines(evaluation["report"])]
    return [f"{network['stage']} run {network['run']}, evaluated on the validation images", "", *aligned(rows), *known]


def result_lines(result: dict[str, Any]) -> list[str]:
    """The result of one stage: its metrics, the published top-1 beside ours, what was tried, the weakest classes."""
    lines = [f"{key}: {value:.4f}" for key, value in result["metrics"].items()]
    if line := published_line(result):
        lines = [f"{text} ({line})" if text.startswith("top1: ") else text for text in lines]
    rows = result.get("table", [])
    if sweep := result.get("sweep"):
        chosen = ", ".join(f"{key} {value:g}" for key, value in sweep["chosen"].items())
        lines.append(f"chosen on {sweep['held_out']:,} held-out training images: {chosen}")
        rows = sweep["tried"]
    if rows:
        lines += aligned([tuple(rows[0]), *(tuple(_short(key, value) for key, value in row.items()) for row in rows)])
    if groups := result.get("subgroups"):
        lines.append(f"top-1 by {groups['column']}:")
        lines += aligned([("  " + row["name"], *_accuracy(row)) for row in groups["groups"]])
        if groups["worst"]:
            lines.append(f"worst subgroup: {_share(groups['worst'])}")
    seen = [entry for entry in result.get("per_class", []) if entry["images"]]
    weakest = sorted(seen, key=lambda entry: float(entry["correct"] / entry["images"]))[:_WEAKEST]
    if len(seen) > _WEAKEST:
        lines.append(f"weakest classes: {', '.join(_share(entry) for entry in weakest)}")
    return lines


def _short(key: str, value: float) -> str:
    return f"{value:.4f}" if "top" in key else f"{value:g}"


def _accuracy(row: dict[str, Any]) -> tuple[str, str]:
    shown = "-" if row["top1"] is None else f"{row['top1']:.4f}"
    return shown, f"{row['correct']} of {row['images']}"


def _share(entry: dict[str, Any]) -> str:
    return f"{entry['name']} {entry['correct']} of {entry['images']}"


def spread(values: Sequence[float], signed: bool = False) -> str:
    """The mean, with ± the sample standard deviation where there are several."""
    mean = statistics.mean(values)
    text = f"{mean:+.3f}" if signed else f"{mean:.3f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.3f}"


def _standard_error(values: Sequence[float]) -> str:
    if len(values) == 1:
        return ""
    return f" (standard error {statistics.stdev(values) / math.sqrt(len(values)):.3f}, n {len(values)})"
