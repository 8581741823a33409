"""What happened along a training, epoch by epoch, from its metrics.jsonl."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from fastsimclr.runs.log import read_records
from fastsimclr.runs.text import write_text
from fastsimclr.studies.cells import Row

COLUMNS = ("epoch", "seconds", "loss", "train_top1", "val_top1")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The training of one row. columns: COLUMNS -> values, nan where that record has none; seconds are those of the
    steps, loss and train_top1 means of the steps since the record before."""

    row: Row
    columns: dict[str, list[float]]

    def passes(self, top1: float) -> tuple[float, float] | None:
        """(epoch, seconds) of the first validation above `top1`; None: of none."""
        for epoch, seconds, value in zip(*(self.columns[key] for key in ("epoch", "seconds", "val_top1")), strict=True):
            if value > top1:
                return epoch, seconds
        return None


def read_curves(rows: Sequence[Row], out: Path) -> list[Curve]:
    """The curves of those rows that came of a training."""
    found = []
    for row in rows:
        records = read_records(out / row.run / "metrics.jsonl")
        trained = [record for record in records if record["kind"] == "train"]
        if not trained:
            continue
        recipe = yaml.safe_load((out / row.run / "recipe.yaml").read_text())
        epochs, steps = recipe[row.run.rpartition("/")[2]]["epochs"], trained[-1]["step"]
        marks = [0, *(record["step"] for record in trained)], [0.0, *(record["trained_s"] for record in trained)]
        columns: dict[str, list[float]] = {key: [] for key in COLUMNS}
        end = {"kind": "probe", "step": steps, "val_top1": row.top1}
        if records[-1] != end:
            records.append(end)
        for record in records:
            columns["epoch"].append(epochs * record["step"] / steps)
            columns["seconds"].append(float(np.interp(record["step"], *marks)))
            columns["loss"].append(record.get("loss", math.nan))
            columns["train_top1"].append(record.get("top1", math.nan))
            columns["val_top1"].append(record.get("val_top1", math.nan))
        found.append(Curve(row=row, columns=columns))
    return found


def write_curves(curves: Sequence[Curve], path: Path, *, axis: str) -> None:
    """As CSV, a line a record."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([axis, "method", "seed", *COLUMNS])
    for curve in curves:
        row = curve.row
        for values in zip(*curve.columns.values(), strict=True):
            cells = ["" if math.isnan(value) else round(value, 5) for value in values]
            writer.writerow([row.point[axis], row.method, row.seed, *cells])
    write_text(path, text.getvalue())
