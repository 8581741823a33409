"""Evaluation by several settings at once: each is as if alone; the one that is kept is chosen on training labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from fastsimclr import stages
from fastsimclr.cli.main import main
from fastsimclr.evaluation.config import LinearConfig
from fastsimclr.evaluation.features import Features
from fastsimclr.loaders import DataError, Relabelled, Source
from fastsimclr.methods import CrossEntropy, LinearSweep, Objective
from fastsimclr.models import Classifier, ClassifierNet, ModelConfig, ProjectionHead, build_encoder
from fastsimclr.optim import HeadSetting, OptimConfig, build_optimizer, set_lr
from fastsimclr.recipe import parse_recipe
from fastsimclr.stages import Setting, evaluation
from fastsimclr.stages.networks import load_classifier, load_encoder
from fastsimclr.stages.training import classifier_score
from tests.smoke import SmokeRun


def net() -> ClassifierNet:
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(arch="resnet18", width=0.125), 8)
    return ClassifierNet(encoder, ProjectionHead(encoder.out_channels, 0), Classifier(encoder.out_channels, 3))


def trained(objective: Objective, config: OptimConfig) -> Objective:
    """After seven steps with a falling rate, as the trainer takes them."""
    heads = objective.supervised_heads()
    optimizer = build_optimizer(config, objective, global_batch=256, heads=heads, settings=objective.head_settings())
    generator = torch.Generator().manual_seed(1)
    objective.train()
    for step in range(7):
        images = torch.rand(9, 3, 8, 8, generator=generator)
        labels = torch.randint(0, 3, (9,), generator=generator)
        set_lr(optimizer, config.peak_lr(256) * (7 - step) / 7)
        objective(images, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return objective


@pytest.mark.parametrize("optim", [{"name": "sgd", "nesterov": True}, {"name": "lars"}], ids=["sgd", "lars"])
def test_classifiers_side_by_side_are_each_one_alone(optim: dict[str, Any]) -> None:
    settings = [(0.5, 0.0), (2.0, 0.01), (0.1, 0.3)]
    base = OptimConfig(**optim, lr=2.0, weight_decay=0.7, warmup_epochs=0)
    heads = [HeadSetting(lr_scale=lr / 2.0, weight_decay=decay) for lr, decay in settings]
    swept = trained(LinearSweep(net(), heads), base)
    assert isinstance(swept, LinearSweep)
    for candidate, (lr, decay) in zip(swept.candidates, settings, strict=True):
        alone = trained(CrossEntropy(net(), frozen_body=True), replace(base, lr=lr, weight_decay=decay))
        for name, value in candidate.state_dict().items():
            assert value.abs().max() > 0
            torch.testing.assert_close(value, alone.state_dict()[f"network.classifier.{name}"], rtol=1e-5, atol=1e-7)
    before = net().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in swept.network.state_dict().items())


def test_the_chosen_classifier_becomes_the_networks() -> None:
    swept = LinearSweep(net(), [HeadSetting(lr_scale=1.0, weight_decay=0.0)] * 2)
    nn.init.constant_(swept.candidates[1].get_parameter("weight"), 3.0)
    swept.choose(1)
    assert torch.equal(swept.network.classifier.weight, torch.full_like(swept.network.classifier.weight, 3.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sgd", "sweep_l2": (0.1,)}, r"linear.sweep_l2=\[0.1\] is for linear.method=lbfgs, not sgd"),
        ({"sweep_weight_decay": (0.1,)}, r"linear.sweep_weight_decay=\[0.1\] is for linear.method=sgd, not lbfgs"),
        ({"sweep_l2": (0.1, 0.0)}, r"linear.sweep_l2=\[0.1, 0.0\]: each must be greater than 0"),
        ({"method": "sgd", "sweep_weight_decay": (-1.0,)}, r"sweep_weight_decay=\[-1.0\]: each must be at least 0"),
        ({"method": "sgd", "sweep_lr": (1.0, 1.0)}, r"linear.sweep_lr=\[1.0, 1.0\] has a value twice"),
        ({"sweep_holdout": 1.0}, r"linear.sweep_holdout=1.0 must be between 0 and 1"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearConfig(**settings)


def test_a_sweep_is_every_pair() -> None:
    swept = parse_recipe("linear: {method: sgd, sweep_lr: [1, 2], sweep_weight_decay: [0, 1.0e-6]}").linear.swept
    assert swept == ((1.0, 0.0), (1.0, 1e-6), (2.0, 0.0), (2.0, 1e-6))
    assert parse_recipe("linear: {method: sgd, sweep_lr: [3]}").linear.swept == ((3.0, 0.0),)
    assert LinearConfig().swept == ()


@pytest.mark.parametrize("text", ["knn: {k: 0}", "knn: {k: []}", "knn: {temperature: [0.1, -1]}"])
def test_neighbours_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"knn\.(k|temperature)="):
        parse_recipe(text)


@pytest.fixture(scope="module")
def pretrained(smoke_run: SmokeRun) -> Path:
    return smoke_run("pretrain")


def stage(command: str, pretrained: Path, out: Path, *words: str) -> dict[str, Any]:
    labels = [f"--{command}.labels", "all"]  # at smoke size 64 images of the ten digits
    assert main([command, "--from", str(pretrained), "--out", str(out), *labels, *words]) == 0
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


def truth(source: Source) -> dict[str, int]:
    return {source.describe(i): int(source.labels[i]) for i in range(len(source))}


def test_the_held_out_part_is_of_each_class_and_apart(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe((pretrained / "recipe.yaml").read_text())
    setting = Setting(replace(recipe, smoke=False, linear=LinearConfig(sweep_holdout=0.2)))
    labelled = setting.labelled("all")
    rest, held = (truth(part) for part in evaluation._held_out(setting, labelled))
    assert rest | held == truth(labelled) and not rest.keys() & held.keys()
    assert not held.keys() & truth(setting.splits.val).keys()
    for digit in range(10):
        images = sum(label == digit for label in truth(labelled).values())
        assert sum(label == digit for label in held.values()) == round(0.2 * images)
    monkeypatch.setattr(evaluation, "_MOST_HELD_OUT", 100)
    assert len(evaluation._held_out(setting, labelled)[1]) == pytest.approx(100, abs=5)  # rounded in each class
    lonely = Setting(replace(recipe, smoke=False, data=replace(recipe.data, labels_per_class=1)))
    with pytest.raises(DataError, match="one labelled image a class, none to choose a setting on"):
        evaluation._held_out(lonely, lonely.labelled("subset"))


@pytest.mark.slow
def test_logistic_regression_chooses_as_scikit_learn_and_fits_all_again(pretrained: Path, tmp_path: Path) -> None:
    penalties = [1.0, 0.01]
    found = stage("linear", pretrained, tmp_path / "swept", "--linear.sweep_l2", str(penalties))
    setting = Setting(parse_recipe((tmp_path / "swept" / "recipe.yaml").read_text()))
    encoder = load_encoder(pretrained)[0].eval()

    def features(source: Source) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        made: Features = setting.features(encoder, source)
        x = made.values.double().numpy()
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True)), made.labels.numpy()

    (x, y), (held_x, held_y) = (features(part) for part in evaluation._held_out(setting, setting.labelled("all")))
    for row, l2 in zip(found["sweep"]["tried"], penalties, strict=True):
        oracle = LogisticRegression(C=1 / (l2 * len(x)), max_iter=5000, tol=1e-8).fit(x, y)
        assert row["l2"] == l2
        assert row["held_out_top1"] == pytest.approx(oracle.score(held_x, held_y), abs=1 / len(held_y) + 1e-6)
    best = max(found["sweep"]["tried"], key=lambda row: row["held_out_top1"])
    assert found["sweep"]["chosen"] == {"l2": best["l2"]} and found["l2"] == best["l2"]
    assert found["sweep"]["held_out"] == len(held_y) and found["labels"] == len(x) + len(held_x) == 64
    plain = stage("linear", pretrained, tmp_path / "plain", "--linear.l2", str(best["l2"]))
    assert "sweep" not in plain
    assert plain["metrics"]["top1"] == pytest.approx(found["metrics"]["top1"], abs=1 / 64 + 1e-6)


SGD = ("--linear.method", "sgd", "--linear.sweep_lr", "[0.001, 10]", "--linear.sweep_weight_decay", "[0, 0.001]")


@pytest.fixture(scope="module")
def swept(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept") / "linear"
    stage("linear", pretrained, out, *SGD)
    return out


def test_sgd_keeps_the_classifier_that_is_best_on_held_out_labels(swept: Path) -> None:
    found = json.loads((swept / "result.json").read_text())
    tried = found["sweep"]["tried"]
    assert [(row["lr"], row["weight_decay"]) for row in tried] == [(0.001, 0), (0.001, 0.001), (10, 0), (10, 0.001)]
    best = max(tried, key=lambda row: row["held_out_top1"])
    assert found["sweep"]["chosen"] == {"lr": best["lr"], "weight_decay": best["weight_decay"]}
    assert found["labels"] + found["sweep"]["held_out"] == 64
    assert found["implementations"]["loss"] == "cross_entropy.torch"
    setting = Setting(parse_recipe((swept / "recipe.yaml").read_text()))
    network, _ = load_classifier(swept)  # what later commands get
    score = classifier_score(setting, network)
    assert score.metrics == found["metrics"]
    assert score.per_class([str(digit) for digit in range(10)]) == found["per_class"]
    assert sum(entry["correct"] for entry in found["per_class"]) == round(found["metrics"]["top1"] * 64)
    _, held = evaluation._held_out(setting, setting.labelled("all"))
    again = setting.features(network.eval(), held)
    assert (again.values.argmax(dim=1) == again.labels).float().mean().item() == pytest.approx(best["held_out_top1"])


def test_a_finished_sweep_measures_again_and_another_one_is_refused(
    swept: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((swept / "result.json").read_text())
    again = stage("linear", pretrained, swept, *SGD, "--resume", "auto")
    assert again["metrics"] == before["metrics"] and again["sweep"] == before["sweep"]
    words = ["--from", str(pretrained), "--out", str(swept), "--resume", "auto", "--linear.labels", "all", *SGD]
    capsys.readouterr()
    assert main(["linear", *words, "--linear.sweep_lr", "[0.001, 20]"]) == 1
    assert "was made with sweep=[[0.001, 0.0]" in capsys.readouterr().err


def test_validation_labels_choose_nothing(
    swept: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads((swept / "result.json").read_text())
    setting = Setting(parse_recipe((swept / "recipe.yaml").read_text()))
    val = setting.splits.val
    other = Relabelled(val, (np.asarray(val.labels) + 1) % 10)
    monkeypatch.setitem(setting.__dict__, "splits", replace(setting.splits, val=other))
    after = stages.evaluate_linear(setting, pretrained, tmp_path / "linear", False)
    assert after["sweep"] == before["sweep"]
    assert after["metrics"] != before["metrics"]


def test_a_table_of_neighbours(pretrained: Path, tmp_path: Path) -> None:
    table = stage("knn", pretrained, tmp_path / "table", "--knn.k", "[5, 20]", "--knn.temperature", "[0.1, 1]")
    rows = [(row["k"], row["temperature"]) for row in table["table"]]
    assert rows == [(5, 0.1), (5, 1.0), (20, 0.1), (20, 1.0)]
    assert (table["k"], table["temperature"]) == (5, 0.1)
    assert table["metrics"]["top1"] == table["table"][0]["top1"]
    alone = stage("knn", pretrained, tmp_path / "alone", "--knn.k", "20", "--knn.temperature", "1")
    assert alone["metrics"]["top1"] == table["table"][3]["top1"] and "table" not in alone
    assert sum(entry["images"] for entry in alone["per_class"]) == 64


@pytest.mark.slow
def test_every_classifier_says_how_it_does_by_class(smoke_run: SmokeRun) -> None:
    for command in ("finetune", "supervised", "distill"):
        run = smoke_run(command)
        found = json.loads((run / "result.json").read_text())
        assert [entry["name"] for entry in found["per_class"]] == [str(digit) for digit in range(10)]
        setting = Setting(parse_recipe((run / "recipe.yaml").read_text()))
        images = np.bincount(setting.splits.val.labels, minlength=10).tolist()
        assert [entry["images"] for entry in found["per_class"]] == images
        assert sum(entry["correct"] for entry in found["per_class"]) == round(64 * found["metrics"]["top1"])
        assert "published" not in found
