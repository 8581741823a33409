"""The benches of training at smoke size: step, e2e and scaling; their FLOP, parts, picture and trace."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastsimclr.bench import baseline, ours, scaling_rank, supervised, training_configs, watched
from fastsimclr.bench.e2e import bench_e2e
from fastsimclr.bench.flops import flops_per_image, peak_flops
from fastsimclr.bench.record import LAST
from fastsimclr.bench.scaling import bench_scaling
from fastsimclr.bench.step import bench_step, synthetic
from fastsimclr.bench.training_configs import E2eBench, ScalingBench, StepBench, TrainingStage
from fastsimclr.cli.main import main
from fastsimclr.loaders import open_data
from fastsimclr.runtime.device import choose_runtime
from fastsimclr.training.step import Step
from fastsimclr.training.trainer import Trainer

PHASES = ["wait", "views", "forward", "loss", "backward", "optimizer", LAST]


@pytest.fixture
def without_lightly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "find_spec", lambda name: None)


def check_report(result: dict[str, Any], bench: str, views: int = 2) -> None:
    """The keys that a reader and `compare` count on, and times that add up."""
    assert result["bench"] == bench and result["kind"] == "cpu" and result["seed"] == 0
    assert {"device", "torch", "commit", "threads", "versions", "processor", "cores"} <= result["environment"].keys()
    assert result["config"]["smoke"] is True and result["checks"]
    for row in result["rows"]:
        (only,) = row["rounds"]
        assert only["seconds"] == pytest.approx(sum(only["step_s"]))
        assert sum(only["phase_s"].values()) == pytest.approx(only["seconds"])
        assert only["images"] == 16 and len(only["step_s"]) == 2 and len(row["warmup"]["step_s"]) == 2
        rate = row["images_per_s"]["median"]
        assert rate == pytest.approx(16 / only["seconds"])
        if row["views_per_s"]:
            assert row["views_per_s"]["median"] == pytest.approx(views * rate)
    assert {r["ours"] for r in result["ratios"]} <= {row["name"] for row in result["rows"] if row["ours"]}
    assert result["ratios"]


@pytest.mark.full
def test_step_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], without_lightly: None) -> None:
    path, profile = tmp_path / "reports" / "step.json", tmp_path / "trace.json"
    files = ["--json", str(path), "--profile", str(profile)]
    assert main(["bench", "step", "--smoke", "--device", "cpu", *files]) == 0
    result = json.loads(path.read_text())
    check_report(result, "step")
    assert [row["name"] for row in result["rows"]] == [
        "ours fp32",
        "ours bf16",
        "plain torch fp32 contiguous (default)",
        "plain torch bf16 channels-last (best)",
    ]
    for row in result["rows"]:
        assert sorted(row["phase_ms"]) == sorted(PHASES)
        # At the start the positives are no nearer than the rest of the 16 views: about log(15).
        assert row["warmup"]["first_loss"] == pytest.approx(math.log(15), abs=0.4)
        assert row["step_ms"]["p50"] <= row["step_ms"]["p90"] <= row["step_ms"]["p99"]
        # One network, one way of counting: both sides do the same.
        assert row["flops_per_image"] == result["rows"][0]["flops_per_image"] > 0
        product = result["reference"]["product_flops"][row["facts"]["precision"]]
        used = row["flops_per_image"] * row["images_per_s"]["median"]
        assert row["gemm_pct"] == pytest.approx(100 * used / product)
        assert row["mfu_pct"] is None  # the peak of a CPU is not in the table
    printed = capsys.readouterr().out
    assert "CPU figures" in printed and "images/s" in printed and "views/s" in printed
    assert "of GEMM %" in printed and "MFU %" not in printed
    assert 'pip install "fastsimclr[bench]"' in printed
    assert baseline.MISSING in result["notes"]
    names = {event.get("name", "") for event in json.loads(profile.read_text())["traceEvents"]}
    assert any("convolution" in name for name in names)


@pytest.mark.full
@pytest.mark.parametrize("stage", ["linear", "finetune"])
def test_step_of_stages_with_one_view(stage: TrainingStage) -> None:
    result = bench_step(StepBench(device="cpu", smoke=True, stage=stage))
    check_report(result, "step", views=1)
    mine, other = result["rows"][0], result["rows"][2]
    assert other["name"] == "torchvision fp32 contiguous (default)"
    assert mine["facts"]["optimizer"] == ("SGD (Nesterov)" if stage == "linear" else "LARS (google)")
    assert mine["facts"]["parameters"] == other["facts"]["parameters"]
    assert mine["warmup"]["first_loss"] == pytest.approx(math.log(10), abs=0.4)
    # A frozen encoder is gone through once, a trained one about three times as much.
    whole = bench_flops("finetune") / bench_flops("linear")
    assert 2.9 < whole < 3.0
    assert mine["flops_per_image"] == bench_flops(stage)


def bench_flops(stage: TrainingStage) -> int:
    objective = ours.objective_of(StepBench(stage=stage, size=16))
    return flops_per_image(ours.networks_of(objective), 16, objective.views)


@pytest.mark.full
def test_step_of_a_distillation_beside_its_parts() -> None:
    result = bench_step(StepBench(device="cpu", smoke=True, stage="distill"))
    check_report(result, "step", views=1)
    rows = {row["name"]: row for row in result["rows"]}
    whole, student, teacher = (rows[f"ours bf16{part}"] for part in ("", ", student step", ", teacher forward"))
    assert sorted(whole["phase_ms"]) == sorted([*PHASES, "teacher"])
    assert whole["flops_per_image"] == student["flops_per_image"] + teacher["flops_per_image"]
    seconds = [row["rounds"][0]["seconds"] for row in (whole, student, teacher)]
    (found,) = result["derived"]
    assert found["median"] == pytest.approx(seconds[0] / (seconds[1] + seconds[2]))
    # The parts are not the work: no ratio has them.
    assert {r["ours"] for r in result["ratios"]} == {"ours fp32", "ours bf16"}


@pytest.mark.slow
def test_step_compiled_before_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for the compiler counts its calls: all before the rounds, and both sides go through it."""
    calls: list[str] = []

    def compiled(module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda net, _: calls.append(type(net).__name__))

    monkeypatch.setattr(nn.Module, "compile", compiled)
    config = StepBench(device="cpu", smoke=True, modes=("compile",), compiled_baseline=True)
    result = bench_step(config)
    rows = {row["name"]: row for row in result["rows"]}
    assert next(iter(rows)) == "ours bf16 compile" and "ours fp32" not in rows
    theirs = [row for name, row in rows.items() if name.endswith("compiled (best)")]
    assert [row["facts"]["mode"] for row in theirs] == ["compile"]
    for row in rows.values():
        assert ("prepared_s" in row["facts"]) == (row["facts"]["mode"] == "compile")
    # Two steps before, two of warm-up and two that count; lightly's loop sees the views one after the other.
    assert calls.count("ResNet") == 6 and calls.count("Net") == 12


@pytest.mark.slow
def test_e2e_beside_the_baseline_that_is_there() -> None:
    result = bench_e2e(E2eBench(device="cpu", smoke=True))
    check_report(result, "e2e")
    name = "lightly" if find_spec("lightly") else "plain torch"
    theirs = [row for row in result["rows"] if not row["ours"]]
    assert [row["name"].startswith(name) for row in theirs] == [True, True]
    assert [row["facts"]["precision"] for row in theirs] == ["fp32", "bf16"]
    # The shift of the last BN, one number for each output of the head, is all that theirs has more.
    ((mine, other),) = (v for k, v in result["checks"].items() if k.startswith("parameters"))
    assert other - mine == ours.HEAD_DIM
    assert "comparable" in result["checks"]["losses"]
    rows = {row["name"]: row for row in result["rows"]}
    for loader, derived in zip(("resident", "native"), result["derived"], strict=True):
        name = f"ours {choose_runtime('cpu', 'auto', True).precision} {loader}"
        whole, step, alone = (rows[key] for key in (name, f"{name}, step alone", f"ours {loader}, loader alone"))
        assert step["data_wait_pct"] <= 100 and alone["loss"] is None
        seconds = [row["rounds"][0]["seconds"] for row in (whole, alone, step)]
        assert derived["name"].startswith(loader)
        assert derived["median"] == pytest.approx((seconds[1] + seconds[2]) / seconds[0])


@pytest.mark.full
def test_e2e_of_a_labelled_stage(without_lightly: None) -> None:
    config = E2eBench(device="cpu", smoke=True, stage="finetune", loaders=("native",))
    result = bench_e2e(config)
    check_report(result, "e2e", views=1)
    theirs = [row["name"] for row in result["rows"] if not row["ours"]]
    assert theirs == ["torchvision fp32 contiguous (default)", "torchvision bf16 channels-last (best)"]
    assert baseline.MISSING not in result["notes"]


@pytest.mark.slow
def test_scaling_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scaling.json"
    options = "--smoke --device cpu --precision fp32 --threads 1 --stage finetune"
    words = ["bench", "scaling", *options.split(), "--json"]
    assert main([*words, str(path)]) == 0
    result = json.loads(path.read_text())
    rows = result["rows"]
    assert [(row["facts"]["ranks"], row["facts"]["exchanges"]) for row in rows] == [
        (1, scaling_rank.ALL),
        (2, scaling_rank.ALL),
        (2, scaling_rank.UNAVERAGED),
        (2, scaling_rank.NONE),
    ]
    for row in rows:
        (only,) = row["rounds"]
        assert only["images"] == 16 * row["facts"]["ranks"] and sorted(row["phase_ms"]) == sorted(PHASES)
        assert row["images_per_s"]["median"] == pytest.approx(only["images"] / only["seconds"])
    one, two, unaveraged, none = (row["rounds"][0]["seconds"] for row in rows)
    efficiency, gradients, rest = result["derived"]
    assert efficiency["median"] == pytest.approx(one / two)  # each rank has as many images
    assert gradients["median"] == pytest.approx(1e3 * (two - unaveraged) / 2)
    assert rest["median"] == pytest.approx(1e3 * (unaveraged - none) / 2)
    assert result["checks"]["threads a rank, of cores"][0] == 1 and result["checks"]["losses"] == "all finite"
    assert "not how a cluster scales" in capsys.readouterr().out


@pytest.mark.full
def test_scaling_says_why_its_ranks_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ScalingBench(device="cpu", smoke=True)
    monkeypatch.setattr("fastsimclr.bench.scaling.asdict", lambda config: {"batch": 0})
    with pytest.raises(RuntimeError, match=r"ranks=1 failed.*batch=0 must be 1 or more"):
        bench_scaling(config)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_peak_is_that_of_the_module(device: str, peak: float | None) -> None:
    assert peak_flops(device) == peak


@pytest.mark.slow
def test_flops_are_those_of_the_paper() -> None:
    """ResNet-50 at 224 px has 4.1 G multiply-adds (torchvision); the stem passes no gradient to the image."""
    net = ours.classifier("resnet50", 224, 1000, 0)
    back_to_image = 2 * 64 * 3 * 49 * 112 * 112
    assert flops_per_image([net], 224, 2) == 2 * (3 * 2 * 4089184256 - back_to_image)
    assert flops_per_image([net.requires_grad_(False)], 224, 1) == 2 * 4089184256


@pytest.mark.slow
def test_same_classifier_refuses_another_network() -> None:
    supervised.same_classifier(ours.classifier("resnet18", 16, 10, 0), 16, "resnet18")
    with pytest.raises(ArithmeticError, match="other shapes"):
        supervised.same_classifier(ours.classifier("resnet34", 16, 10, 0), 16, "resnet18")
    changed = ours.classifier("resnet18", 16, 10, 0)
    changed.encoder.maxpool = nn.MaxPool2d(2)
    with pytest.raises(ArithmeticError, match="same weights and views"):
        supervised.same_classifier(changed, 16, "resnet18")


def test_distillations_of_both_sides_have_one_loss() -> None:
    config = StepBench(stage="distill", size=16, teacher="resnet18")
    objective = ours.objective_of(config).train()
    student, teacher = ours.networks_of(objective)
    rival = supervised.supervised(config)
    for mine, other in zip((student, teacher), rival.networks, strict=True):
        head = {f"fc.{name}": value for name, value in mine.get_submodule("classifier").state_dict().items()}
        other.load_state_dict(mine.get_submodule("encoder").state_dict() | head)
    views, labels = torch.randn(8, 3, 16, 16), torch.zeros(8, dtype=torch.int64)
    loss = rival.loss(*rival.forward((views, labels), lambda phase: None))
    expected = objective(views, labels).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_graph_needs_a_gpu() -> None:
    for bench, config in (
        (bench_step, StepBench(device="cpu", smoke=True, modes=("eager", "graph"))),
        (bench_e2e, E2eBench(device="cpu", smoke=True, mode="graph")),
        (bench_scaling, ScalingBench(device="cpu", smoke=True, mode="graph")),
    ):
        with pytest.raises(ValueError, match="graph needs a CUDA device, not cpu"):
            bench(config)  # type: ignore[operator]


@pytest.mark.slow
def test_a_graph_is_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off CUDA: the step that a graph would hold, as it is. It is made once, for all rounds."""
    made: list[object] = []

    def graphed(step: Step, network: nn.Module) -> Step:
        made.append(step)
        return step

    monkeypatch.setattr("fastsimclr.training.trainer.GraphedStep", graphed)
    monkeypatch.setattr(Trainer, "_prepare", lambda self: None)
    config = StepBench(device="cpu", smoke=True, stage="linear").at_smoke_size()
    runtime, data = choose_runtime("cpu", "fp32", True), synthetic(config, config.batch)
    batches = watched.loading(open_data(data).unlabelled, None, runtime, config, replace(data, loader="native"))
    contestant = watched.trained("graph", runtime, config, batches, mode="graph")
    assert contestant.prepare is not None and contestant.prepare() > 0
    for _ in range(2):
        done = contestant.run()
        assert list(done.phase_s) == ["wait", "views", "graph", "optimizer", LAST]
        assert (done.images, len(done.step_s)) == (16, 2) and done.loss == pytest.approx(math.log(10), abs=0.4)
    assert len(made) == 1


def test_pictures_are_refused_before_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"ends in \.png, \.pdf or \.svg"):
        StepBench(plot="picture.jpeg")
    monkeypatch.setattr(training_configs, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'needs matplotlib.*pip install "fastsimclr\[bench\]"'):
        StepBench(plot="picture.png")


@pytest.mark.full
@pytest.mark.needs("matplotlib")
def test_picture(tmp_path: Path, without_lightly: None) -> None:
    path = tmp_path / "pictures" / "step.png"
    assert main(["bench", "step", "--smoke", "--device", "cpu", "--stage", "linear", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
