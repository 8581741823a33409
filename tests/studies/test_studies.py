"""Studies: which trainings they take, that nothing is done twice, what the tables say, failures and stops."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsimclr import stages
from fastsimclr.cli.main import CONFIGS, main
from fastsimclr.loaders import Policy, draw
from fastsimclr.recipe import dump_recipe, parse_recipe
from fastsimclr.runs.log import read_records
from fastsimclr.runs.stop import Stopped
from fastsimclr.studies import Cell, Study, StudyJob
from fastsimclr.studies.augment import AugmentStudy
from fastsimclr.studies.batch import BatchStudy
from fastsimclr.studies.cells import Row
from fastsimclr.studies.curves import read_curves
from fastsimclr.studies.head import HeadStudy
from fastsimclr.studies.jobs import in_order, run_jobs, slots_of
from fastsimclr.studies.labels import LabelsStudy
from fastsimclr.studies.size import SizeStudy
from fastsimclr.studies.table import as_csv, as_markdown, crossing, means
from fastsimclr.studies.transfer import TransferStudy

SMOKE = ("--smoke", "--device", "cpu", "--trainer.precision", "fp32")
RECIPE = parse_recipe((CONFIGS / "digits.yaml").read_text())


def row(fraction: float, method: str, seed: int, top1: float, run: str = "run", **changes: Any) -> Row:
    plain: dict[str, Any] = {"top5": None, "labels": 10, "parameters": 5, "seconds": 2.0, "whole_seconds": 3.0}
    point = {"label_fraction": fraction}
    return Row(point=dict(point), method=method, seed=seed, run=run, top1=top1, **plain | changes)


def test_tables_give_mean_deviation_and_every_cell() -> None:
    rows = [row(0.1, "linear", 0, 0.5), row(0.1, "linear", 1, 0.7), row(1.0, "supervised", 0, 0.25, seconds=1234.5)]
    found = means(rows)
    assert found[(0.1,), "linear"].mean == pytest.approx(0.6)
    assert found[(0.1,), "linear"].deviation == pytest.approx(0.2 / 2**0.5)
    assert found[(0.1,), "linear"].n == 2 and found[(1.0,), "supervised"].deviation == 0
    text = as_markdown(rows)
    assert "| 0.1 | 0.600 ± 0.141 | - |" in text and "| 1 | - | 0.250 |" in text and "1,234" in text
    lines = list(csv.DictReader(as_csv(rows, "labels").splitlines()))
    assert len(lines) == 3 and lines[1]["top1"] == "0.7" and lines[2]["label_fraction"] == "1.0"
    assert {line["study"] for line in lines} == {"labels"} and lines[0]["top5"] == ""


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [
        ((0.5, 0.6, 0.7), (0.3, 0.5, 0.6), None),
        ((0.5, 0.6, 0.7), (0.6, 0.7, 0.8), 0.01),
        ((0.5, 0.6, 0.7), (0.3, 0.5, 0.8), 10**-0.5),
        ((0.5, 0.6, 0.7), (0.6, 0.5, 0.8), 10**-0.5),  # for good, not for the first time
        ((0.5, 0.6, 0.7), (0.4, 0.6, 0.8), 0.1),
    ],
)
def test_where_the_second_curve_overtakes_for_good(
    first: tuple[float, ...], second: tuple[float, ...], where: float | None
) -> None:
    found = crossing((0.01, 0.1, 1.0), first, second)
    assert found == (None if where is None else pytest.approx(where))


def names(cells: list[Cell]) -> list[str]:
    return [job.name for job in in_order([cell.job for cell in cells])]


def test_labels_takes_one_pretraining_and_the_last_layer_at_all_labels() -> None:
    study = LabelsStudy(fractions=(0.01, 0.1), seeds=2, finetune_epochs=(7, 5), supervised_epochs=(9, 8), validations=3)
    cells = study.cells(RECIPE)
    assert len(cells) == 2 * (2 * 4 + 1)  # and supervised on all labels, of each seed
    assert sum(name.endswith("pretrain") for name in names(cells)) == 1 and len(names(cells)) == 1 + len(cells)
    tuned = [cell for cell in cells if cell.method == "fine-tuned"]
    assert [cell.job.recipe.finetune.epochs for cell in tuned] == [7, 5, 7, 5]
    short = LabelsStudy(fractions=(0.5,), supervised_epochs=(2,), seeds=1, methods=("supervised",)).cells(RECIPE)
    share = RECIPE.supervised.optim.warmup_epochs / RECIPE.supervised.epochs
    assert short[0].job.recipe.supervised.optim.warmup_epochs == pytest.approx(2 * share) and share > 0
    assert [cell.job.recipe.data.label_fraction for cell in tuned] == [0.01, 0.1, 0.01, 0.1]
    assert {cell.job.recipe.data.label_seed for cell in tuned} == {0, 1}
    assert {cell.job.recipe.finetune.head_layer for cell in tuned} == {RECIPE.finetune.head_layer}
    every = [cell for cell in cells if cell.point["label_fraction"] == 1.0]
    assert [cell.method for cell in every] == ["supervised", "supervised"]
    assert [cell.job.recipe.supervised.epochs for cell in every] == [8, 8]
    whole = LabelsStudy(fractions=(1.0,), seeds=2, pretrainings="each").cells(RECIPE)
    assert {cell.job.recipe.finetune.head_layer for cell in whole} == {0}
    assert sum(name.endswith("pretrain") for name in names(whole)) == 2
    usual = [cell for cell in LabelsStudy(seeds=1).cells(RECIPE) if cell.method == "fine-tuned"]
    epochs = RECIPE.finetune.epochs
    assert [cell.job.recipe.finetune.epochs for cell in usual] == [epochs, epochs // 2, epochs // 2]
    distilled = next(cell.job for cell in whole if cell.method == "distilled")
    assert [job.stage for job in distilled.chain] == ["pretrain", "finetune", "distill"]


def test_the_other_studies_vary_what_they_are_called_after() -> None:
    batch = BatchStudy(batches=(16, 32), epochs=(1, 2), seeds=1).cells(RECIPE)
    settings = [(cell.job.recipe.pretrain.batch, cell.job.recipe.pretrain.epochs) for cell in batch]
    assert settings == [(16, 1), (16, 2), (32, 1), (32, 2)]
    head = HeadStudy(layers=(1, 3), seeds=1).cells(RECIPE)
    layers = [(cell.job.recipe.model.head_layers, cell.job.recipe.finetune.head_layer) for cell in head]
    assert layers == [(1, 0), (1, 1), (3, 0), (3, 1), (3, 2), (3, 3)]
    assert sum(name.endswith("pretrain") for name in names(head)) == 2
    size = SizeStudy(archs=("resnet18", "resnet50"), widths=(0.125,), selective_kernels=(False, True), seeds=1)
    assert {cell.point["network"] for cell in size.cells(RECIPE)} == {
        f"R{depth}-0.125x{kernels}" for depth in (18, 50) for kernels in ("", "-SK")
    }
    moved = TransferStudy(to=("a/pets", "cars.beton"), start="RUN", seeds=2).cells(RECIPE)
    assert {(c.job.recipe.data.source, c.job.recipe.data.root) for c in moved} == {
        ("folder", "a/pets"),
        ("beton", "cars.beton"),
    }
    assert {cell.job.start for cell in moved} == {"RUN", None}
    assert {cell.job.recipe.data.labels_per_class for cell in moved} == {None} != {RECIPE.data.labels_per_class}
    assert {cell.job.recipe.finetune.labels for cell in moved} == {"all"}
    assert len(names(moved)) == 2 * 2 * 4


def test_augment_gives_each_pair_once_and_changes_one_view() -> None:
    recipe = replace(RECIPE, views=replace(RECIPE.views, size=32))
    cells = AugmentStudy(ops=("crop", "colour", "rotation")).cells(recipe)
    assert [tuple(cell.point.values()) for cell in cells] == [
        ("crop", "crop"),
        ("crop", "colour"),
        ("crop", "rotation"),
        ("colour", "colour"),
        ("colour", "rotation"),
        ("rotation", "rotation"),
    ]
    policies = [cell.job.after.recipe.views for cell in cells if cell.job.after is not None]
    assert {cell.job.recipe.views for cell in cells} == {recipe.views}  # all are evaluated alike
    assert all(policy.one_branch for policy in policies)
    assert policies[3].ops == {"jitter", "grey"} and policies[3].crop == "centre"
    assert policies[1].ops == {"flip", "jitter", "grey"} and policies[1].crop == "random"
    assert policies[5].ops == {"quarter"}
    with pytest.raises(ValueError, match=r"--ops names blur, but views\.size=16 is below 20"):
        AugmentStudy(ops=("blur",)).cells(replace(RECIPE, views=replace(RECIPE.views, size=16)))


def test_one_branch_leaves_the_first_view_and_draws_the_others_as_ever() -> None:
    whole = Policy(size=48, rotate=30.0, rotate90=0.5, sobel=0.5, noise=0.5, cutout=0.5, solarise=0.5)
    ids, epochs = torch.arange(64), torch.full((64,), 3)
    sizes = torch.tensor([[40, 60], [51, 33]] * 32)
    half = draw(replace(whole, one_branch=True), 5, epochs, ids, 2, sizes)
    both = draw(whole, 5, epochs, ids, 2, sizes)
    assert torch.equal(half.source, both.source) and half.ops == both.ops and len(half) == 128
    for name in ("crop", "angle", "quarter", "flip", "jitter", "factors", "order", "grey", "sigma", "sobel", "cutout"):
        assert torch.equal(getattr(half, name)[64:], getattr(both, name)[64:]), name
    assert half.crop[:2].tolist() == [[0, 10, 40, 40], [9, 0, 33, 33]]
    assert torch.equal(half.extent, half.crop[:, 2:].to(half.extent.dtype))
    for name in ("angle", "quarter", "flip", "jitter", "grey", "sigma", "sobel", "noise", "solarise", "cutout"):
        assert not getattr(half, name)[:64].any(), name
        assert getattr(half, name)[64:].any(), name
    later = draw(replace(whole, one_branch=True), 5, epochs, ids, 1, sizes, first_view=1)
    assert torch.equal(later.crop, half.crop[64:])  # a view is the same, whichever it is drawn with


def lines_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def done(*words: object) -> None:
    assert main([str(word) for word in words]) == 0, words


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("studies") / "labels"
    settings = ("--fractions", "[0.1, 1.0]", "--seeds", 2, "--validations", 1)
    done("study", "labels", *SMOKE, *settings, "--out", out)
    return out


SMALL = ("--fractions", "[1.0]", "--methods", "[linear, supervised]", "--validations", 1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of three trainings: one pretraining, linear evaluation and supervised training."""
    out = tmp_path_factory.mktemp("studies") / "small"
    done("study", "labels", *SMOKE, *SMALL, "--seeds", 1, "--out", out)
    return out


def test_a_small_study_writes_table_rows_curves_and_cost(small: Path) -> None:
    rows = lines_of(small / "rows.csv")
    assert [entry["method"] for entry in rows] == ["linear", "supervised"]
    for entry in rows:
        result = json.loads((small / entry["run"] / "result.json").read_text())
        assert float(entry["top1"]) == pytest.approx(result["metrics"]["top1"], abs=1e-6)
        assert float(entry["seconds"]) == result["seconds"]
    facts = json.loads((small / "study.json").read_text())
    assert facts["cost"]["trainings"] == 3 and facts["failed"] == {}
    assert facts["cost"]["wall_seconds"] >= facts["cost"]["seconds_of_steps"] > 0
    table = (small / "table.md").read_text()
    assert "| label_fraction | linear | supervised |" in table and "Total: 3 trainings" in table
    assert all((small / name).read_bytes()[:4] == b"\x89PNG" for name in ("plot.png", "curves.png"))
    assert {(line["method"], line["seed"]) for line in lines_of(small / "curves.csv")} == {("supervised", "0")}


@pytest.mark.slow
def test_labels_writes_table_rows_curves_and_cost(labels: Path) -> None:
    rows = lines_of(labels / "rows.csv")
    assert len(rows) == 2 * 2 * 4
    for entry in rows:
        result = json.loads((labels / entry["run"] / "result.json").read_text())
        assert float(entry["top1"]) == pytest.approx(result["metrics"]["top1"], abs=1e-6)
        assert float(entry["seconds"]) == result["seconds"]
    facts = json.loads((labels / "study.json").read_text())
    assert facts["cost"]["trainings"] == 17 and facts["failed"] == {}
    assert facts["cost"]["wall_seconds"] >= facts["cost"]["seconds_of_steps"] > 0
    table = (labels / "table.md").read_text()
    assert "| label_fraction | linear | fine-tuned | distilled | supervised |" in table and " ± " in table
    assert "Supervised training" in table and "Total: 17 trainings" in table
    assert all((labels / name).read_bytes()[:4] == b"\x89PNG" for name in ("plot.png", "curves.png"))
    curves = lines_of(labels / "curves.csv")
    assert {(line["method"], line["seed"]) for line in curves} == {
        (method, seed) for method in ("fine-tuned", "supervised") for seed in "01"
    }
    ends = [line for line in curves if line["val_top1"] and float(line["epoch"]) == 1]
    assert len(ends) >= 2 * 2 * 2


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., dict[str, Any]]) -> None:
    """Let `function` run the stage `name`."""
    monkeypatch.setitem(stages.STAGES, name, replace(stages.STAGES[name], function=function))


def noted(monkeypatch: pytest.MonkeyPatch, out: Path, *, trains: bool) -> list[str]:
    """The list of the trainings that later studies in `out` start; without `trains` a stand-in writes the result."""
    ran: list[str] = []

    def noting(make: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def stage(setting: stages.Setting, *words: Any) -> dict[str, Any]:
            run = words[-2]  # before resume
            ran.append(str(run.relative_to(out)))
            if trains:
                return make(setting, *words)
            found = {"metrics": {"top1": 0.5}, "labels": 10, "parameters": 5, "seconds": 1.0, "environment": {}}
            run.mkdir(parents=True)
            (run / "metrics.jsonl").touch()
            (run / "result.json").write_text(json.dumps(found))
            return found

        return stage

    for name, stage in list(stages.STAGES.items()):
        stand_in(monkeypatch, name, noting(stage.function))
    return ran


def test_a_finished_study_trains_only_what_is_new(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(shutil.copytree(small, tmp_path / "small"))
    ran = noted(monkeypatch, out, trains=False)
    rows = lines_of(out / "rows.csv")
    done("study", "labels", *SMOKE, *SMALL, "--seeds", 2, "--out", out)
    assert ran == ["fraction-1/seed-1/linear", "fraction-1/seed-1/supervised"]
    grown = lines_of(out / "rows.csv")
    assert len(grown) == 4 and all(entry in grown for entry in rows)
    before, after = ((folder / "table.md").read_text().count(" ± ") for folder in (small, out))
    assert after == before + 2 * 2  # a spread of two methods, in two tables


@pytest.mark.slow
def test_a_study_goes_on_and_grows_without_doing_anything_twice(labels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = noted(monkeypatch, labels, trains=True)
    words = (
        "--fractions",
        "[0.1, 1.0]",
        "--validations",
        1,
        "--methods",
        "[linear, fine-tuned, distilled, supervised]",
    )
    done("study", "labels", *SMOKE, *words, "--seeds", 2, "--out", labels)
    assert ran == []
    done("study", "labels", *SMOKE, *words, "--seeds", 3, "--out", labels)
    folders = [f"fraction-{f}/seed-2/{stage}" for f in ("0.1", "1") for stage in _STAGES]
    assert ran == folders
    assert len(lines_of(labels / "rows.csv")) == 3 * 2 * 4


_STAGES = ("linear", "finetune", "distill", "supervised")


def test_a_folder_of_another_recipe_is_refused(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*map(str, SMALL), "--seeds", "1", "--finetune.optim.lr", "0.02")
    assert main(["study", "labels", *SMOKE, *words, "--out", str(small)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "holds a run of another recipe" in error and "lr" in error


def test_results_of_another_pretraining_are_refused(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*map(str, SMALL), "--seeds", "1", "--pretrainings", "each")
    assert main(["study", "labels", *SMOKE, *words, "--out", str(small)]) == 1
    assert "started from: pretrain -> seed-0/pretrain" in capsys.readouterr().err.splitlines()[-1]
    assert not (small / "seed-0").exists()


def test_curves_end_with_the_result_and_know_when_they_pass(small: Path) -> None:
    rows = [row(1.0, "supervised", 0, 0.9, run="fraction-1/seed-0/supervised")]
    (curve,) = read_curves(rows, small)
    records = read_records(small / "fraction-1/seed-0/supervised/metrics.jsonl")
    trained = [record for record in records if record["kind"] == "train"]
    assert curve.columns["epoch"][-1] == 1 and curve.columns["val_top1"][-1] == 0.9
    assert curve.columns["seconds"][-1] == pytest.approx(trained[-1]["trained_s"])
    assert [x for x in curve.columns["loss"] if x == x] == [record["loss"] for record in trained]
    assert curve.passes(0.89) == (1, pytest.approx(trained[-1]["trained_s"])) and curve.passes(0.9) is None


@pytest.mark.parametrize("trains", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "words", "trainings", "said"),
    [
        ("augment", ("--views.size", 32, "--ops", "[noise]"), 2, "| noise | noise |"),
        ("batch", ("--batches", "[8]", "--epochs", "[1]"), 2, "| 8 | 1 |"),
        ("head", ("--layers", "[1]"), 3, "| 1 | 1 |"),
        ("size", ("--archs", "[resnet18]", "--widths", "[0.125]"), 4, "| R18-0.125x |"),
    ],
)
def test_the_other_studies_run_by_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    words: tuple[object, ...],
    trainings: int,
    said: str,
    trains: bool,
) -> None:
    ran = noted(monkeypatch, tmp_path, trains=trains)
    done("study", name, *SMOKE, *words, "--seeds", 1, "--out", tmp_path)
    assert len(ran) == trainings and said in (tmp_path / "table.md").read_text()
    assert len(lines_of(tmp_path / "rows.csv")) == trainings - 1 and (tmp_path / "plot.png").is_file()


def test_transfer_starts_from_a_run(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = noted(monkeypatch, tmp_path, trains=False)
    words = ("--from", small / "pretrain", "--to", f"[{tmp_path / 'shades'}]", "--seeds", 1)
    done("study", "transfer", *words, "--finetune.batch", 4, "--supervised.batch", 4, "--out", tmp_path / "moved")
    assert [path.rpartition("/")[2] for path in ran] == ["knn", "linear", "finetune", "supervised"]
    assert [entry["method"] for entry in lines_of(tmp_path / "moved/rows.csv")] == _TRANSFERS


_TRANSFERS = ["kNN", "linear", "fine-tuned", "supervised"]


@pytest.mark.slow
def test_transfer_measures_other_folders(small: Path, tmp_path: Path) -> None:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("test", 4)):
        for name in ("dark", "bright"):
            folder = tmp_path / "shades" / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                shade = torch.randint(0, 100, (20, 20, 3), generator=generator) + (150 if name == "bright" else 0)
                Image.fromarray(shade.to(torch.uint8).numpy()).save(folder / f"{k}.png")
    words = ("--from", small / "pretrain", "--to", f"[{tmp_path / 'shades'}]", "--seeds", 1)
    done("study", "transfer", *words, "--finetune.batch", 4, "--supervised.batch", 4, "--out", tmp_path / "moved")
    rows = lines_of(tmp_path / "moved/rows.csv")
    assert [entry["method"] for entry in rows] == _TRANSFERS
    assert float(rows[1]["top1"]) == 1  # dark and bright, of an untrained network or a trained one


def jobs(count: int) -> list[StudyJob]:
    recipe = replace(RECIPE, smoke=True, device="cpu")
    return [StudyJob(name=f"job-{k}", stage="supervised", recipe=replace(recipe, seed=k)) for k in range(count)]


def pretend(monkeypatch: pytest.MonkeyPatch, answer: Callable[[int], dict[str, Any]]) -> None:
    def supervised(setting: stages.Setting, run: Path, resume: bool) -> dict[str, Any]:
        found = answer(setting.recipe.seed)
        run.mkdir(parents=True)
        (run / "result.json").write_text(json.dumps(found))
        return found

    stand_in(monkeypatch, "supervised", supervised)


def test_a_failed_training_costs_itself_and_what_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(seed: int) -> dict[str, Any]:
        if seed == 1:
            raise FloatingPointError("the loss became nan")
        return {"seed": seed}

    pretend(monkeypatch, answer)
    first, second, third = jobs(3)
    needing = StudyJob(name="tuned", stage="finetune", recipe=RECIPE, after=second)
    outcomes = run_jobs([first, second, needing, third], tmp_path, ())
    assert list(outcomes.results) == ["job-0", "job-2"]
    assert outcomes.failed == {"job-1": "FloatingPointError: the loss became nan", "tuned": "job-1 failed"}
    pretend(monkeypatch, lambda seed: {"seed": seed})
    again = run_jobs([first, second, third], tmp_path, ())
    assert sorted(again.results) == ["job-0", "job-1", "job-2"] and again.failed == {}


def test_a_first_training_that_fails_ends_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(seed: int) -> dict[str, Any]:
        raise ValueError("data.root is missing")

    pretend(monkeypatch, answer)
    with pytest.raises(ValueError, match=r"data\.root is missing"):
        run_jobs(jobs(2), tmp_path, ())


def test_a_stop_ends_the_study_and_keeps_the_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(seed: int) -> dict[str, Any]:
        if seed == 1:
            raise Stopped(signal.SIGTERM, "stopped")
        return {}

    pretend(monkeypatch, answer)
    with pytest.raises(Stopped):
        run_jobs(jobs(3), tmp_path, ())
    record = json.loads((tmp_path / "jobs.json").read_text())
    assert set(record) == {"job-0", "job-1"} and all(entry["wall_s"] >= 0 for entry in record.values())
    assert not (tmp_path / "job-2").exists()


def test_a_job_is_a_command_that_anybody_may_give(tmp_path: Path) -> None:
    (job,) = jobs(1)
    job.file(tmp_path).write_text(dump_recipe(job.recipe))
    done(*job.command(tmp_path))
    assert run_jobs([job], tmp_path, ()).results["job-0"]["stage"] == "supervised"


def test_side_by_side_each_has_its_own_gpu_and_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen, given = subprocess.Popen, dict[str, str | None]()

    def start(words: list[str], **options: Any) -> subprocess.Popen[bytes]:
        assert words[1:4] == ["-m", "fastsimclr", "supervised"]
        run = Path(words[words.index("--out") + 1])
        given[run.name] = options["env"].get("CUDA_VISIBLE_DEVICES")
        recipe = parse_recipe(Path(words[words.index("--config") + 1]).read_text())
        assert (recipe.seed, recipe.device) == (int(run.name[-1]), "cuda") and recipe.data.threads >= 1
        code = f"import os, sys; os.mkdir({str(run)!r}); open({str(run / 'result.json')!r}, 'w').write('{{}}')"
        if run.name == "job-1":
            code = "import sys; print('working', flush=True); sys.exit('error: out of memory')"
        return popen([sys.executable, "-c", code], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    needing = StudyJob(name="tuned", stage="finetune", recipe=RECIPE, after=jobs(2)[1])
    outcomes = run_jobs([*jobs(3), needing], tmp_path, ("3", "5"))
    assert sorted(outcomes.results) == ["job-0", "job-2"] and {given["job-0"], given["job-1"]} == {"3", "5"}
    assert outcomes.failed["job-1"] == f"error: out of memory (see {tmp_path / 'job-1.log'})"
    assert outcomes.failed["tuned"] == "job-1 failed"
    assert (tmp_path / "job-1.log").read_text().startswith("working")
    assert set(outcomes.record) == {"job-0", "job-1", "job-2"}


def test_a_signal_reaches_the_trainings_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def sleeper(words: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **options))
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", sleeper)
    start = time.perf_counter()
    with pytest.raises(Stopped, match="3 trainings to go"):
        run_jobs(jobs(3), tmp_path, (None, None))
    assert time.perf_counter() - start < 60
    assert [process.returncode for process in started] == [-signal.SIGTERM, -signal.SIGTERM]


@pytest.mark.parametrize(
    ("study", "settings", "message"),
    [
        (LabelsStudy, {"fractions": (0.5, 1.5)}, "--fractions .* must be above 0 and up to 1"),
        (LabelsStudy, {"fractions": (0.5, 0.5)}, "each once"),
        (LabelsStudy, {"finetune_epochs": (5,)}, "--finetune_epochs .* must be 3 numbers"),
        (LabelsStudy, {"seeds": 0}, "--seeds 0 must be at least 1"),
        (HeadStudy, {"layers": (5,)}, "--layers .* must be 1 to 4"),
        (TransferStudy, {"to": ()}, "--to .* must name one value or more"),
        (TransferStudy, {"to": ("a/x", "b/x")}, "each once"),
    ],
)
def test_bad_settings_are_refused(study: type[Study], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study(**settings)


@pytest.mark.parametrize(
    ("device", "side_by_side", "visible", "places"),
    [
        ("auto", 0, None, ("0", "1")),
        ("cuda", 3, None, ("0", "1", "0")),
        ("auto", 0, "5,7", ("5", "7")),
        ("cuda:1", 0, "5,7", ("7",)),
        ("cpu", 0, None, ()),
        ("cpu", 2, None, (None, None)),
    ],
)
def test_each_training_has_one_gpu(
    device: str,
    side_by_side: int,
    visible: str | None,
    places: tuple[str | None, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert slots_of(replace(RECIPE, device=device), side_by_side) == places
    with pytest.raises(ValueError, match="2 GPUs are visible here"):
        slots_of(replace(RECIPE, device="cuda:2"), 0)


def test_a_study_of_which_nothing_can_be_shown_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(setting: stages.Setting, start: Path, run: Path, resume: bool) -> dict[str, Any]:
        raise ValueError("linear.batch=9 is too large")

    stand_in(monkeypatch, "linear", refused)
    words = ("--batches", "[8]", "--epochs", "[1]", "--seeds", "1", "--out", str(tmp_path / "batch"))
    assert main(["study", "batch", *SMOKE, *words]) == 1
    assert "failed: batch-8/epochs-1/seed-0/linear: ValueError: linear.batch=9" in capsys.readouterr().out
    assert not (tmp_path / "batch/plot.png").exists()


def test_two_jobs_of_one_name_must_be_one() -> None:
    first, second = jobs(2)
    with pytest.raises(ValueError, match="two jobs are called job-0"):
        in_order([first, replace(second, name="job-0")])
