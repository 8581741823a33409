"""On a CUDA device: views, loss and LARS equal the CPU's, and a training step never waits for the device."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsimclr.kernels.gather import gather_views
from fastsimclr.kernels.nt_xent import nt_xent
from fastsimclr.kernels.views import make_views
from fastsimclr.loaders import Batch, DataConfig, Policy, TrainLoader, draw, open_data
from fastsimclr.loaders.cut import Crops
from fastsimclr.methods import Contrastive, MomentumContrast
from fastsimclr.models import ModelConfig, build_simclr
from fastsimclr.optim import LARS, OptimConfig, Schedule, build_optimizer
from fastsimclr.runtime.device import Precision, Runtime
from fastsimclr.training.config import TrainerConfig
from fastsimclr.training.feed import Feed, ship
from fastsimclr.training.meter import Meter
from fastsimclr.training.trainer import Trainer, TrainingJob
from tests.captured import captured
from tests.loading import hold, simclr

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BATCH, STEPS = 32, 4


def batches(size: int, device: torch.device, start: int = 0, stop: int = STEPS) -> list[Batch]:
    """Batches of synthetic images held on `device`."""
    data = DataConfig(source="synthetic", synthetic_images=256, synthetic_size=size, loader="resident")
    source = open_data(data).unlabelled
    resident = hold(source, data, device)
    return list(TrainLoader(source, data, batch=BATCH, seed=0, start=start, stop=stop, resident=resident))


def runtime_on(device: torch.device) -> Runtime:
    return Runtime(device=device, precision="fp32")


def trainer_on(device: torch.device, precision: Precision, run: Path, memory: int = 0) -> Trainer:
    """A pretraining job of a quarter-width ResNet-18; equal weights on any device."""
    runtime = Runtime(device=device, precision=precision)
    torch.manual_seed(0)
    network = build_simclr(ModelConfig(arch="resnet18", width=0.25), 32)
    objective = Contrastive(network, temperature=0.5, scaling="paper")
    if memory:
        objective = MomentumContrast(network, temperature=0.5, scaling="paper", memory=memory, momentum=0.9)
    runtime.to_device(objective)
    job = TrainingJob(
        stage="pretrain",
        run=run,
        objective=objective,
        optimizer=build_optimizer(OptimConfig(lr=0.1), objective, global_batch=BATCH),
        schedule=Schedule(peak=0.1, warmup_steps=0, total_steps=STEPS),
        batches=lambda start, stop, _: batches(32, device, start, stop),
        policy=Policy(size=32, strength=0.5, blur=0.0),
        batch=BATCH,
        seed=0,
        fingerprint="",
        recipe="",
        metadata={},
        resume=False,
    )
    return Trainer(TrainerConfig(log_every_steps=STEPS), runtime, job)


@pytest.mark.parametrize("semantics", ["torchvision", "tensorflow"])
def test_views_equal_those_of_the_cpu(semantics: Any) -> None:
    policy = Policy(size=64, semantics=semantics, rotate=15.0, solarise=0.2, normalise="none")
    views = {}
    for device in (CPU, CUDA):
        (batch,) = batches(96, device, stop=1)
        shipment = ship(batch, Crops(policy=policy, seed=7, views=2), runtime_on(device))
        views[device] = shipment.render(torch.float32)
        assert views[device].device.type == device.type
    # float32 on both, products summed in another order; a solarised pixel just at one half may fall on either side.
    far = (views[CPU] - views[CUDA].cpu()).abs()
    assert float((far > 1e-4).float().mean()) < 1e-4
    assert float(far.mean()) < 1e-6


@pytest.mark.parametrize("semantics", ["torchvision", "tensorflow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fused_views_equal_the_reference(dtype: torch.dtype, semantics: Any) -> None:
    """Every op at ImageNet's size, on one device. Of 16-bit views, those that waited as float16 may be 3e-4 off."""
    policy = dataclasses.replace(
        simclr(224, semantics), rotate=15.0, rotate90=0.2, sobel=0.1, noise=0.1, cutout=0.3, normalise="none"
    )
    (batch,) = batches(256, CUDA, stop=1)
    shipment = ship(batch, Crops(policy=policy, seed=7, views=2), runtime_on(CUDA))
    ours, expected = (
        make_views(shipment.images, shipment.params, **policy.rendering, dtype=dtype, backend=backend).float()
        for backend in ("fused", "reference")
    )
    # Sampling positions rounded in another order, times the steepest slope; 11 and 8 digits of values up to 1.
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    far = (ours - expected).abs()
    assert float((far > tolerance).float().mean()) < 1e-5
    assert float(far.mean()) < tolerance / 4


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_rows_that_make_no_sense_are_views_of_nan(backend: Any) -> None:
    policy = Policy(size=48)
    (batch,) = batches(64, CUDA, stop=1)
    shipment = ship(batch, Crops(policy=policy, seed=7, views=1), runtime_on(CUDA))
    params, last = shipment.params, BATCH - 1
    params.source[0], params.crop[1, 0], params.order[2, 1], params.factors[last, 2] = BATCH, 60, 7, math.nan
    views = make_views(shipment.images, params, **policy.rendering, backend=backend)
    bad = torch.tensor([row in (0, 1, 2, last) for row in range(BATCH)])
    assert torch.equal(views.isnan().flatten(1).all(1).cpu(), bad)
    assert views[3:last].isfinite().all()


def test_gathered_views_in_a_graph_equal_those_of_the_selected_images() -> None:
    policy = Policy(size=32, strength=0.5, blur=0.0)
    dataset = torch.randint(0, 256, (100, 32, 32, 3), dtype=torch.uint8, device=CUDA)
    ids, sizes = torch.randperm(100)[:BATCH], torch.full((BATCH, 2), 32, dtype=torch.int32)
    params = draw(policy, 1, torch.zeros(BATCH), ids, 2, sizes).to(CUDA)
    there = torch.zeros(BATCH, dtype=torch.int64, device=CUDA)

    def views() -> Tensor:
        return gather_views(dataset, there, params, **policy.rendering, dtype=torch.float16)

    graph, out = captured(views)
    there.copy_(ids)
    graph.replay()
    expected = gather_views(
        dataset[there], torch.arange(BATCH, device=CUDA), params, **policy.rendering, dtype=out.dtype
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("rows, dim", [(4, 128), (62, 128), (514, 128), (4098, 128), (1026, 300)])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_nt_xent_equals_float64_on_the_cpu(rows: int, dim: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    base, noise = torch.randn(2, rows // 2, dim, dtype=torch.float64, generator=generator)
    x = torch.cat((base, base + noise))
    exact, there = x.clone().requires_grad_(), x.float().to(CUDA).requires_grad_()
    expected, got = nt_xent(exact, temperature), nt_xent(there, temperature)
    expected.loss.backward()  # type: ignore[no-untyped-call]
    got.loss.backward()  # type: ignore[no-untyped-call]
    assert exact.grad is not None and there.grad is not None
    # The device rounds vectors to fp16, 2.4e-4 a value; the temperature divides what that does to a similarity.
    torch.testing.assert_close(got.loss.cpu().double(), expected.loss, rtol=1e-3, atol=1e-6)
    error = float((there.grad.cpu().double() - exact.grad).norm())
    assert error <= 3e-3 * float(exact.grad.norm()) + 1e-7
    assert got.top1.item() == pytest.approx(expected.top1.item(), abs=0.01)


def test_nt_xent_runs_in_a_cuda_graph() -> None:
    x = torch.randn(1024, 128, device=CUDA, requires_grad=True)
    t = torch.tensor(0.1, device=CUDA, requires_grad=True)

    def step() -> tuple[Tensor, ...]:
        loss = nt_xent(x, t, bank=x.detach()[:100]).loss + nt_xent(x, 0.1).loss
        return torch.autograd.grad(loss, (x, t))

    graph, found = captured(step)
    with torch.no_grad():
        x.copy_(torch.randn(1024, 128, device=CUDA))
        t.fill_(0.2)
    graph.replay()
    for one, other in zip(found, step(), strict=True):
        assert torch.equal(one, other)


def test_nt_xent_never_holds_the_similarities() -> None:
    """65,536 rows of 128: the matrix alone would be 17 GB."""
    x = torch.randn(65536, 128, device=CUDA, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nt_xent(x, 0.1).loss.backward()  # type: ignore[no-untyped-call]
    assert torch.cuda.max_memory_allocated() - before < 200e6


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_lars_steps_equal_those_of_the_cpu(backend: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in [(16, 3, 3, 3), (16,), (8, 16)]]
    starts.append(torch.zeros(4, 4))  # no trust ratio without a norm
    gradients = [[torch.randn(w.shape, generator=generator) for w in starts] for _ in range(6)]
    ends: dict[torch.device, list[Tensor]] = {}
    sides: tuple[tuple[torch.device, Any], ...] = ((CPU, "reference"), (CUDA, backend))
    for device, used in sides:
        weights = [w.clone().to(device).requires_grad_() for w in starts]
        optimizer = LARS([{"params": weights}], lr=0.3, weight_decay=1e-4, backend=used)
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.to(device)
            optimizer.step()
        ends[device] = [w.detach().cpu() for w in weights]
    for here, there in zip(ends[CPU], ends[CUDA], strict=True):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)  # float32 norms summed in another order


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_captured_lars_step_equals_an_eager_one(set_to_none: bool) -> None:
    """A graph of backward and step, replayed; gradients kept, or of the graph's own memory. Many tables are made
    between capture and replay, so that one dropped too early would be noticed."""
    ends = []
    for replayed in (False, True):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(n, generator=generator).to(CUDA).requires_grad_() for n in (5, 4096, 70_001)]
        target, rate = torch.zeros((), device=CUDA), torch.zeros((), device=CUDA)
        optimizer = LARS(weights, lr=rate, weight_decay=1e-4, backend="fused")

        def step(weights: Any = weights, target: Tensor = target, optimizer: LARS = optimizer) -> None:
            optimizer.zero_grad(set_to_none=set_to_none)
            sum((w - target).square().sum() for w in weights).backward()
            optimizer.step()

        if replayed:
            graph, _ = captured(step, lambda own=optimizer: own.zero_grad(set_to_none=set_to_none))  # type: ignore[misc]
        else:
            step()  # like the one before the capture: a rate of 0 moves nothing
        for n in range(1, 20):
            w = torch.ones(n, device=CUDA, requires_grad=True)
            w.grad = torch.ones_like(w)
            LARS([w], lr=0.1, weight_decay=0.0, backend="fused").step()
        for number in range(4):
            target.fill_(number)
            rate.fill_(0.5 + number)
            if replayed:
                graph.replay()
            else:
                step()
        ends.append([w.detach().clone() for w in weights])
    for eager, of_graph in zip(*ends, strict=True):
        assert torch.equal(eager, of_graph)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(("precision", "memory"), [("fp32", 0), ("bf16", 0), ("fp16", 0), ("bf16", 96)])
def test_a_step_never_waits_for_the_device(precision: Precision, memory: int, tmp_path: Path) -> None:
    trainer = trainer_on(CUDA, precision, tmp_path, memory)
    job = trainer.job
    job.objective.train()
    crops = Crops(policy=job.policy, seed=0, views=2)
    with Feed(job.batches(0, STEPS, crops), crops, trainer.runtime) as feed:
        shipments = list(feed)
        meter, step = Meter(trainer.runtime), trainer._step_of()
        meter.follow(feed)
        trainer._train_step(step, shipments[0], 0.1, meter)  # cuDNN and the optimizer's state set themselves up
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            for shipment in shipments[1:]:
                trainer._train_step(step, shipment, 0.1, meter)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert math.isfinite(meter.read()["loss"])


@pytest.mark.parametrize(("precision", "memory"), [("fp32", 0), ("bf16", 0), ("fp32", 96), ("bf16", 96)])
def test_training_begins_as_on_the_cpu(precision: Precision, memory: int, tmp_path: Path) -> None:
    first: dict[torch.device, float] = {}
    sides: tuple[tuple[torch.device, Precision], ...] = ((CPU, "fp32"), (CUDA, precision))
    for device, used in sides:
        trainer = trainer_on(device, used, tmp_path / f"run-{len(first)}", memory)
        if isinstance(trainer.job.objective, MomentumContrast):  # or the first step would meet an empty queue
            (batch,) = batches(32, device, start=1, stop=2)
            crops = Crops(policy=trainer.job.policy, seed=7, views=2)
            views = ship(batch, crops, trainer.runtime).render(torch.float32)
            trainer.job.objective._enqueue(trainer.job.objective.contrasts(views))
            assert trainer.job.objective.bank is not None
        losses: list[Tensor] = []
        trainer.job.objective.register_forward_hook(lambda _m, _i, out, seen=losses: seen.append(out.loss.detach()))
        last = trainer.fit()
        assert math.isfinite(last["loss"]) and trainer.step == STEPS
        first[device] = float(losses[0])
    # The same weights and views. TF32 convolutions and bf16 activations keep 10 and 7 bits.
    assert first[CUDA] == pytest.approx(first[CPU], rel=0.005 if precision == "fp32" else 0.02)
