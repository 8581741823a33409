"""The grid bench: our pretraining step over networks, sizes and batches; what `fastsimclr plan` is fitted on."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch

from fastsimclr.bench import ours
from fastsimclr.bench.configs import BenchConfig, TorchvisionArch
from fastsimclr.bench.record import LAST, Contestant, Report, Round, Stopwatch, frame, measure
from fastsimclr.loaders import Batch, Crops, DataConfig, Resident, Source, TrainLoader, choose_placement, open_data
from fastsimclr.methods import Contrastive
from fastsimclr.models import ModelConfig, build_simclr, count_parameters
from fastsimclr.optim import OptimConfig, Schedule, build_optimizer
from fastsimclr.runs.log import RunLog
from fastsimclr.runtime.device import Runtime, choose_runtime
from fastsimclr.training.config import TrainerConfig
from fastsimclr.training.meter import Meter
from fastsimclr.training.trainer import Trainer, TrainingJob

Point = tuple[TorchvisionArch, float, int, int]
"""Encoder, width, side of the views in pixels, images a step."""
_NETWORKS: tuple[tuple[tuple[TorchvisionArch, float, int], tuple[int, ...], tuple[int, ...]], ...] = (
    (("resnet18", 1.0, 32), (16, 64), (32, 128)),
    (("resnet18", 0.5, 32), (64,), (128,)),
    (("resnet18", 0.25, 32), (128,), ()),
    (("resnet34", 0.5, 32), (16,), ()),
    (("resnet34", 1.0, 32), (), (16,)),
    (("resnet50", 1.0, 64), (16,), (32,)),
    (("resnet50", 0.5, 64), (32,), ()),
    (("resnet50", 0.25, 64), (), (64,)),
    (("resnet18", 1.0, 64), (32,), (64,)),
    (("resnet101", 0.5, 64), (), (16,)),
)
"""Encoder, width and side, the batches that a fit may see, and those that are held out."""


@dataclass(frozen=True, kw_only=True)
class GridBench(BenchConfig):
    """Our pretraining step over networks, sizes and batches on resident synthetic images: what `plan` is fitted on."""

    rounds: int = 5
    """Rounds that count; all configurations take turns in each. One more before them is warm-up, reported apart."""
    steps: int = 1
    """Steps a round."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision."""
    points: tuple[Point, ...] = tuple((*net, batch) for net, batches, _ in _NETWORKS for batch in batches)
    """Configurations that a fit may see: [encoder, width, side in pixels, images a step]."""
    held_out: tuple[Point, ...] = tuple((*net, batch) for net, _, batches in _NETWORKS for batch in batches)
    """Configurations that are kept from it, to be predicted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for arch, width, size, batch in (*self.points, *self.held_out):
            if not width > 0 or size < 1 or batch < 2:
                raise ValueError(
                    f"points: {[arch, width, size, batch]} must be an encoder, a width above 0, a side of 1 or more"
                    " and 2 images or more"
                )
        if len(set(self.points + self.held_out)) < len(self.points) + len(self.held_out):
            raise ValueError("points and held_out name a configuration twice; give each once")

    def at_smoke_size(self) -> Self:
        """The same settings with two configurations of a few images at 16 pixels."""
        if not self.smoke:
            return self
        seen: tuple[Point, ...] = (("resnet18", 0.125, 16, 8),)
        kept: tuple[Point, ...] = (("resnet18", 0.125, 16, 4),)
        return replace(self, rounds=1, steps=1, points=seen, held_out=kept)


def bench_grid(config: GridBench) -> Report:
    """Measure and return the report."""
    config = config.at_smoke_size()
    runtime = choose_runtime(config.device, config.precision, True)
    every = (*config.points, *config.held_out)
    held: dict[int, tuple[Source, Resident | None]] = {}
    for size in {point[2] for point in every}:
        most = max(point[3] for point in every if point[2] == size)
        side = size if size <= 32 else size * 8 // 7
        data = DataConfig(source="synthetic", synthetic_images=2 * most, synthetic_size=side, loader="resident")
        source = open_data(data).unlabelled
        held[size] = source, choose_placement(source, data, runtime.device).fill()
    entries = [_trained(config, point, runtime, *held[point[2]]) for point in every]
    rows = measure(entries, config.rounds, runtime.device)
    notes = [
        "no baseline: the configurations are not of the same work",
        "cpu_ms in the facts: processor time of the process for a step of each round, the warm-up first; on one thread"
        " that is the time on a machine that nobody else uses",
    ]
    return frame("grid", asdict(config), runtime, rows, [], checks={"configurations": len(rows)}, notes=notes)


def _trained(
    config: GridBench, point: Point, runtime: Runtime, source: Source, resident: Resident | None
) -> Contestant:
    arch, width, size, batch = point
    torch.manual_seed(config.seed)
    net = build_simclr(ModelConfig(arch=arch, width=width, head_layers=ours.HEAD_LAYERS), size)
    objective = Contrastive(net, temperature=ours.TEMPERATURE, scaling="paper")
    runtime.to_device(objective)
    optim = OptimConfig(lr=ours.LR, lr_scaling="none", warmup_epochs=0)
    optimizer = build_optimizer(optim, objective, global_batch=batch)
    watch, cpu = Stopwatch(runtime.device), list[float]()
    schedule = Schedule(peak=ours.LR, warmup_steps=0, total_steps=config.steps)
    policy, turn = ours.policy_for(size), 0

    def batches(start: int, stop: int, crops: Crops) -> Iterable[Batch]:
        first = turn * config.steps
        watch.start()
        cpu.append(time.process_time())
        return TrainLoader(
            source,
            DataConfig(),
            batch=batch,
            seed=config.seed,
            start=first + start,
            stop=first + stop,
            resident=resident,
            crops=crops,
            cut=runtime.cuts,
            pin=runtime.pins,
        )

    def run() -> Round:
        nonlocal turn
        with tempfile.TemporaryDirectory() as folder:
            job = ours.job_of(
                objective, optimizer, batches, schedule, policy=policy, batch=batch, seed=config.seed, run=Path(folder)
            )
            _Timed(runtime, job, watch, cpu).fit()
        turn += 1
        if runtime.device.type == "cpu":
            details["cpu_ms"].append(1e3 * (cpu[-1] - cpu[0]) / config.steps)
        cpu.clear()
        return watch.round(batch)

    details: dict[str, Any] = {
        "arch": arch,
        "width": width,
        "size": size,
        "batch": batch,
        "held_out": point in config.held_out,
        "precision": runtime.precision,
        "channels_last": runtime.channels_last,
        "mode": "eager",
        "parameters": count_parameters(net),
        "cpu_ms": list[float](),
    }
    name = f"{arch} x{width:g}, {size} px, batch {batch}"
    return Contestant(name=name, ours=True, views=objective.views, run=run, details=details)


class _Timed(Trainer):
    """The trainer without what comes between two steps: records, checkpoints, collecting garbage."""

    def __init__(self, runtime: Runtime, job: TrainingJob, watch: Stopwatch, cpu: list[float]) -> None:
        super().__init__(TrainerConfig(), runtime, job)
        self._watch, self._cpu = watch, cpu

    def _between_steps(self, log: RunLog, meter: Meter, rate: float, *, stopping: bool) -> Path | None:
        self._watch.mark(LAST)
        self._cpu.append(time.process_time())
        return None
