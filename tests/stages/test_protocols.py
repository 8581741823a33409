"""`fastsimclr evaluate` at smoke size: all protocols of a pretraining, the report on a classifier, going on, errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastsimclr import stages
from fastsimclr.cli.main import main
from fastsimclr.evaluation.config import EvaluateConfig
from fastsimclr.loaders import DataError
from fastsimclr.recipe import Recipe, changes, dump_recipe, parse_recipe
from fastsimclr.stages import protocols
from tests.smoke import SmokeRun

QUICK = ("--device", "cpu", "--smoke", "--trainer.precision", "fp32", "--model.arch", "resnet18")
FOLDERS = ["knn", "logistic", "linear", "finetune-1", "finetune-10"]


def done(*words: object) -> None:
    assert main([str(word) for word in words]) == 0, words


def evaluation(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def pretrained(smoke_run: SmokeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, as `evaluate` writes into the folder that holds it."""
    return Path(shutil.copytree(smoke_run("pretrain"), tmp_path_factory.mktemp("protocols") / "pretrain"))


@pytest.fixture(scope="module")
def evaluated(pretrained: Path) -> Path:
    """Where `evaluate` writes by default."""
    done("evaluate", "--from", pretrained)
    return pretrained.with_name("pretrain-evaluate")


def test_a_pretraining_by_every_protocol(evaluated: Path, pretrained: Path) -> None:
    found = evaluation(evaluated)
    assert found["network"]["run"] == str(pretrained) and found["network"]["stage"] == "pretrain"
    rows = found["protocols"]
    assert [row["folder"] for row in rows] == FOLDERS
    # Smoke cuts to 64 labelled images what is more: 1 % of each of the ten classes, 1.4 images, is one.
    assert [row["labels"] for row in rows] == [64, 64, 64, 10, 64]
    for row in rows:
        result = json.loads((evaluated / row["folder"] / "result.json").read_text())
        assert result["metrics"]["top1"] == row["top1"] and result["seconds"] == row["seconds"]
        assert sum(sum(line) for line in result["confusion"]) == 64 == sum(map(sum, result["confusion"]))
        assert [line[i] for i, line in enumerate(result["confusion"])] == [c["correct"] for c in result["per_class"]]
        assert (row["ece"] is None) == (row["folder"] == "knn") and row["published"] is None
    methods = [json.loads((evaluated / name / "result.json").read_text())["method"] for name in ("logistic", "linear")]
    assert methods == ["lbfgs", "sgd"]


def test_what_is_done_is_not_measured_again(
    evaluated: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = evaluation(evaluated)

    def never(*given: object) -> dict[str, Any]:
        raise AssertionError("measured again")

    (evaluated / "knn" / "result.json").rename(evaluated / "kept.json")
    for name in ("evaluate_linear", "finetune"):
        monkeypatch.setattr(protocols, name, never)
    recipe = parse_recipe((pretrained / "recipe.yaml").read_text())
    stages.evaluate(recipe, pretrained, evaluated, True)  # the kNN alone, as after a stop in it
    after = evaluation(evaluated)
    assert after["protocols"][1:] == before["protocols"][1:]
    assert after["protocols"][0]["top1"] == before["protocols"][0]["top1"]
    monkeypatch.setattr(protocols, "evaluate_knn", never)
    one = replace(recipe, evaluate=EvaluateConfig(protocols=("linear",)))
    stages.evaluate(one, pretrained, evaluated, True)
    assert evaluation(evaluated)["protocols"] == after["protocols"]  # the others stay
    capsys.readouterr()
    done("evaluate", "--from", pretrained, "--resume", "auto")
    table = capsys.readouterr().out.splitlines()
    assert table[2].split() == ["protocol", "labels", "top-1", "top-5", "ECE", "published", "seconds"]
    assert len(table) == 3 + 5 + 1 and "fine-tuned on 10 %" in table[-2] and table[-1].endswith("evaluation.json")


def test_a_folder_of_something_else_is_refused(evaluated: Path, pretrained: Path, tmp_path: Path) -> None:
    recipe = parse_recipe((pretrained / "recipe.yaml").read_text())

    def refused(source: Path, out: Path, message: str, resume: bool = True, recipe: Recipe = recipe) -> None:
        with pytest.raises(FileExistsError, match=message):
            stages.evaluate(recipe, source, out, resume)

    refused(pretrained, evaluated, "go on with --resume auto, or give another --out", resume=False)
    refused(evaluated / "linear", evaluated, f"an evaluation of {pretrained} with other weights than .*linear")
    other = replace(recipe, knn=replace(recipe.knn, k=5))
    refused(pretrained, evaluated, r"knn was begun with other settings \(knn.k: 20 -> 5\)", recipe=other)
    (tmp_path / "mine.txt").write_text("")
    refused(pretrained, tmp_path, f"{tmp_path} is not empty and holds no evaluation")


def test_what_makes_it_another_recipe() -> None:
    recipe = Recipe()
    other = replace(recipe, knn=replace(recipe.knn, k=5))
    assert changes(dump_recipe(recipe), recipe) == changes("seed: 0", recipe) == []
    # Keys that an earlier version did not write have had their defaults.
    assert changes(dump_recipe(recipe), other) == changes("seed: 0", other) == ["knn.k: 200 -> 5"]
    assert changes("seed: 3", other) == ["seed: 3 -> 0", "knn.k: 200 -> 5"]
    here = {"threads": 3, "loader": "native", "cache": "kept", "cache_gib": 1.0, "resident_gib": 2.0}
    trainer = replace(recipe.trainer, log_every_steps=7)
    elsewhere = replace(recipe, device="cpu", data=replace(recipe.data, **here), trainer=trainer)
    assert dump_recipe(elsewhere) != dump_recipe(recipe) and changes(dump_recipe(recipe), elsewhere) == []
    moved = replace(elsewhere, data=replace(elsewhere.data, val_seed=1))
    assert changes(dump_recipe(recipe), moved) == ["data.val_seed: 0 -> 1"]
    with pytest.raises(ValueError, match="the recipe is refused"):
        changes("no_key: 1", recipe)


def recipes(pretrained: Path, **settings: Any) -> dict[str, Recipe]:
    """{folder: recipe} of the fine-tunings that `evaluate` would run."""
    recipe = parse_recipe((pretrained / "recipe.yaml").read_text())
    recipe = replace(recipe, evaluate=EvaluateConfig(protocols=("finetune",), **settings))
    return {one.folder: one.recipe for one in protocols._protocols(stages.Setting(recipe), recipe)}


def test_shares_epochs_and_layers(pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastsimclr")
    found = recipes(pretrained, fractions=(0.003, 0.01, 0.1, 1.0))
    assert list(found) == ["finetune-1", "finetune-10", "finetune-100"]  # .3 % of 140 images is none
    assert "fine-tuned on 0.3 %: left out, class" in caplog.text
    tuned = [one.finetune for one in found.values()]
    assert [one.epochs for one in tuned] == [60, 30, 30] and [one.head_layer for one in tuned] == [1, 1, 0]
    assert [one.labels for one in tuned] == ["subset", "subset", "all"]
    assert [one.data.label_fraction for one in found.values()] == [0.01, 0.1, 1.0]
    assert {one.data.labels_per_class for one in found.values()} == {None}  # the recipe's own few labels
    setting = stages.Setting(parse_recipe((pretrained / "recipe.yaml").read_text()))
    train = setting.splits.train
    path = tmp_path / "tenth.txt"
    path.write_text("\n".join(train.describe(i) for i in range(0, len(train), 10)))
    own = recipes(pretrained, fractions=(0.01, 0.1), lists=(None, str(path)), epochs=(3, 2))
    assert [one.data.label_list for one in own.values()] == [None, str(path)]
    assert [one.finetune.epochs for one in own.values()] == [3, 2]
    with pytest.raises(
        ValueError, match=r"tenth.txt holds 0\.100\d of the labelled training images, where evaluate.fra"
    ):
        recipes(pretrained, fractions=(0.01,), lists=(str(path),))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fractions": (0.1, 2.0)}, r"evaluate.fractions=\[0.1, 2.0\]: each must be above 0 and up to 1"),
        ({"fractions": (0.1, 0.1)}, "has a value twice"),
        ({"protocols": ("knn", "knn")}, "has a value twice"),
        (
            {"lists": ("a.txt",)},
            r"evaluate.lists=\['a.txt'\] must have one for each of evaluate.fractions=\[0.01, 0.1\]",
        ),
        ({"epochs": (60,)}, "must have one for each"),
        ({"epochs": (60, 0)}, "each must be 1 or more"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**settings)


def images(root: Path, classes: Sequence[str]) -> None:
    """12 images of each class, dark or bright; labels.csv says which, but not of every fourth."""
    rows = ["path,label,light"]
    for label, name in enumerate(classes):
        for k in range(12):
            pixels = np.full((8, 8, 3), 30 * label + 100 * (k % 2), np.uint8)
            path = root / name / f"{k:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            rows.append(f"{name}/{k:02}.png,{name},{'' if k % 4 == 0 else 'bright' if k % 2 else 'dark'}")
    (root / "labels.csv").write_text("\n".join(rows))


@pytest.mark.slow
def test_a_classifier_is_reported_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(tmp_path / "set", "abcdef")
    data = ("--data.source", "folder", "--data.root", tmp_path / "set", "--data.val_fraction", "0.5")
    run, quick = tmp_path / "run", (*QUICK, "--views.size", "8", "--data.loader", "native")
    done("supervised", "--config", "folder.yaml", *data, *quick, "--out", run)
    capsys.readouterr()
    done("evaluate", "--from", run, "--out", tmp_path / "out", "--data.subgroup", "light")
    shown = capsys.readouterr().out
    found = evaluation(tmp_path / "out")
    (row,), report = found["protocols"], found["report"]
    trained = json.loads((run / "result.json").read_text())
    assert row["labels"] == 36 and report["of"] == "supervised"
    for key in ("metrics", "per_class", "confusion", "calibration"):
        assert report[key] == trained[key], key
    assert {"top1", "top5", "nll", "ece"} == report["metrics"].keys() and "subgroups" not in trained
    groups = {entry["name"]: entry for entry in report["subgroups"]["groups"]}
    # Which images were held out, and of which group each is, from the file names.
    recipe = parse_recipe((run / "recipe.yaml").read_text())
    val = stages.Setting(recipe).splits.val
    numbers = [int(Path(val.describe(i)).stem) for i in range(len(val))]
    of = ["(none)" if k % 4 == 0 else "bright" if k % 2 else "dark" for k in numbers]
    assert {name: entry["images"] for name, entry in groups.items()} == {name: of.count(name) for name in set(of)}
    assert sum(entry["correct"] for entry in groups.values()) == sum(report["confusion"][i][i] for i in range(6))
    assert report["subgroups"]["worst"]["name"] in ("bright", "dark") and "worst subgroup: " in shown
    assert "top-1 by light:" in shown and "weakest classes" in shown
    images(tmp_path / "other", "uvwxyz")
    other = replace(recipe, data=replace(recipe.data, root=str(tmp_path / "other")))
    with pytest.raises(DataError, match=r"knows 6 classes \(a, b, c, …\), the validation data other.* \(u, v, w, …\)"):
        stages.evaluate(other, run, tmp_path / "none", False)
