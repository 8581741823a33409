"""The micro-batch bench: a contrastive step whole, in micro-batches, with recomputed blocks: time, memory, gradient."""

# N images, M = 2N views, S side

from __future__ import annotations

import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastsimclr.bench import ours
from fastsimclr.bench.calls import Candidate, OpCase, report_of_calls
from fastsimclr.bench.ceilings import Ceilings
from fastsimclr.bench.configs import MicroBench
from fastsimclr.bench.files import open_files
from fastsimclr.bench.memory import Call
from fastsimclr.bench.record import Report
from fastsimclr.loaders import Crops, DataConfig, TrainLoader
from fastsimclr.methods import Contrastive
from fastsimclr.models import ModelConfig, ResNet, build_simclr
from fastsimclr.optim import OptimConfig, build_optimizer
from fastsimclr.runtime.device import Precision, Runtime, choose_runtime
from fastsimclr.training.feed import ship
from fastsimclr.training.gradient_cache import backward_in_micro_batches

WHOLE = "the whole batch at once"
LR = 1.0  # of the steps that come before gradients are compared


def bench_micro(config: MicroBench) -> Report:
    """Measure and return the report."""
    config = config.at_smoke_size()
    runtime = choose_runtime(config.device, "auto", True)
    made = partial(make, config, str(runtime.device), runtime.precision)
    names: dict[str, tuple[int | None, bool]] = {WHOLE: (None, False), "the same, blocks computed again": (None, True)}
    names |= {f"micro-batches of {micro}": (micro, False) for micro in config.micro}
    names |= {f"micro-batches of {config.micro[-1]}, blocks computed again": (config.micro[-1], True)}
    candidates = tuple(
        Candidate(
            name=name,
            family="ours" if name == WHOLE else name,
            make=partial(made, config.batch, micro, again),
            make_small=partial(made, 4, None, False),
            items=config.batch,
            timed="events",
        )
        for name, (micro, again) in names.items()
    )
    flop = _flop(config)

    def bound(ceilings: Ceilings) -> tuple[float, str]:
        words = f"{flop / 1e9:.4g} GFLOP of one forward and backward pass at the rate of the product"
        return flop / ceilings.matmul_flops, words

    name = f"{config.arch}, {config.batch} images"
    work = OpCase(name=name, unit="images", items=config.batch, bound=bound, candidates=candidates)
    notes = ["memory is what the step adds to weights and views", f"precision {runtime.precision}"]
    checks = differences(config)
    return report_of_calls("micro", asdict(config), runtime, [work], round_ms=1.0, checks=checks, notes=notes)


def make(config: MicroBench, device: str, precision: Precision, batch: int, micro: int | None, again: bool) -> Call:
    """Forward and backward pass of `batch` images on random views, a call; gradients are given up before it."""
    runtime = Runtime(device=torch.device(device), precision=precision)
    objective = contrastive(config, runtime)
    for module in objective.modules():
        if isinstance(module, ResNet):
            module.checkpoint_blocks = again
    generator = torch.Generator(device).manual_seed(config.seed)
    images = torch.randn((2 * batch, 3, config.size, config.size), generator=generator, device=device)
    images = images.to(runtime.view_dtype, memory_format=torch.channels_last)
    labels = torch.full((batch,), -1, device=device)
    return partial(_step, objective, images, labels, micro, runtime)


def _step(objective: Contrastive, images: Tensor, labels: Tensor, micro: int | None, runtime: Runtime) -> None:
    """The gradients, given up again: the next call makes them anew, and they count as its memory."""
    gradients(objective, images, labels, micro, runtime)
    objective.zero_grad(set_to_none=True)


def contrastive(config: MicroBench, runtime: Runtime) -> Contrastive:
    """The objective of the step, in training mode; the same weights for the same seed."""
    torch.manual_seed(config.seed)
    model = ModelConfig(arch=config.arch, width=config.width, head_layers=ours.HEAD_LAYERS, head_dim=ours.HEAD_DIM)
    objective = Contrastive(build_simclr(model, config.size), temperature=ours.TEMPERATURE, scaling="paper")
    runtime.to_device(objective)
    return objective.train()


def gradients(objective: Contrastive, images: Tensor, labels: Tensor, micro: int | None, runtime: Runtime) -> None:
    """Those of the whole batch's loss, as the trainer makes them."""
    objective.zero_grad(set_to_none=True)
    if micro is not None:
        backward_in_micro_batches(objective, images, labels, micro, lambda loss: loss, runtime.autocast)
        return
    with runtime.autocast():
        outcome = objective(images, labels)
    outcome.loss.backward()


def differences(config: MicroBench) -> dict[str, Any]:
    """|gradient - that of the whole batch| / |that|, in float32, on views of images after some steps of training.

    With BN in evaluation mode the images of a batch meet in the loss alone, and what is left is rounding. In training
    mode BN sees a micro-batch instead of the batch, which is another function.
    """
    runtime = choose_runtime(config.device, "fp32", True)
    crops = Crops(policy=ours.policy_for(config.size), seed=config.seed, views=2)
    objective = contrastive(config, runtime)
    optimizer = build_optimizer(OptimConfig(lr=LR, lr_scaling="none"), objective, global_batch=config.batch)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        source, found["images"] = open_files(config.root, config.images, config.side, config.seed, Path(scratch))
        data = DataConfig(threads=1, loader="native")
        loader = TrainLoader(source, data, batch=config.batch, seed=config.seed, stop=config.steps + 1)
        for batch in loader:
            shipment = ship(batch, crops, runtime)
            images = shipment.render(torch.float32)
            gradients(objective, images, shipment.labels, None, runtime)
            optimizer.step()
    when = f"after {config.steps + 1} steps"
    for mode in ("evaluation", "training"):
        objective.train(mode == "training")
        gradients(objective, images, shipment.labels, None, runtime)
        whole = _flat(objective)
        for micro in config.micro:
            gradients(objective, images, shipment.labels, micro, runtime)
            far = float((_flat(objective) - whole).norm() / whole.norm())
            cosine = float(torch.cosine_similarity(_flat(objective), whole, dim=0))
            found[f"gradient by micro-batches of {micro}, BN in {mode} mode, {when}"] = (
                f"{far:.2g} of its norm off, cosine {cosine:.4f}"
            )
    return found


def _flat(objective: Contrastive) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in objective.parameters() if p.grad is not None])


def _flop(config: MicroBench) -> float:
    """Of one forward and backward pass of the whole batch, two for a multiply-add, counted by torch on one image."""
    runtime = Runtime(device=torch.device("cpu"), precision="fp32")
    objective = contrastive(config, runtime).eval()
    images = torch.zeros((2, 3, config.size, config.size))
    with FlopCounterMode(display=False) as counter:
        objective.embed(images).sum().backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops()) * config.batch
