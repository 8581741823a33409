"""The trainer under a stopwatch: it runs as it is, its phases marked from outside; and parts of its work alone."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsimclr.bench.flops import flops_per_image
from fastsimclr.bench.ours import LR, Batches, job_of, networks_of, objective_of, optimizer_of, policy_of
from fastsimclr.bench.record import LAST, Contestant, Round, Stopwatch
from fastsimclr.bench.training_configs import Mode, StageBench
from fastsimclr.loaders import Batch, Crops, DataConfig, Resident, Source, TrainLoader
from fastsimclr.methods import Distillation, Objective, Outcome
from fastsimclr.models import count_parameters
from fastsimclr.optim import Schedule
from fastsimclr.runs.log import RunLog
from fastsimclr.runtime.device import Runtime
from fastsimclr.training.config import TrainerConfig
from fastsimclr.training.cuda_graph import WARM_UP
from fastsimclr.training.feed import Feed, Shipment
from fastsimclr.training.gradient_cache import Scale
from fastsimclr.training.meter import Meter
from fastsimclr.training.step import Step
from fastsimclr.training.trainer import Trainer, TrainingJob

READY = 4  # batches of ready-made views or images that a part of the work goes around
_PREPARING: dict[Mode, int] = {"eager": 0, "compile": 2, "graph": WARM_UP + 1}  # steps; the last captures the graph


class _Watched(Trainer):
    """Fits its job again and again, one round a time; what it compiled or captured stays.

    step_of: what makes its step in place of its own.
    """

    def __init__(
        self,
        config: TrainerConfig,
        runtime: Runtime,
        job: TrainingJob,
        watch: Stopwatch,
        step_of: Callable[[Trainer], Step] | None,
    ) -> None:
        super().__init__(config, runtime, job)
        self.losses: list[Tensor] = []
        self._watch, self._make = watch, step_of
        self._kept: Step | None = None

    def again(self, batches: Batches, first_step: int, steps: int, run: Path) -> None:
        """Train `steps` steps on the batches from `first_step` on, from a standing start; `run` is an empty folder."""

        def begin(start: int, stop: int, crops: Crops) -> Iterable[Batch]:
            coming = batches(first_step + start, first_step + stop, crops)
            self._watch.start()
            return coming

        schedule = replace(self.job.schedule, total_steps=steps)
        self.step, self.job = 0, replace(self.job, run=run, batches=begin, schedule=schedule)
        self.losses.clear()
        self.fit()

    def _step_of(self) -> Step:
        if self._kept is None:
            self._kept = super()._step_of() if self._make is None else self._make(self)
        inner = self._kept

        def step(images: Tensor, labels: Tensor, scale: Scale) -> Outcome:
            self._watch.mark("views")
            outcome = inner(images, labels, scale)
            self.losses.append(outcome.loss)
            return outcome

        return step

    def _train_step(self, step: Step, shipment: Shipment, rate: float, meter: Meter) -> None:
        self._watch.mark("wait")
        super()._train_step(step, shipment, rate, meter)

    def _between_steps(self, log: RunLog, meter: Meter, rate: float, *, stopping: bool) -> Path | None:
        self._watch.mark(LAST)  # records and checkpoints do not count
        return super()._between_steps(log, meter, rate, stopping=stopping)


def trained(
    name: str,
    runtime: Runtime,
    config: StageBench,
    batches: Batches,
    *,
    mode: Mode = "eager",
    rival: bool = True,
    settings: TrainerConfig | None = None,
    step_of: Callable[[Trainer], Step] | None = None,
    details: dict[str, Any] | None = None,
) -> Contestant:
    """A contestant whose round is config.steps steps of Trainer.fit on `batches`: feed, views, loss and optimizer.

    Of several ranks config.batch is the share of each. mode "graph" has one phase, graph, in place of forward, loss and
    backward. settings: of the trainer, beside mode. step_of: of a trainer that is ready, the step in place of its own.
    """
    objective = objective_of(config)
    flops = flops_per_image(networks_of(objective), config.size, objective.views)
    parameters = count_parameters(networks_of(objective)[0])
    runtime.to_device(objective)
    global_batch = config.batch * runtime.ranks.world
    optimizer, optimizer_name = optimizer_of(config, objective, global_batch)
    watch = Stopwatch(runtime.device)
    _mark_phases(objective, optimizer, watch, mode)
    schedule = Schedule(peak=LR, warmup_steps=0, total_steps=config.steps)
    policy = policy_of(config.stage, config.size)
    job = job_of(
        objective, optimizer, batches, schedule, policy=policy, batch=global_batch, seed=config.seed, run=Path()
    )
    many = 2**40  # steps between records and checkpoints: there is one of each, at the end of a round
    trainer = _Watched(
        replace(
            settings or TrainerConfig(),
            log_every_steps=many,
            checkpoint_every_steps=many,
            keep_checkpoints=1,
            compile=mode == "compile",
            cuda_graph=mode == "graph",
        ),
        runtime,
        job,
        watch,
        step_of,
    )
    done = 0

    def fit(steps: int) -> Round:
        nonlocal done
        first, done = done, done + steps  # on through the epochs: no two rounds see the same views
        with tempfile.TemporaryDirectory() as folder:
            trainer.again(batches, first, steps, Path(folder))
        return watch.round(config.batch, trainer.losses)

    def prepare() -> float:
        start = time.perf_counter()
        fit(_PREPARING[mode])
        return time.perf_counter() - start

    known = {
        "precision": runtime.precision,
        "channels_last": runtime.channels_last,
        "mode": mode,
        "parameters": parameters,
        "optimizer": optimizer_name,
    }
    return Contestant(
        name=name,
        ours=True,
        views=objective.views,
        run=lambda: fit(config.steps),
        details=known | (details or {}),
        flops=flops,
        rival=rival,
        prepare=prepare if _PREPARING[mode] else None,
    )


def _mark_phases(objective: Objective, optimizer: torch.optim.Optimizer, watch: Stopwatch, mode: Mode) -> None:
    if mode != "graph":  # in a graph nothing of Python runs
        student, *teachers = networks_of(objective)
        for teacher in teachers:
            teacher.register_forward_hook(lambda *_: watch.mark("teacher"))
        student.register_forward_hook(lambda *_: watch.mark("forward"))
        objective.register_forward_hook(lambda *_: watch.mark("loss"))
    optimizer.register_step_pre_hook(lambda *_: watch.mark("graph" if mode == "graph" else "backward"))
    optimizer.register_step_post_hook(lambda *_: watch.mark("optimizer"))


def loading(
    source: Source, resident: Resident | None, runtime: Runtime, config: StageBench, data: DataConfig
) -> Batches:
    """The rank's batches of `source` by the loader of `data`, or out of `resident`, where it is held."""
    ranks = runtime.ranks

    def batches(start: int, stop: int, crops: Crops) -> Iterable[Batch]:
        return TrainLoader(
            source,
            data,
            batch=config.batch * ranks.world,
            seed=config.seed,
            start=start,
            stop=stop,
            rank=ranks.rank,
            world=ranks.world,
            resident=resident,
            crops=crops,
            cut=runtime.cuts,
            pin=runtime.pins,
        )

    return batches


def shipped(batches: Batches, runtime: Runtime, config: StageBench, views: int) -> list[Shipment]:
    """The first READY batches on the device, drawn, as the trainer gets them."""
    crops = Crops(policy=policy_of(config.stage, config.size), seed=config.seed, views=views)
    with Feed(batches(0, READY, crops), crops, runtime) as feed:
        return list(feed)


def again_and_again(shipments: Sequence[Shipment]) -> Batches:
    """These, in turn, as batches that need no loading, no draws and no copies."""
    ready = [
        Batch(
            images=shipment.images,
            params=shipment.params,
            ids=shipment.ids,
            labels=shipment.labels,
            epochs=torch.zeros_like(shipment.ids),
            sizes=torch.zeros((len(shipment.ids), 2), dtype=torch.int32),
        )
        for shipment in shipments
    ]
    return lambda start, stop, _: list(itertools.islice(itertools.cycle(ready), stop - start))


def loaded(name: str, runtime: Runtime, config: StageBench, batches: Batches, views: int) -> Contestant:
    """The loader and the feed alone, from a standing start: shipments on the device with which nothing is done."""
    crops = Crops(policy=policy_of(config.stage, config.size), seed=config.seed, views=views)
    watch, done = Stopwatch(runtime.device), 0

    def run() -> Round:
        nonlocal done
        watch.start()
        coming = batches(done, done + config.steps, crops)
        done += config.steps
        with Feed(coming, crops, runtime) as feed:
            for _ in feed:
                watch.mark(LAST)
        return watch.round(config.batch)

    return Contestant(name=name, ours=True, views=0, run=run, details={}, rival=False)


def teacher_forward(name: str, runtime: Runtime, config: StageBench, shipments: Sequence[Shipment]) -> Contestant:
    """The forward pass alone of a distillation's teacher, on ready-made views."""
    objective = objective_of(config)
    assert isinstance(objective, Distillation)
    teacher = objective.teacher.eval()
    flops = flops_per_image([teacher], config.size, objective.views)
    runtime.to_device(teacher)
    watch = Stopwatch(runtime.device)
    ready = [shipment.render(runtime.view_dtype) for shipment in shipments]

    def run() -> Round:
        watch.start()
        for views in itertools.islice(itertools.cycle(ready), config.steps):
            with torch.no_grad(), runtime.autocast():
                teacher(views)
            watch.mark(LAST)
        return watch.round(config.batch)

    details = {"precision": runtime.precision, "channels_last": runtime.channels_last, "mode": "eager"}
    views = objective.views
    return Contestant(name=name, ours=True, views=views, run=run, details=details, flops=flops, rival=False)
