"""The stages by command line at smoke size, chained by run folder, and what each says of bad input."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsimclr.cli.main import main
from fastsimclr.recipe import parse_recipe
from fastsimclr.runs import checkpoint
from fastsimclr.runs.log import read_records
from fastsimclr.runs.stop import Stopped
from fastsimclr.stages import STAGES
from tests.smoke import SMOKE, SmokeRun

RUNS = ("pretrain", "linear", "sgd", "knn", "finetune", "distill", "supervised")


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which a command is refused."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code in (1, 2), (words, out, err)
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def done(*words: object) -> None:
    assert main([str(word) for word in words]) == 0, words


def result(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "result.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def runs(smoke_run: SmokeRun) -> Path:
    """A folder with one run of every command: pretrain, linear, sgd, knn, finetune, distill, supervised."""
    (root,) = {smoke_run(name).parent for name in RUNS}
    return root


def copy(runs: Path, name: str, to: Path) -> Path:
    return Path(shutil.copytree(runs / name, to / name))


@pytest.mark.parametrize("name", RUNS)
def test_every_result_names_what_made_it(runs: Path, name: str) -> None:
    found = result(runs / name)
    assert found["stage"] == ("linear" if name == "sgd" else name)
    assert {"device", "precision", "torch", "python", "commit"} <= found["environment"].keys()
    assert found["data"]["source"] == "digits:train" and found["data"]["damaged"] == {}
    assert {"loader", "views"} <= found["implementations"].keys()
    assert found["parameters"] > 10_000
    if name != "pretrain":
        assert 0 <= found["metrics"]["top1"] <= found["metrics"]["top5"] <= 1
    if name in ("pretrain", "sgd", "finetune", "distill", "supervised"):
        assert {"loss", "optimizer", "bn"} <= found["implementations"].keys()
        assert found["training"]["steps"] == checkpoint.load(checkpoint.newest(runs / name))["step"]


def test_a_chained_stage_has_the_recipe_of_the_run_it_starts_from(runs: Path) -> None:
    first = parse_recipe((runs / "pretrain" / "recipe.yaml").read_text())
    assert first.smoke and first.data.labels_per_class == 2 and first.pretrain.probe_every_epochs == 1
    assert parse_recipe((runs / "finetune" / "recipe.yaml").read_text()) == first
    assert parse_recipe((runs / "sgd" / "recipe.yaml").read_text()).linear.method == "sgd"
    assert parse_recipe((runs / "distill" / "recipe.yaml").read_text()).distill.student.arch == "resnet34"
    assert result(runs / "distill")["parameters"] > result(runs / "finetune")["parameters"]


def test_probes_at_their_cadence(runs: Path) -> None:
    probes = [r for r in read_records(runs / "pretrain" / "metrics.jsonl") if r["kind"] == "probe"]
    assert [probe["step"] for probe in probes] == [4]  # one epoch of 64 images at 16 a step
    assert all(0 <= probe[key] <= 1 for probe in probes for key in ("knn_top1", "linear_top1"))


def test_fine_tuning_starts_from_the_pretrained_weights(runs: Path, tmp_path: Path) -> None:
    # With a learning rate of 0 what is fine-tuned are the weights themselves.
    done("finetune", "--from", runs / "pretrain", "--out", tmp_path, "--finetune.optim.lr", "0")
    before = checkpoint.load(checkpoint.newest(runs / "pretrain"))["objective"]
    after = checkpoint.load(checkpoint.newest(tmp_path))["objective"]
    weights = [key for key in after if ".encoder." in key and key.endswith("weight")]
    assert len(weights) > 30
    assert [key for key in weights if not torch.equal(before[key], after[key])] == []


def test_linear_evaluation_leaves_the_encoder(runs: Path) -> None:
    before = checkpoint.load(checkpoint.newest(runs / "pretrain"))["objective"]
    after = checkpoint.load(checkpoint.newest(runs / "sgd"))["objective"]
    encoder = [key for key in after if key.startswith("network.encoder.")]
    assert len(encoder) > 60  # weights and BN statistics
    assert [key for key in encoder if not torch.equal(before[key], after[key])] == []


def test_the_teacher_is_carried_unchanged(runs: Path) -> None:
    taught = checkpoint.load(checkpoint.newest(runs / "finetune"))["objective"]
    carried = checkpoint.load(checkpoint.newest(runs / "distill"))["objective"]
    for key, value in taught.items():
        assert torch.equal(value, carried[key.replace("network.", "teacher.", 1)]), key
    assert result(runs / "distill")["metrics"]["teacher_top1"] == result(runs / "finetune")["metrics"]["top1"]


def test_a_distilled_network_can_be_evaluated(runs: Path, tmp_path: Path) -> None:
    done("knn", "--from", runs / "distill", "--out", tmp_path / "knn")
    # The untrained network beside it is the student's architecture, too.
    assert result(tmp_path / "knn")["metrics"]["untrained_top1"] > 0


def test_a_supervised_checkpoint_can_be_evaluated(runs: Path, tmp_path: Path) -> None:
    done("linear", "--from", checkpoint.newest(runs / "supervised"), "--out", tmp_path / "linear")


def test_resume_of_a_finished_run_measures_again(runs: Path, tmp_path: Path) -> None:
    run = copy(runs, "supervised", tmp_path)
    before = result(run)
    (run / "result.json").unlink()
    done("supervised", *SMOKE, "--out", run, "--resume", "auto")
    assert result(run)["metrics"] == before["metrics"]
    assert result(run)["training"] == before["training"]


@pytest.mark.parametrize(
    ("option", "value", "key"),
    [
        ("--data.labels_per_class", 3, "fingerprint"),
        ("--model.arch", "resnet34", "model"),
        pytest.param("--seed", 1, "seed", marks=pytest.mark.slow),
        pytest.param("--supervised.batch", 5, "batch", marks=pytest.mark.slow),
        ("--supervised.optim.name", "lars --supervised.optim.nesterov false", "optimizer"),
    ],
)
def test_a_resume_with_something_else_names_the_key(
    capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path, option: str, value: object, key: str
) -> None:
    run = copy(runs, "supervised", tmp_path)
    line = refused(capsys, "supervised", *SMOKE, "--out", run, "--resume", "auto", option, *str(value).split())
    assert f"{key}=" in line and "this run has" in line and "another --out" in line, line


@pytest.fixture(scope="module")
def stopped_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain that was stopped in its fourth stage, started again."""
    out = tmp_path_factory.mktemp("chain") / "out"
    with pytest.MonkeyPatch.context() as patch:

        def stop(*args: object, **kwargs: object) -> dict[str, Any]:
            raise Stopped(15, "supervised: stopped at step 1 of 2, state saved in x")

        patch.setitem(STAGES, "supervised", replace(STAGES["supervised"], function=stop))
        assert main(["run", *SMOKE, "--out", str(out)]) == 143
    assert sorted(path.parent.name for path in out.glob("*/result.json")) == ["knn", "linear", "pretrain"]
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert main(["run", *SMOKE, "--out", str(out)]) == 0
    changed = [path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp]
    assert changed == [out / "recipe.yaml"]
    return out


def test_all_stages_are_there(stopped_chain: Path) -> None:
    assert list(result(stopped_chain)) == ["pretrain", "knn", "linear", "supervised", "finetune", "distill"]
    for stage, found in result(stopped_chain).items():
        assert found == result(stopped_chain / stage)


def test_a_finished_chain_only_reports(stopped_chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in stopped_chain.glob("*/*.json")}
    done("run", *SMOKE, "--out", stopped_chain)
    text = capsys.readouterr().out
    for row in ("kNN on the untrained network", "linear on", "supervised from scratch", "fine-tuned", "distilled"):
        assert row in text
    assert stamps == {path: path.stat().st_mtime_ns for path in stopped_chain.glob("*/*.json")}


def test_another_recipe_is_refused(stopped_chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "run", *SMOKE, "--out", stopped_chain, "--pretrain.temperature", "0.7")
    assert "pretrain.temperature: 0.2 -> 0.7" in line and "another --out" in line


def test_a_chain_that_never_began_holds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "device='tpu'" in refused(capsys, "run", *SMOKE, "--out", tmp_path / "a", "--device", "tpu")
    line = refused(capsys, "run", *SMOKE, "--out", tmp_path / "a", "--data.source", "folder", "--data.root", "gone")
    assert "gone" in line and "another recipe" not in line


def test_a_stopped_chain_goes_on_by_the_same_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **kwargs: object) -> dict[str, Any]:
        raise Stopped(2, "pretrain: stopped at step 3 of 5, state saved in x")

    monkeypatch.setitem(STAGES, "pretrain", replace(STAGES["pretrain"], function=stop))
    assert main(["run", *SMOKE, "--out", str(tmp_path)]) == 130
    assert "give the same command to go on" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 training and 8 validation images of two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in ("cat", "dog"):
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(place / f"{i:02}.png")
    return tmp_path / "data"


def words(folder: Path, run: Path, *more: object) -> list[object]:
    """Options of a smoke run on an image folder."""
    plain = ["--data.source", "folder", "--data.root", folder, "--data.labels_per_class", "2", "--out", run]
    return [*SMOKE, *plain, *more]


@pytest.mark.slow
@pytest.mark.parametrize(
    "loader",
    [pytest.param("torchvision", marks=pytest.mark.full), pytest.param("dali", marks=pytest.mark.needs("nvidia.dali"))],
)
def test_a_loader_of_crops_also_evaluates(folder: Path, tmp_path: Path, loader: str) -> None:
    probing = ("--data.loader", loader, "--pretrain.probe_every_epochs", "1")
    done("pretrain", *words(folder, tmp_path / "run", *probing))
    found = result(tmp_path / "run")
    assert found["implementations"]["loader"].startswith(loader)
    assert any("knn_top1" in record for record in read_records(tmp_path / "run" / "metrics.jsonl"))


@pytest.mark.parametrize("loader", ["native", "resident"])
def test_damaged_images_are_named_counted_and_replaced(folder: Path, tmp_path: Path, loader: str) -> None:
    broken = folder / "train" / "cat" / "03.png"
    broken.write_bytes(broken.read_bytes()[:200])
    (folder / "train" / "dog" / "05.png").write_text("no image")
    loads = ("--data.loader", loader, "--data.max_bad_fraction", "0.2")
    done("pretrain", *words(folder, tmp_path / "run", *loads))
    damaged = [text for texts in result(tmp_path / "run")["data"]["damaged"].values() for text in texts]
    assert len(damaged) == 2
    assert any(str(broken) in text for text in damaged) and any("dog/05.png" in text for text in damaged)


@pytest.mark.parametrize("loader", ["native", "resident"])
def test_too_many_damaged_images_stop_the_run(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, loader: str
) -> None:
    for name in ("01", "02"):
        (folder / "train" / "cat" / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\nfoo")
    loads = ("--data.loader", loader, "--data.max_bad_fraction", "0.05")
    line = refused(capsys, "pretrain", *words(folder, tmp_path / "run", *loads))
    assert "2 of 24 images are damaged" in line and "data.max_bad_fraction=0.05" in line and "cat/01.png" in line
    assert checkpoint.saved(tmp_path / "run") == []


def test_bad_folders_are_named(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "nowhere" in refused(capsys, "pretrain", *words(tmp_path / "nowhere", run))
    (tmp_path / "void").mkdir()
    assert f"{tmp_path / 'void'} holds no image" in refused(capsys, "pretrain", *words(tmp_path / "void", run))
    (folder / "train" / "emu").mkdir()
    line = refused(capsys, "pretrain", *words(folder, run))
    assert f"{folder / 'train' / 'emu'} is a class with no image" in line and "remove the folder" in line
    (folder / "train" / "emu").rmdir()
    line = refused(capsys, "supervised", *words(folder, run, "--data.labels_per_class", "99"))
    assert "99" in line and "labels_per_class" in line
    line = refused(capsys, "pretrain", *words(folder, run), "--smoke", "false", "--pretrain.batch", "25")
    assert "pretrain.batch=25 is larger than the 24 images" in line and "--pretrain.batch 24" in line
    assert not run.exists()


def test_fewer_labels_than_classes(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "few.txt"
    listed.write_text("train/cat/01.png\ncat/02.png\n")
    root = [*SMOKE, "--data.source", "folder", "--data.root", folder, "--out", tmp_path / "run"]
    root = [word for word in root if word != "digits.yaml" and word != "--config"]
    line = refused(capsys, "supervised", *root, "--data.label_list", listed)
    assert "dog" in line or "few.txt" in line, line


def test_probes_without_labels_are_left_out(folder: Path, tmp_path: Path) -> None:
    for place in ("cat", "dog"):  # one image of each class: none can be held out
        for path in sorted((folder / "train" / place).iterdir())[1:]:
            path.rename(folder / f"{place}{path.name}")
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in folder.glob("*.png"):
        path.rename(flat / path.name)
    run = tmp_path / "run"
    done(
        "pretrain",
        *SMOKE,
        "--data.source",
        "folder",
        "--data.root",
        flat,
        "--out",
        run,
        "--pretrain.probe_every_epochs",
        1,
    )
    assert {record["kind"] for record in read_records(run / "metrics.jsonl")} == {"train"}


def test_networks_of_the_wrong_stage_are_refused(
    capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "out")
    line = refused(capsys, "finetune", "--from", runs / "finetune", *out)
    assert "is of stage finetune, which has no projection head" in line and "pretrain run" in line
    line = refused(capsys, "distill", "--teacher", runs / "pretrain", *out)
    assert "is of stage pretrain, which has no classifier" in line and "finetune" in line
    line = refused(capsys, "finetune", "--from", runs, *out)
    assert "is not a run folder" in line and "give one of the runs in it: distill, finetune" in line
    assert not (tmp_path / "out").exists()


def test_networks_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    line = refused(capsys, "finetune", "--from", runs / "pretrain", *out, "--model.width", "0.5")
    assert "model.width=0.5" in line and "0.125" in line
    assert "head" in refused(capsys, "finetune", "--from", runs / "pretrain", *out, "--finetune.head_layer", "3")
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_other_classes_is_refused(
    capsys: pytest.CaptureFixture[str], runs: Path, folder: Path, tmp_path: Path
) -> None:
    line = refused(capsys, "distill", "--teacher", runs / "finetune", *words(folder, tmp_path / "out")[2:])
    assert "knows 10 classes" in line and "has 2 (cat, dog" in line and str(runs / "finetune") in line


@pytest.mark.slow
def test_damaged_and_foreign_checkpoints_by_command(
    capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path
) -> None:
    run = copy(runs, "pretrain", tmp_path)
    path = checkpoint.newest(run)
    whole = path.read_bytes()
    linear, resume = ("linear", "--from", run), ("pretrain", *SMOKE, "--out", run, "--resume", "auto")
    state = torch.load(path, weights_only=True)
    narrow = dict(state["objective"])
    narrow["network.head.extra"] = torch.ones(1)
    # tests/runs/test_checkpoint.py has what a file may hold; `linear` takes the encoder alone.
    for content, named, command in (
        (whole[: len(whole) // 2], "truncated", linear),
        (b"", "truncated", resume),
        ({"weights": torch.ones(2)}, "not written by fastsimclr", resume),
        ({**state, "format": 7}, "format 7", linear),
        ({**state, "objective": narrow}, "does not fit the model", resume),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        line = refused(capsys, *command)
        assert str(path) in line and named in line, line
    path.unlink()
    assert f"run folder {run} holds no checkpoint" in refused(capsys, "knn", "--from", run)


@pytest.mark.slow
def test_an_evaluation_does_not_overwrite_a_training(
    capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path
) -> None:
    run = copy(runs, "pretrain", tmp_path)
    before = (run / "result.json").read_text()
    for command in ("knn", "linear"):
        line = refused(capsys, command, "--from", run, "--out", run)
        assert str(run) in line and "another --out" in line
    assert (run / "result.json").read_text() == before
    assert "already holds step-" in refused(capsys, "pretrain", *SMOKE, "--out", run)


def test_a_diverging_run_ends_with_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    wild = ("--supervised.optim.lr", "1e30")
    line = refused(capsys, "supervised", *SMOKE, "--out", tmp_path / "run", *wild)
    assert "supervised: the " in line and "Lower the learning rate" in line
    assert checkpoint.saved(tmp_path / "run") == []
    assert not (tmp_path / "run" / "result.json").exists()
