"""Our side of a bench: the trainer as it is, its phases marked from outside."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastsimclr.bench.record import LAST, Contestant, Round, Stopwatch
from fastsimclr.loaders import Batch, DataConfig, Policy, Resident, Source, TrainLoader
from fastsimclr.loaders.data import LoaderName
from fastsimclr.models import ModelConfig, SimCLRNet, build_simclr, count_parameters
from fastsimclr.objectives import Contrastive
from fastsimclr.optim import OptimConfig, Schedule, build_optimizer
from fastsimclr.runtime import Runtime
from fastsimclr.trainer import Job, Trainer, TrainerConfig

# What both sides train with; SimCLR v1's head, which lightly's default is too.
HEAD_LAYERS, HEAD_DIM, TEMPERATURE = 2, 128, 0.5
# A small rate: losses stay comparable where a baseline sees the same few views again.
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4


@dataclass(frozen=True, kw_only=True)
class _MarkedSchedule(Schedule):
    """The trainer asks for the learning rate once a shipment has come: there the wait for data ends."""

    watch: Stopwatch

    def __call__(self, step: int) -> float:
        self.watch.mark("wait")
        return super().__call__(step)


class _EndOfStep:
    """A trainer's hook that marks where a step ends, before checkpoints are written."""

    kind = "bench"

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def due(self, step: int) -> bool:
        return True

    def __call__(self, step: int) -> None:
        self._watch.mark(LAST)


def network(arch: str, size: int, seed: int) -> SimCLRNet:
    """Our full-width network with SimCLR v1's head; the same weights for the same seed."""
    torch.manual_seed(seed)
    return build_simclr(ModelConfig(arch=arch, head_layers=HEAD_LAYERS, head_dim=HEAD_DIM), size)  # type: ignore[arg-type]


def policy_for(size: int) -> Policy:
    """SimCLR's views: the CIFAR recipe (half colour strength, no blur) up to 32 px, else ImageNet's."""
    return Policy(size=size, strength=0.5, blur=0.0) if size <= 32 else Policy(size=size)


def trained(
    name: str,
    runtime: Runtime,
    source: Source,
    resident: Resident | None,
    *,
    arch: str,
    size: int,
    batch: int,
    steps: int,
    seed: int,
    threads: int = 0,
    loader: LoaderName = "native",
    setup_s: float = 0.0,
) -> Contestant:
    """A contestant whose round is `steps` steps of Trainer.fit on `source`: loader, feed, views, loss and LARS.

    resident: `source` held decoded, or None to read it by `loader`. setup_s: what holding it took, for the report.
    """
    net = network(arch, size, seed)
    objective = Contrastive(net, temperature=TEMPERATURE, scaling="paper")
    runtime.place(objective)
    optim = OptimConfig(lr=LR, lr_scaling="none", momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    optimizer = build_optimizer(optim, objective, global_batch=batch)
    watch, losses = Stopwatch(runtime.device), list[torch.Tensor]()
    objective.register_forward_pre_hook(lambda *_: watch.mark("views"))
    net.register_forward_hook(lambda *_: watch.mark("forward"))
    objective.register_forward_hook(lambda _module, _inputs, outcome: losses.append(outcome.loss.detach()))
    objective.register_forward_hook(lambda *_: watch.mark("loss"))
    optimizer.register_step_pre_hook(lambda *_: watch.mark("backward"))
    optimizer.register_step_post_hook(lambda *_: watch.mark("optimizer"))
    data = DataConfig(threads=threads, loader=loader)
    pin = runtime.device.type == "cuda"
    schedule = _MarkedSchedule(peak=LR, warmup_steps=0, total_steps=steps, watch=watch)
    turn = 0

    def batches(start: int, stop: int) -> Iterable[Batch]:
        first = turn * steps  # go on through the epochs, so that no two rounds see the same views
        losses.clear()
        watch.start()
        return TrainLoader(
            source,
            data,
            batch=batch,
            seed=seed,
            start=first + start,
            stop=first + stop,
            resident=resident,
            pin=pin,
        )

    def run() -> Round:
        nonlocal turn
        with tempfile.TemporaryDirectory() as folder:
            job = Job(
                stage="bench",
                run=Path(folder),
                objective=objective,
                optimizer=optimizer,
                schedule=schedule,
                batches=batches,
                policy=policy_for(size),
                batch=batch,
                seed=seed,
                fingerprint=source.fingerprint,
                recipe="",
                facts={},
                resume=False,
                hooks=(_EndOfStep(watch),),
            )
            config = TrainerConfig(log_every_steps=steps, checkpoint_every_steps=steps, keep_checkpoints=1)
            Trainer(config, runtime, job).fit()
        turn += 1
        return watch.round(batch, losses)

    facts = {
        "precision": runtime.precision,
        "channels_last": runtime.channels_last,
        "parameters": count_parameters(net),
        "optimizer": "LARS (google)",
        "loader": loader if resident is None else "resident",
        "setup_s": round(setup_s, 3),
    }
    return Contestant(name=name, ours=True, views=objective.views, run=run, facts=facts)
