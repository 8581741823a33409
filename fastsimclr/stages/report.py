"""What a chain gave, as a table for people."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from fastsimclr.runlog import aligned

Results = dict[str, dict[str, Any]]

# (row, stage, metric, whether the row is about the stage's own trained network)
_ROWS = (
    ("kNN on raw pixels", "knn", "raw_pixels_top1", False),
    ("kNN on the untrained network", "knn", "untrained_top1", False),
    ("kNN on the pretrained network", "knn", "top1", True),
    ("linear on the pretrained network", "linear", "top1", True),
    ("supervised from scratch", "supervised", "top1", True),
    ("fine-tuned", "finetune", "top1", True),
    ("distilled student", "distill", "top1", True),
)
_GAINS = (("fine-tuned - supervised", "finetune", "supervised"), ("student - teacher", "distill", "finetune"))


def summary(runs: Sequence[Results]) -> str:
    """One line a stage; over several runs mean ± standard deviation, and of the differences the standard error too."""
    first = runs[0]
    rows = [("", "top-1", "labels", "parameters", "seconds")]
    for name, stage, metric, own in _ROWS:
        if metric in first[stage]["metrics"]:
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
    gains = [(name, [run[a]["metrics"]["top1"] - run[b]["metrics"]["top1"] for run in runs]) for name, a, b in _GAINS]
    training = first["pretrain"]["training"]
    seconds = statistics.mean(run["pretrain"]["seconds"] for run in runs)
    data, device = first["pretrain"]["data"], first["pretrain"]["environment"]["device"]
    return "\n".join(
        [
            f"{data['source']}: {data['images']:,} images for training, {data['val']:,} for validation",
            f"pretraining: {training['steps']:,} steps in {seconds:.0f} s on {device}",
            "",
            *aligned(rows),
            "",
            *(f"{name}: {spread(values, signed=True)}{_standard_error(values)}" for name, values in gains),
        ]
    )


def spread(values: Sequence[float], signed: bool = False) -> str:
    """The mean, with ± the sample standard deviation where there are several."""
    mean = statistics.mean(values)
    text = f"{mean:+.3f}" if signed else f"{mean:.3f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.3f}"


def _standard_error(values: Sequence[float]) -> str:
    if len(values) == 1:
        return ""
    return f" (standard error {statistics.stdev(values) / math.sqrt(len(values)):.3f}, n {len(values)})"
