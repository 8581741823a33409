"""Confusions, calibration and subgroups against plain loops in numpy."""

# N images, K classes

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from fastsimclr.distributed.ranks import Ranks
from fastsimclr.evaluation.scores import ClassifierReport, by_group, calibration, confusion, score
from fastsimclr.stages.measured import as_json, put_confusion, report_entries

ALONE = Ranks()
Floats = npt.NDArray[np.float64]


def drawn(n: int, classes: int, scale: float) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(n + classes)
    logits = torch.tensor(scale * rng.normal(size=(n, classes)), dtype=torch.float32)
    return logits, torch.tensor(rng.integers(0, classes, n))


def softmax(logits: Tensor) -> Floats:
    values = logits.double().numpy()
    with np.errstate(over="ignore"):
        powers = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def loop_ece(p_NK: Floats, labels: Tensor, bins: int = 15) -> float:
    """Guo et al. 2017, Eq. 3, bin after bin."""
    confidence, right = p_NK.max(axis=1), p_NK.argmax(axis=1) == labels.numpy()
    total = 0.0
    for b in range(1, bins + 1):
        inside = (confidence > (b - 1) / bins) & (confidence <= b / bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(total)


@pytest.mark.parametrize(("n", "classes", "scale"), [(63, 7, 1.0), (5000, 3, 2.0), (20, 1, 1.0), (17, 200, 0.01)])
def test_calibration_is_the_plain_loop(n: int, classes: int, scale: float) -> None:
    logits, labels = drawn(n, classes, scale)
    found = calibration(logits, logits.argmax(dim=1), labels, ALONE)
    p_NK = softmax(logits)
    assert found.ece == pytest.approx(loop_ece(p_NK, labels), abs=1e-12)
    assert found.nll == pytest.approx(-np.log(p_NK[np.arange(n), labels.numpy()]).mean(), abs=1e-12)
    assert found.bins_3B[0].sum() == n and found.bins_3B.shape == (3, 15)
    listed = found.bins
    assert len(listed) == len(
        {min(14, int(np.ceil(15 * p)) - 1) for p in p_NK.max(axis=1)}
    )  # bins without images fall away
    gaps = [entry["images"] * abs(entry["accuracy"] - entry["confidence"]) for entry in listed]
    assert sum(gaps) / n == pytest.approx(found.ece, abs=1e-12)


def test_probabilities_of_one_and_ties_and_edges() -> None:
    certain = torch.tensor([[1000.0, 0.0], [1000.0, 0.0], [0.0, 1000.0], [1000.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1])
    found = calibration(certain, certain.argmax(dim=1), labels, ALONE)
    assert found.ece == 0.25 and found.nll == 250.0
    assert found.bins == [{"up_to": 1.0, "images": 4, "accuracy": 0.75, "confidence": 1.0}]
    # A network that knows nothing: every probability is 1/5, the end of the third bin, which belongs to it.
    level = torch.zeros(10, 5)
    plain = score(level, torch.arange(10) % 5, ALONE)
    found = calibration(level, plain.predicted_N, torch.arange(10) % 5, ALONE)
    assert [entry["up_to"] for entry in found.bins] == [0.2]
    assert found.bins[0]["accuracy"] == plain.top1 == pytest.approx(0.2)  # the same class of equals as in top-1
    assert found.ece == pytest.approx(0, abs=1e-12) and found.nll == pytest.approx(np.log(5))


def test_not_a_number_is_not_hidden() -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0]])
    found = calibration(logits, torch.tensor([1, 0]), torch.tensor([1, 1]), ALONE)
    assert np.isnan(found.ece) and np.isnan(found.nll)


@pytest.mark.parametrize("classes", [1, 7, 200])
def test_confusions_are_the_plain_counts(classes: int) -> None:
    logits, labels = drawn(300, classes, 1.0)
    predicted = logits.argmax(dim=1)
    table = np.zeros((classes, classes), int)
    for true, said in zip(labels.tolist(), predicted.tolist(), strict=True):
        table[true, said] += 1
    found = confusion(predicted, labels, classes, ALONE).tolist()
    assert found == [[t, p, table[t, p]] for t in range(classes) for p in range(classes) if table[t, p]]


def test_subgroups_are_the_plain_counts() -> None:
    rng = np.random.default_rng(0)
    right, groups = rng.random(50) < 0.5, rng.integers(0, 3, 50)
    found = by_group(torch.tensor(right), torch.tensor(groups), 4, ALONE)
    expected = [[(groups == g).sum() for g in range(4)], [right[groups == g].sum() for g in range(4)]]
    assert found.tolist() == expected and found[0, 3] == 0


def facts_of(classes: int, groups: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a result file would say of 300 drawn images; image i is of group i % 3."""
    logits, labels = drawn(300, classes, 1.0)
    plain = score(logits, labels, ALONE)
    of = torch.arange(300) % 3
    report = ClassifierReport(
        counts_3K=plain.counts_3K,
        predicted_N=plain.predicted_N,
        confusion_P3=confusion(plain.predicted_N, labels, classes, ALONE),
        groups_2G=by_group(plain.predicted_N == labels, of, len(groups), ALONE) if groups else None,
    )
    setting: Any = SimpleNamespace(
        splits=SimpleNamespace(val=SimpleNamespace(classes=[f"c{i}" for i in range(classes)])),
        subgroups=(groups, of) if groups else None,
        recipe=SimpleNamespace(data=SimpleNamespace(subgroup="light")),
    )
    assert report.metrics == plain.metrics  # no probabilities, no calibration
    return report_entries(setting, report)


def test_up_to_a_hundred_classes_the_matrix_is_in_the_result(tmp_path: Path) -> None:
    facts = facts_of(100)
    put_confusion(facts, tmp_path)
    logits, labels = drawn(300, 100, 1.0)
    table = np.zeros((100, 100), int)
    np.add.at(table, (labels.numpy(), logits.argmax(dim=1).numpy()), 1)
    text = as_json(facts | {"note": "[\n  1"})
    assert json.loads(text) == {**facts, "note": "[\n  1"} and facts["confusion"] == table.tolist()
    assert text.count("\n") < 900 and list(tmp_path.iterdir()) == []  # a row a line


def test_of_more_it_is_a_file_of_pairs(tmp_path: Path) -> None:
    facts = facts_of(101)
    pairs = facts["confusion"]
    other = dict(facts)
    put_confusion(other, None)  # another rank
    assert list(tmp_path.iterdir()) == []
    put_confusion(facts, tmp_path)
    assert facts["confusion"] == other["confusion"] == "confusion.csv"
    header, *rows = csv.reader((tmp_path / "confusion.csv").read_text().splitlines())
    assert header == ["true", "predicted", "images"]
    assert rows == [[f"c{t}", f"c{p}", str(n)] for t, p, n in pairs] and sum(int(row[2]) for row in rows) == 300


def test_the_worst_subgroup_is_a_named_one_that_has_images() -> None:
    found = facts_of(3, ("(none)", "day", "night", "dusk"))["subgroups"]
    assert found["column"] == "light" and [row["images"] for row in found["groups"]] == [100, 100, 100, 0]
    assert found["groups"][3]["top1"] is None
    assert found["worst"] == min(found["groups"][1:3], key=lambda row: row["correct"])
