"""What a result file says of a classifier's errors: each class, confusions, calibration, subgroups."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsimclr.evaluation.features import Features
from fastsimclr.evaluation.scores import ClassifierReport, Score, by_group, calibration, confusion
from fastsimclr.loaders.sets.subgroups import NO_SUBGROUP
from fastsimclr.runs.text import write_text
from fastsimclr.stages.setting import Setting

_MOST_CLASSES = 100  # of which result.json holds the confusion matrix


def measure(setting: Setting, score: Score, of: Features, logits_NK: Tensor | None = None) -> ClassifierReport:
    """The whole report on the validation images `of` and their `score`. logits_NK: where they are logits."""
    ranks, predicted_N, classes = setting.ranks, score.predicted_N, score.counts_3K.shape[1]
    groups_2G = None
    if setting.subgroups is not None:
        names, index = setting.subgroups
        assert of.ids is not None
        groups_N = index[of.ids].to(of.labels.device)
        groups_2G = by_group(predicted_N == of.labels, groups_N, len(names), ranks)
    return ClassifierReport(
        counts_3K=score.counts_3K,
        predicted_N=predicted_N,
        confusion_P3=confusion(predicted_N, of.labels, classes, ranks),
        calibration=None if logits_NK is None else calibration(logits_NK, predicted_N, of.labels, ranks),
        groups_2G=groups_2G,
    )


def report_entries(setting: Setting, report: ClassifierReport) -> dict[str, Any]:
    """The entries of a result file beside the metrics: per_class, confusion, and where they apply calibration,
    subgroups. confusion holds [true class, predicted class, images] until `put_confusion`."""
    entries: dict[str, Any] = {
        "per_class": report.per_class(setting.splits.val.classes),
        "confusion": report.confusion_P3.tolist(),
    }
    if report.calibration is not None:
        entries["calibration"] = report.calibration.bins
    if report.groups_2G is not None and setting.subgroups is not None:
        rows = [
            {"name": name, "images": images, "correct": correct, "top1": correct / images if images else None}
            for name, images, correct in zip(setting.subgroups[0], *report.groups_2G.tolist(), strict=True)
        ]
        known = [row for row in rows if row["images"] and row["name"] != NO_SUBGROUP]
        worst = min(known, key=lambda row: row["top1"], default=None)  # damaged images may leave none
        entries["subgroups"] = {"column": setting.recipe.data.subgroup, "groups": rows, "worst": worst}
    return entries


def put_confusion(result: dict[str, Any], run: Path | None) -> None:
    """Give the confusions of `result` their form: "confusion": [K, K] counts, a row a true class, up to 100 classes.

    Of more, run/confusion.csv with a line true,predicted,images for each pair that occurs, and its name here.
    run: None for a rank that writes nothing.
    """
    if "confusion" not in result:
        return
    pairs, names = result["confusion"], [entry["name"] for entry in result["per_class"]]
    if len(names) <= _MOST_CLASSES:
        table = [[0] * len(names) for _ in names]
        for true, predicted, images in pairs:
            table[true][predicted] = images
        result["confusion"] = table
        return
    result["confusion"] = "confusion.csv"
    if run is not None:
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(("true", "predicted", "images"))
        lines.writerows((names[true], names[predicted], images) for true, predicted, images in pairs)
        write_text(run / "confusion.csv", text.getvalue())


def as_json(result: dict[str, Any]) -> str:
    """A result file: JSON, indented, lists of whole numbers in one line."""
    text = json.dumps(result, indent=2)
    return re.sub(r"\[\n[\s\d,]+\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text) + "\n"
