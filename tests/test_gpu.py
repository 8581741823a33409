"""On a CUDA device: views, loss and LARS equal the CPU's, and a training step never waits for the device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsimclr.feed import Feed, ship
from fastsimclr.kernels.nt_xent import nt_xent
from fastsimclr.loaders import Batch, DataConfig, Policy, TrainLoader, hold, open_data
from fastsimclr.meter import Meter
from fastsimclr.models import ModelConfig, build_simclr
from fastsimclr.objectives import Contrastive
from fastsimclr.optim import LARS, OptimConfig, Schedule, build_optimizer
from fastsimclr.runtime import Precision, Runtime
from fastsimclr.trainer import Job, Trainer, TrainerConfig

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BATCH, STEPS = 32, 4


def batches(size: int, device: torch.device, start: int = 0, stop: int = STEPS) -> list[Batch]:
    """Batches of synthetic images held on `device`."""
    data = DataConfig(source="synthetic", synthetic_images=256, synthetic_size=size, resident="always")
    source = open_data(data).unlabelled
    resident = hold(source, data, device)
    return list(TrainLoader(source, data, batch=BATCH, seed=0, start=start, stop=stop, resident=resident))


def trainer_on(device: torch.device, precision: Precision, run: Path) -> Trainer:
    """A pretraining job of a quarter-width ResNet-18; equal weights on any device."""
    runtime = Runtime(device=device, precision=precision)
    torch.manual_seed(0)
    network = build_simclr(ModelConfig(arch="resnet18", width=0.25), 32)
    objective = Contrastive(network, temperature=0.5, scaling="paper")
    runtime.place(objective)
    job = Job(
        stage="pretrain",
        run=run,
        objective=objective,
        optimizer=build_optimizer(OptimConfig(lr=0.1), objective, global_batch=BATCH),
        schedule=Schedule(peak=0.1, warmup_steps=0, total_steps=STEPS),
        batches=lambda start, stop: batches(32, device, start, stop),
        policy=Policy(size=32, strength=0.5, blur=0.0),
        batch=BATCH,
        seed=0,
        fingerprint="",
        recipe="",
        facts={},
        resume=False,
    )
    return Trainer(TrainerConfig(log_every_steps=STEPS), runtime, job)


@pytest.mark.parametrize("semantics", ["torchvision", "tensorflow"])
def test_views_equal_those_of_the_cpu(semantics: Any) -> None:
    policy = Policy(size=64, semantics=semantics, rotate=15.0, solarise=0.2, normalise="none")
    views = {}
    for device in (CPU, CUDA):
        (batch,) = batches(96, device, stop=1)
        shipment = ship(batch, policy, 7, 2, device)
        views[device] = shipment.views(policy, torch.float32)
        assert views[device].device.type == device.type
    # float32 on both, products summed in another order; a solarised pixel just at one half may fall on either side.
    far = (views[CPU] - views[CUDA].cpu()).abs()
    assert float((far > 1e-4).float().mean()) < 1e-4
    assert float(far.mean()) < 1e-6


@pytest.mark.parametrize("rows", [4, 62, 512])
def test_nt_xent_equals_float64_on_the_cpu(rows: int) -> None:
    z = torch.randn(rows, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    exact = z.clone().requires_grad_()
    there = z.float().to(CUDA).requires_grad_()
    expected, got = nt_xent(exact, 0.1), nt_xent(there, 0.1)
    expected.loss.backward()  # type: ignore[no-untyped-call]
    got.loss.backward()  # type: ignore[no-untyped-call]
    assert exact.grad is not None and there.grad is not None
    # float32 rounding of similarities within 10 of each other after division by the temperature.
    torch.testing.assert_close(got.loss.cpu().double(), expected.loss, rtol=1e-5, atol=0)
    scale = float(exact.grad.abs().max())
    torch.testing.assert_close(there.grad.cpu().double(), exact.grad, rtol=0, atol=1e-5 * scale)
    assert float(got.top1) == float(expected.top1)


def test_lars_steps_equal_those_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in [(16, 3, 3, 3), (16,), (8, 16)]]
    starts.append(torch.zeros(4, 4))  # no trust ratio without a norm
    gradients = [[torch.randn(w.shape, generator=generator) for w in starts] for _ in range(6)]
    ends: dict[torch.device, list[Tensor]] = {}
    for device in (CPU, CUDA):
        weights = [w.clone().to(device).requires_grad_() for w in starts]
        optimizer = LARS([{"params": weights}], lr=0.3, weight_decay=1e-4)
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.to(device)
            optimizer.step()
        ends[device] = [w.detach().cpu() for w in weights]
    for here, there in zip(ends[CPU], ends[CUDA], strict=True):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)  # float32 norms summed in another order


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_device(precision: Precision, tmp_path: Path) -> None:
    trainer = trainer_on(CUDA, precision, tmp_path)
    job = trainer.job
    job.objective.train()
    with Feed(job.batches(0, STEPS), job.policy, seed=0, views=2, runtime=trainer.runtime) as feed:
        shipments = list(feed)
        meter, network = Meter(feed, trainer.runtime), trainer._parallel()
        trainer._train_step(network, shipments[0], 0.1, meter)  # cuDNN and the optimizer's state set themselves up
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            for shipment in shipments[1:]:
                trainer._train_step(network, shipment, 0.1, meter)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert math.isfinite(meter.read()["loss"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_begins_as_on_the_cpu(precision: Precision, tmp_path: Path) -> None:
    first: dict[torch.device, float] = {}
    sides: tuple[tuple[torch.device, Precision], ...] = ((CPU, "fp32"), (CUDA, precision))
    for device, used in sides:
        trainer = trainer_on(device, used, tmp_path / f"run-{len(first)}")
        losses: list[Tensor] = []
        trainer.job.objective.register_forward_hook(lambda _m, _i, out, seen=losses: seen.append(out.loss.detach()))
        last = trainer.fit()
        assert math.isfinite(last["loss"]) and trainer.step == STEPS
        first[device] = float(losses[0])
    # The same weights and views. TF32 convolutions and bf16 activations keep 10 and 7 bits.
    assert first[CUDA] == pytest.approx(first[CPU], rel=0.005 if precision == "fp32" else 0.02)
