"""`fastsimclr plan`: counts of known networks, formulas against numbers worked out by hand, fits, and refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsimclr.bench.grid import GridBench
from fastsimclr.cli.main import CONFIGS, main
from fastsimclr.models import BatchNorm, ModelConfig, build_simclr
from fastsimclr.planning import published
from fastsimclr.planning.check import check
from fastsimclr.planning.estimate import (
    StepPlan,
    StepTime,
    at_once,
    counted_for,
    memory,
    norm_bytes,
    norm_s,
    shares_of,
    step_time,
)
from fastsimclr.planning.hardware import GPUS, Cluster, PlanOptions
from fastsimclr.planning.rates import Measured, Rates, fit, nonnegative, rates_of, read_reports
from fastsimclr.planning.schedule import images_of, spans
from fastsimclr.planning.work import Counted, Work, _Tally, count, count_norms
from fastsimclr.recipe import Recipe, parse_recipe
from fastsimclr.training.config import TrainerConfig

R50 = ModelConfig(arch="resnet50", head_layers=2)
R18 = ModelConfig(arch="resnet18", head_layers=2)
REPORT = Path(__file__).parents[2] / "docs" / "results" / "plan-cpu.json"
FLOPS_ONLY = Rates(s_per_flop=1e-14, s_per_byte=0.0, s_per_op=0.0, origin="test")


def counted(model: ModelConfig, size: int, views: int = 2, layer: int | None = None) -> Counted:
    return count(model, size=size, views=views, precision="bf16", stem_size=size, layer=layer)


def recipe(name: str, **changes: Any) -> Recipe:
    return replace(parse_recipe((CONFIGS / f"{name}.yaml").read_text()), **changes)


# He et al. 2015, Table 1 gives 3.8 GFLOP for ResNet-50 with the stride on the 1x1; on the 3x3 (v1.5) it is 4.1.
@pytest.mark.parametrize(
    ("model", "size", "gmac"),
    [
        (R50, 224, 4.09),
        (R18, 32, 0.557),
        (ModelConfig(arch="resnet18", head_layers=2), 224, 1.81),
        pytest.param(ModelConfig(arch="resnet152", head_layers=2), 224, 11.5, marks=pytest.mark.slow),
    ],
)
def test_multiply_adds_of_known_networks(model: ModelConfig, size: int, gmac: float) -> None:
    encoder = replace(model, head_layers=0)
    assert counted(encoder, size).forward.flops / 2 / 2e9 == pytest.approx(gmac, rel=5e-3)


def test_a_convolution_by_hand() -> None:
    """3 to 8 channels, 3 x 3, at 4 x 4 pixels, two views: 2·27 operations an output; each tensor moves once."""
    with torch.device("meta"):
        convolution, images = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.empty(2, 3, 4, 4)
    with _Tally() as forward:
        out = convolution(images).flatten(1)  # a view, which is no work
    assert forward.work == Work(flops=2 * 27 * 2 * 8 * 16, bytes=4 * (2 * 3 * 16 + 8 * 27 + 2 * 8 * 16), ops=1)
    with _Tally() as backward:
        out.backward(torch.empty_like(out))
    assert backward.work.flops == forward.work.flops  # of the weight; the images need no gradient


def test_backward_counts_twice_the_forward_but_for_the_images() -> None:
    """Of each product the gradients of weight and input; the first convolution's input needs none."""
    found = counted(R50, 224)
    stem = 2 * 2 * 49 * 3 * 64 * 112 * 112  # two views
    assert found.backward.flops == 2 * found.forward.flops - stem
    assert (found.forward + found.backward).flops / 2 / 1e9 == pytest.approx(24.4, abs=0.2)  # "24.3 to 24.7"


def test_counts_grow_with_the_views_and_not_with_the_batch_otherwise() -> None:
    two, four, eight = (counted(R18, 32, views) for views in (2, 4, 8))
    assert eight.forward.flops == 4 * two.forward.flops
    assert eight.saved_bytes - four.saved_bytes == pytest.approx(2 * (four.saved_bytes - two.saved_bytes), rel=1e-3)
    assert eight.forward.ops == two.forward.ops
    whole = (counted(R18, 32, views).backward.bytes for views in (2, 4, 8))
    a, b, c = whole
    assert c - b == pytest.approx(2 * (b - a), rel=1e-6)  # what is fixed is reading and writing the weights


def test_parameters_and_norms() -> None:
    found = counted(R50, 224)
    assert found.parameters == 27_968_704  # 23,508,032 + 2048·2048 + 2·2048 + 2048·128 + 128
    with torch.device("meta"):
        network = build_simclr(R50, 224)
    assert count_norms(network.encoder) == (53, 26_560)
    assert count_norms(network) == (found.norms, found.channels) == (55, 26_560 + 2_048 + 128)


def test_saved_bytes_are_those_of_autograd() -> None:
    """What a real forward pass saves, counted by its own hooks on real memory."""
    torch.manual_seed(0)
    network = build_simclr(replace(R18, width=0.25), 32)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    seen: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    images = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(images)
    found = count(replace(R18, width=0.25), size=32, views=8, precision="fp32", stem_size=32)
    assert found.saved_bytes == pytest.approx(sum(seen.values()), rel=0.02)
    assert found.largest_bytes == 8 * 16 * 32 * 32 * 4


def test_recomputed_blocks_keep_less() -> None:
    found = counted(R50, 224, 16)
    entering = 16 * 2 * (64 * 56**2 + 3 * 256 * 56**2 + 4 * 512 * 28**2 + 6 * 1024 * 14**2 + 2 * 2048 * 7**2)
    assert found.largest_bytes + entering * 0.9 < found.kept_bytes < 0.6 * found.saved_bytes


def test_bytes_on_the_wire_at_128_ranks() -> None:
    """2·127/128·4·27.97 M = 222 MB of gradients; 127·8·26,560 = 27.0 MB of BN statistics, at 8 ranks 1.5."""
    cluster = Cluster(gpus=128)
    assert cluster.all_reduce_bytes(4.0 * counted(R50, 224).parameters, 128) == pytest.approx(222e6, rel=1e-3)
    assert cluster.all_gather_bytes(2 * 4096 * 128 * 2, 128) == pytest.approx(127 / 128 * 2 * 4096 * 128 * 2)
    assert norm_bytes(26_560, 128, cluster)[0] == pytest.approx(27e6, rel=1e-3)
    assert norm_bytes(26_560, 8, cluster) == (pytest.approx(1.5e6, rel=0.01), 2 * 7 / 8 * 8 * 26_560)
    only = replace(counted(R50, 224), norms=53, channels=26_560)
    fast = replace(cluster, device=replace(GPUS["H100"], link_gb_s=1e9, network_gb_s=1e9))
    assert norm_s(only, 128, 1, fast) == pytest.approx(106 * 30e-6, rel=1e-3)  # 3.2 ms of waiting
    slow = replace(fast, collective_us=1e-9, device=replace(GPUS["H100"], link_gb_s=1, network_gb_s=0.125))
    moved = 127 * 8 * 26_560 + 2 * 127 / 128 * 8 * 26_560
    assert norm_s(only, 128, 1, slow) == pytest.approx(moved / 0.8e9, rel=1e-6)


def test_a_step_by_hand() -> None:
    """ResNet-50, 16 H100 on two machines, 64 images each, BN over machines."""
    cluster, trainer = Cluster(device=GPUS["H100"], gpus=16), TrainerConfig(bn_groups="node")
    step = StepPlan(model=R50, size=224, stem_size=224, batch=1024, views=2, precision="bf16")
    found = step_time(step, trainer, cluster, FLOPS_ONLY, 2000.0)
    net = counted(R50, 224, 128)
    flops = net.forward.flops + net.backward.flops + 6 * 128 * 2048 * 128
    assert found.compute_s == pytest.approx(1e-14 * flops)
    ring = 0.8e9 * min(450, 8 * 50)
    assert found.all_reduce_s == pytest.approx(2 * 15 / 16 * 4 * net.parameters / ring)
    within = 0.8e9 * 450
    assert found.norm_s == pytest.approx(110 * 30e-6 + (7 * 8 + 2 * 7 / 8 * 8) * net.channels / within)
    assert found.gather_s == pytest.approx(2 * 30e-6 + 15 / 16 * 2 * 1024 * (128 * 2 + 4) / ring)
    assert found.input_s == 1024 / 2 / 2000.0
    assert found.seconds == found.input_s and found.bound == "input"
    fed = step_time(step, trainer, cluster, FLOPS_ONLY)
    assert fed.seconds == pytest.approx(max(fed.compute_s, fed.all_reduce_s) + fed.norm_s + fed.gather_s)


@pytest.mark.parametrize(
    ("parts", "bound", "seconds"),
    [
        ({"compute_s": 3.0, "all_reduce_s": 2.0, "norm_s": 0.5, "gather_s": 0.5}, "compute", 4.0),
        ({"compute_s": 2.0, "all_reduce_s": 3.0, "norm_s": 0.5}, "all-reduce", 3.5),
        ({"compute_s": 2.0, "all_reduce_s": 3.0, "overlapped": False}, "all-reduce", 5.0),
        ({"compute_s": 1.0, "norm_s": 1.0, "gather_s": 0.25}, "BN and gather", 2.25),
        ({"compute_s": 1.0, "input_s": 2.0}, "input", 2.0),
    ],
)
def test_the_bound_is_what_takes_longest(parts: dict[str, Any], bound: str, seconds: float) -> None:
    time = StepTime(images=1, **parts)
    assert (time.bound, time.seconds) == (bound, seconds)


@pytest.mark.parametrize(
    ("groups", "gpus", "ranks"),
    [("global", 64, 64), ("node", 64, 8), ("node", 4, 4), ("rank", 64, 1), (4, 64, 16), (128, 64, 1)],
)
def test_ranks_that_share_statistics(groups: Any, gpus: int, ranks: int) -> None:
    assert shares_of(TrainerConfig(bn_groups=groups), Cluster(gpus=gpus)) == ranks


def test_gradient_caching_and_recomputation_cost_a_forward_pass_each() -> None:
    cluster = Cluster(gpus=8)
    step = StepPlan(model=R18, size=64, stem_size=64, batch=512, views=2, precision="bf16")
    times = {
        (micro, again): step_time(
            step, TrainerConfig(micro_batch=micro, checkpoint_activations=again), cluster, FLOPS_ONLY
        )
        for micro in (None, 16)
        for again in (False, True)
    }
    net, loss = counted(R18, 64, 128), 6 * 128 * 1024 * 128
    for (micro, again), found in times.items():
        forwards = 1 + (micro is not None) + again
        assert found.compute_s == pytest.approx(1e-14 * (forwards * net.forward.flops + net.backward.flops + loss))
        assert found.overlapped is (micro is None)
    whole, parts = times[None, False].norm_s, times[16, False].norm_s
    assert parts == pytest.approx(4 * 1.5 * whole, rel=0.2)  # four micro-batches, two forward exchanges for one


def test_a_queue_costs_a_forward_pass_a_network_and_its_keys() -> None:
    """Four GPUs, 128 images each: 256 rows against 1,024 columns, and the queue."""
    cluster, trainer = Cluster(gpus=4), TrainerConfig()
    step = StepPlan(model=R18, size=64, stem_size=64, batch=512, views=2, precision="bf16")
    plain, found = (step_time(one, trainer, cluster, FLOPS_ONLY) for one in (step, replace(step, memory=65536)))
    net = counted(R18, 64, 256)
    more = net.forward.flops + 6 * 256 * 65536 * 128
    assert found.compute_s - plain.compute_s == pytest.approx(1e-14 * more)
    assert plain.norm_s < found.norm_s < 2 * plain.norm_s and found.gather_s > plain.gather_s
    less, held = (memory(one, trainer, cluster, 2.0) for one in (step, replace(step, memory=65536)))
    assert held.weights == 2 * less.weights and held.loss - less.loss == 65536 * 128 * (4 + 2)
    assert held.total - less.total == pytest.approx(4 * net.parameters + 65536 * 128 * 6)


def test_without_a_head_the_loss_has_the_encoders_features() -> None:
    """Four GPUs, 128 images each, 512 features: in the products, the gather, the queue and what is held."""
    cluster, trainer = Cluster(gpus=4), TrainerConfig()
    step = StepPlan(model=replace(R18, head_layers=0), size=64, stem_size=64, batch=512, views=2, precision="bf16")
    kept = replace(step, memory=4096)
    net = counted(step.model, 64, 256)
    assert net.dim == 512 and counted(R18, 64, 256).dim == 128
    plain, found = (step_time(one, trainer, cluster, FLOPS_ONLY) for one in (step, kept))
    assert plain.compute_s == pytest.approx(1e-14 * (net.forward.flops + net.backward.flops + 6 * 256 * 1024 * 512))
    assert found.compute_s - plain.compute_s == pytest.approx(1e-14 * (net.forward.flops + 6 * 256 * 4096 * 512))
    ring = 0.8e9 * 450
    assert plain.gather_s == pytest.approx(2 * 30e-6 + 3 / 4 * 1024 * (512 * 2 + 4) / ring)
    assert found.gather_s == pytest.approx(2 * 30e-6 + 3 / 4 * 1024 * 512 * 6 / ring)
    less, held = (memory(one, trainer, cluster, 2.0).loss for one in (step, kept))
    assert (less, held - less) == (1024 * 512 * 6, 4096 * 512 * 6)
    alone = Measured(
        model=step.model, size=64, batch=128, precision="bf16", seconds=1.0, device="", kind="", mode="", held_out=False
    )
    assert alone.work().flops == net.forward.flops + net.backward.flops + 6 * 256 * 256 * 512


def test_memory_by_hand() -> None:
    trainer, cluster = TrainerConfig(), Cluster(gpus=8)
    step = StepPlan(model=R50, size=224, stem_size=224, batch=2048, views=2, precision="bf16")
    held = memory(step, trainer, cluster, 2.0)
    net = counted_for(step, 256)
    assert held.weights == held.momentum == held.gradients == 4 * net.parameters
    assert held.half_weights == 2 * net.parameters
    assert held.activations == net.saved_bytes + 2 * net.largest_bytes
    assert held.views == 512 * 3 * 224 * 224 * 2 and held.workspace == 2 * 2**30
    assert held.total == pytest.approx(sum(vars(held).values()))
    small = memory(step, replace(trainer, micro_batch=32, checkpoint_activations=True), cluster, 2.0)
    assert small.activations < held.activations / 10 and small.views == held.views


def test_fits_find_rates_again_and_none_is_negative() -> None:
    works = [Work(flops=f * 1e9, bytes=b * 1e6, ops=o) for f, b, o in ((1, 9, 80), (4, 2, 90), (9, 5, 50), (2, 2, 300))]
    true = Rates(s_per_flop=2e-12, s_per_byte=3e-10, s_per_op=4e-6, origin="")
    found = fit(works, [true.seconds(work) for work in works], "here")
    assert [found.s_per_flop, found.s_per_byte, found.s_per_op] == pytest.approx([2e-12, 3e-10, 4e-6], rel=1e-6)
    x = np.array([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
    assert nonnegative(x, np.array([0.5, 1.6, 2.7]))[1] == 0.0  # a free fit gives 1.1 x - 0.6
    assert nonnegative(x, np.array([0.5, 1.6, 2.7]))[0] == pytest.approx((0.5 + 3.2 + 8.1) / 14)
    with pytest.raises(ValueError, match="2 configurations"):
        fit(works[:2], [1.0, 2.0], "here")


def measured(**changes: Any) -> Measured:
    one = Measured(
        model=R18,
        size=32,
        batch=8,
        precision="fp32",
        seconds=1.0,
        device="NVIDIA H100 80GB HBM3",
        kind="cuda",
        mode="eager",
        held_out=False,
    )
    return replace(one, **changes)


def test_one_measurement_scales_the_prior() -> None:
    prior = published.prior(GPUS["H100"], "PyTorch")
    one = measured()
    rates = rates_of([one], prior)
    assert rates.seconds(one.work()) == pytest.approx(1.0)
    assert rates.s_per_op / prior.s_per_op == pytest.approx(rates.s_per_flop / prior.s_per_flop)
    with pytest.raises(ValueError, match="too few"):
        rates_of([one], None)
    with pytest.raises(ValueError, match="2 devices"):
        rates_of([one, measured(device="NVIDIA H200")], prior)


@pytest.mark.slow
def test_the_check_can_fail() -> None:
    """Steps made from rates are predicted; a held-out step that is twice as long is not."""
    true = Rates(s_per_flop=1e-11, s_per_byte=1e-10, s_per_op=1e-5, origin="")
    seen = [measured(batch=batch, size=size) for batch, size in ((4, 32), (8, 32), (8, 16), (16, 24))]
    kept = measured(batch=12, size=32, held_out=True)
    rows = [replace(one, seconds=true.seconds(one.work())) for one in (*seen, kept)]
    text, good = check(rows)
    assert good and "held out: 1" in text and "kept" in text
    text, good = check([*rows[:-1], replace(rows[-1], seconds=2 * rows[-1].seconds)])
    assert not good and "MISSED" in text and "-50.0%" in text
    with pytest.raises(ValueError, match="0 held out"):
        check(rows[:-1])


@pytest.mark.slow
def test_the_law_of_published_speeds() -> None:
    found = published.law()
    assert found.a > 1 and found.b >= 0 and found.c >= 0 and found.pytorch > 1
    errors = {point.name: published.predicted(point) / point.views_s - 1 for point in published.POINTS}
    fitted = [errors[point.name] for point in published.POINTS if point.role == "fitted"]
    assert max(map(abs, fitted)) < 0.15 and abs(errors["DeepLearningExamples, A100"]) < 0.01
    assert published.POINTS[0].views_s == 7_160
    # Hours given for a run come out as a rate: 2·1,281,167·100 views / 43,200 s / 8.
    ffcv = next(point for point in published.POINTS if point.name == "FFCV-SSL, 8 A100")
    assert ffcv.views_s == pytest.approx(741.4, abs=0.1)


@pytest.mark.slow
def test_hours_of_every_stage() -> None:
    options = PlanOptions(gpus=16, gpu="H100")
    made = recipe("v1-paper")
    found = spans(made, images_of(made, options), options.cluster, FLOPS_ONLY, "bf16", None)
    names = [span.stage for span in found]
    assert names == ["pretrain", "knn, and untrained", "linear", "supervised", "finetune", "distill"]
    assert [span.steps for span in found if span.stage in ("pretrain", "linear", "finetune", "distill")] == [
        312_785,
        28_151,
        188,
        125_114,
    ]
    own = replace(made.distill, self_first=True, teacher_view="fixed")
    more = spans(replace(made, distill=own), images_of(made, options), options.cluster, FLOPS_ONLY, "bf16", None)
    recorded = "self-distill, teacher's logits", "self-distill", "distill, teacher's logits", "distill"
    assert [span.stage for span in more] == [*names[:-1], *recorded]
    # Without a teacher in the step it is shorter; to record it is one pass, of 400 epochs.
    assert more[-1].time.seconds < found[-1].time.seconds and more[-2].hours < more[-1].hours / 100
    first = found[0]
    assert first.hours == pytest.approx(312_785 * first.time.seconds / 3600)
    grown = replace(made, pretrain=replace(made.pretrain, sizes=((0.0, 160), (0.5, 192), (0.8, 224))))
    parts = spans(grown, images_of(grown, options), options.cluster, FLOPS_ONLY, "bf16", None)[:3]
    assert [part.size for part in parts] == [160, 192, 224]
    assert sum(part.steps for part in parts) == 312_785 and parts[0].steps == 156_393
    assert parts[0].time.compute_s < parts[1].time.compute_s < parts[2].time.compute_s == first.time.compute_s


@pytest.mark.parametrize(
    ("name", "options", "images"),
    [
        ("cifar10_r18", {}, (50_000, 50_000, 500, True)),
        ("stl10_r18", {}, (105_000, 5_000, 500, True)),
        ("v1-paper", {}, (1_281_167, 1_281_167, 12_812, False)),
        ("imagenet100_r18", {"images": 126_000}, (126_000, 126_000, 1_260, False)),
        ("digits", {}, (1_438, 1_438, 20, True)),
    ],
)
def test_images_of_a_recipe(name: str, options: dict[str, int], images: tuple[int, int, int, bool]) -> None:
    found = images_of(recipe(name), PlanOptions(**options))
    assert (found.unlabelled, found.labelled, found.few, found.held) == images


@pytest.mark.slow
def test_the_command_on_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "digits"]) == 0
    out = capsys.readouterr().out
    assert "predicted, not measured" in out and "fits in 80 GiB" in out and "supervised" in out


@pytest.mark.slow
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config", "cifar10_r18", "--gpus", "2", "--gpu", "A100", "--pretrain.epochs", "100"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "2 A100" in out and "predicted, not measured" in out and "fits" in out
    assert re.search(r"pretrain +32 +512 +9,766 ", out) and "11.50 M parameters" in out
    for key in ("mfu", "collective_us", "ring_efficiency", "link_gb_s", "workspace_gib", "peak_tflops"):
        assert f"({key})" in out or f", {key})" in out
    assert main([*words, "--mfu", "0.5", "--collective_us", "1000000"]) == 0
    out = capsys.readouterr().out
    assert "given: MFU 0.5" in out and re.search(r"pretrain .* BN and gather", out)


@pytest.mark.slow
def test_the_published_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "check"]) == 0
    out = capsys.readouterr().out
    assert all(point.name in out for point in published.POINTS) and "7,160" in out


@pytest.mark.slow
def test_our_own_measurements_are_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    """The report in docs: every configuration that its fit did not see is predicted within 25 %."""
    rows = read_reports([str(REPORT)])
    assert sum(row.held_out for row in rows) >= 6 and sum(not row.held_out for row in rows) >= 6
    assert main(["plan", "check", "--measured", str(REPORT)]) == 0
    assert "a CPU's steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--gpus", "4"], ["--config"]),
        (["--config", "v1-paper", "--gpus", "0"], ["gpus=0", "greater than 0"]),
        pytest.param(
            ["--config", "v1-paper", "--gpus", "7"],
            ["pretrain", "batch=4096", "7 GPUs", "4095"],
            marks=pytest.mark.slow,
        ),
        (["--config", "v1-paper", "--mfu", "1.5"], ["mfu=1.5", "share"]),
        (["--config", "v1-paper", "--gpu", "B300"], ["gpu", "H100", "B300"]),
        pytest.param(
            ["--config", "v1-paper", "--trainer.micro_batch", "100"],
            ["micro_batch=100", "512", "divisor"],
            marks=pytest.mark.slow,
        ),
        (["--config", "v1-paper", "--trainer.precision", "fp32"], ["trainer.precision=fp32", "--peak_tflops"]),
        pytest.param(
            ["--config", "v1-paper", "--few", "100"], ["finetune.batch=4096", "100 images"], marks=pytest.mark.slow
        ),
        (["--config", "v1-paper", "--measured", "nowhere.json"], ["nowhere.json", "bench grid"]),
        (["--config", "digits", "--measured", str(REPORT)], ["is no H100"]),
        (["check", "--measured", str(REPORT.with_name("loss-cpu.json"))], ["bench loss", "bench grid"]),
        (["nonsense"], ["nonsense"]),
    ],
    ids=lambda value: " ".join(Path(word).name for word in value),
)
def test_wrong_words_are_refused_by_name(
    capsys: pytest.CaptureFixture[str], words: list[str], named: list[str]
) -> None:
    try:
        code = main(["plan", *words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    line = capsys.readouterr().err
    assert code in (1, 2) and line.startswith("error: ") and "Traceback" not in line
    assert [word for word in named if word not in line] == [], line


def test_reports_of_bench_grid(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    assert main(["bench", "grid", "--smoke", "--device", "cpu", "--precision", "fp32", "--json", str(path)]) == 0
    seen, kept = read_reports([str(path)])
    assert (seen.held_out, kept.held_out, seen.batch, kept.batch) == (False, True, 8, 4)
    assert seen.model == ModelConfig(arch="resnet18", width=0.125, head_layers=2) and seen.size == 16
    rows = json.loads(path.read_text())["rows"]
    assert [row["facts"]["parameters"] for row in rows] == [count_of(seen), count_of(kept)]
    assert all(len(row["facts"]["cpu_ms"]) == 2 and min(row["facts"]["cpu_ms"]) > 0 for row in rows)
    report = json.loads(path.read_text())
    for threads, milliseconds in ((1, rows[0]["facts"]["cpu_ms"][1]), (2, rows[0]["step_ms"]["p50"])):
        report["environment"]["threads"] = threads
        path.write_text(json.dumps(report))
        assert read_reports([str(path)])[0].seconds == pytest.approx(milliseconds / 1e3)
    with pytest.raises(ValueError, match="name a configuration twice"):
        GridBench(points=(("resnet18", 1.0, 32, 16),), held_out=(("resnet18", 1.0, 32, 16),))
    with pytest.raises(ValueError, match="2 images or more"):
        GridBench(points=(("resnet18", 1.0, 32, 1),))


def count_of(one: Measured) -> int:
    """Parameters as the plan counts them."""
    return count(one.model, size=one.size, views=2 * one.batch, precision="fp32", stem_size=one.size).parameters


def test_reports_of_bench_step(tmp_path: Path) -> None:
    row = {"ours": True, "step_ms": {"p50": 500.0}, "facts": {"precision": "bf16", "mode": "graph"}}
    report: dict[str, Any] = {
        "bench": "step",
        "kind": "cuda",
        "environment": {"device": "NVIDIA H100 80GB HBM3", "threads": 8},
        "config": {"arch": "resnet18", "size": 32, "batch": 512},
        "rows": [row, row | {"ours": False}, row | {"rival": False}],
    }
    path = tmp_path / "step.json"
    path.write_text(json.dumps(report))
    (found,) = read_reports([str(path)])
    assert (found.model, found.size, found.batch, found.seconds, found.mode) == (R18, 32, 512, 0.5, "graph")
    report["config"]["stage"] = "finetune"
    path.write_text(json.dumps(report))
    with pytest.raises(ValueError, match="stage finetune"):
        read_reports([str(path)])


def test_a_batch_that_ranks_cannot_share() -> None:
    step = StepPlan(model=R18, size=32, stem_size=32, batch=100, views=2, precision="bf16")
    with pytest.raises(ValueError, match=r"use 96, or another number of GPUs"):
        at_once(step, TrainerConfig(), Cluster(gpus=8))
    assert at_once(replace(step, batch=96), TrainerConfig(micro_batch=4), Cluster(gpus=8)) == (4, 3)


def test_norms_counted_are_ours() -> None:
    with torch.device("meta"):
        network = build_simclr(replace(R50, selective_kernels=True), 224)
    layers = [module for module in network.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(layer, BatchNorm) for layer in layers) and count_norms(network)[0] == len(layers)
