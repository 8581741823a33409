"""The training loop: one for pretraining, supervised training, linear evaluation, fine-tuning and distillation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from fastsimclr import checkpoint
from fastsimclr.feed import Feed, Shipment
from fastsimclr.generators import rng_state, set_rng_state
from fastsimclr.launch import step_done
from fastsimclr.loaders import Batch, Policy
from fastsimclr.meter import Meter, shown
from fastsimclr.models import average_running_statistics, load_weights
from fastsimclr.objectives import Objective
from fastsimclr.optim import Schedule, set_lr
from fastsimclr.parallel import Parallel, parallel
from fastsimclr.ranks import Agreement, Ranks
from fastsimclr.runlog import RunLog, logger
from fastsimclr.runtime import Runtime
from fastsimclr.stopping import StopFlag, Stopped


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The loop: precision, logging and checkpoints."""

    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision; weights stay float32. auto: bf16 on CUDA and on CPUs with AMX, else fp32. fp16 adds a loss
    scaler: a step whose gradients overflow changes nothing. With sgd it waits for the device once a step. fp64 trains
    double weights: slow, to compare two runs exactly."""
    channels_last: bool = True
    """Keep activations and convolution weights channels-last."""
    log_every_steps: int = 20
    """Steps between two records in metrics.jsonl; the only time the loop reads numbers from the device."""
    checkpoint_every_steps: int = 500
    """Steps between two checkpoints. One more is always written at the end and on a clean stop."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    bn_groups: Literal["global", "node", "rank"] | int = "node"
    """Which images of the global batch share BN statistics in training: all of them (global), those of one machine
    (node), those of one rank (rank), or that many equal parts of the batch. A resumed run keeps its number of parts."""
    timeout_s: float = 600.0
    """Seconds that a rank waits for the others in one exchange before the run fails."""

    def __post_init__(self) -> None:
        for key in ("log_every_steps", "checkpoint_every_steps", "keep_checkpoints"):
            if getattr(self, key) < 1:
                raise ValueError(f"trainer.{key}={getattr(self, key)} must be at least 1")
        if isinstance(self.bn_groups, int) and self.bn_groups < 1:
            raise ValueError(f"trainer.bn_groups={self.bn_groups} must be global, node, rank or at least 1")
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"trainer.timeout_s={self.timeout_s} must be greater than 0 and finite")


class Hook(Protocol):
    """Called on every rank after the steps at which it is due, outside the step itself; returns numbers to record.

    Until then the BN statistics may differ between the ranks; a hook that is due finds them averaged.
    """

    kind: str

    def due(self, step: int) -> bool: ...
    def __call__(self, step: int) -> dict[str, float] | None: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, on what, and where its state goes. Everything the loop needs that is not a setting of the loop.

    batches(start, stop): the rank's batches for those steps. batch: images a step, over all ranks.
    facts: what must be equal for a resume to be exact.
    resume: continue from the newest checkpoint in `run`, if there is one; False refuses a folder that has one.
    """

    stage: str
    run: Path
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    batches: Callable[[int, int], Iterable[Batch]]
    policy: Policy
    batch: int
    seed: int
    fingerprint: str
    recipe: str
    facts: dict[str, Any]
    resume: bool
    hooks: Sequence[Hook] = ()


class Trainer:
    """Runs a job from step 0, or from its newest checkpoint, to the schedule's end. Every rank runs one.

    bn_groups: in how many parts of the global batch BN takes its statistics.
    """

    def __init__(self, config: TrainerConfig, runtime: Runtime, job: Job) -> None:
        self.config, self.runtime, self.job = config, runtime, job
        self.ranks = runtime.ranks
        self.bn_groups = bn_groups(config, self.ranks)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        self.step = 0
        self.trained_s = 0.0
        self.last: dict[str, float] = {}

    def fit(self) -> dict[str, float]:
        """Train to the end and return the last record. Stopped when any rank was asked to stop first (state saved)."""
        self._start()
        job, config, total = self.job, self.config, self.job.schedule.total_steps
        if self.step >= total:
            return self.last
        network = self._parallel()
        log = RunLog(job.run if self.ranks.first else None, title=job.stage, total_steps=total, from_step=self.step)
        job.objective.train()
        batches = job.batches(self.step, total)
        with (
            contextlib.closing(log),
            StopFlag() as flag,
            Feed(batches, job.policy, seed=job.seed, views=job.objective.views, runtime=self.runtime) as feed,
        ):
            meter, stop = Meter(feed, self.runtime), Agreement(self.ranks)
            for shipment in feed:
                rate = job.schedule(self.step)
                self._train_step(network, shipment, rate, meter)
                self.step += 1
                step_done()
                signum = stop.propose(flag.signum or 0)  # read once: what comes later is for the next step
                save = signum > 0 or self.step == total or self.step % config.checkpoint_every_steps == 0
                if save or self.step % config.log_every_steps == 0:
                    self.last = self._read(meter, rate)
                    log.record("train", self.step, self.last)
                    log.progress(self.step, shown(self.last))
                with meter.paused():
                    self._run_hooks(log)
                    path = self._save() if save else None
                if signum:
                    break
            signum = stop.final(flag.signum or 0)  # which also waits for rank 0 and its file
            if signum:  # the state is saved: of this step, or of the last
                raise Stopped(signum, f"{job.stage}: stopped at step {self.step} of {total}, state saved in {path}")
        return self.last

    def _parallel(self) -> Parallel:
        return parallel(
            self.job.objective, groups=self.bn_groups, runtime=self.runtime, timeout_s=self.config.timeout_s
        )

    def _run_hooks(self, log: RunLog) -> None:
        for hook in self.job.hooks:
            if not hook.due(self.step):
                continue
            self._settle()
            if (values := hook(self.step)) is not None:
                log.record(hook.kind, self.step, values)
            self.job.objective.train()

    def _settle(self) -> None:
        """One set of BN statistics on all ranks, before anybody reads them."""
        average_running_statistics(self.job.objective, self.ranks.group)

    def _train_step(self, network: Parallel, shipment: Shipment, rate: float, meter: Meter) -> None:
        job = self.job
        set_lr(job.optimizer, rate)
        with self.runtime.autocast():
            images = shipment.views(job.policy, self.runtime.view_dtype)
            loss, metrics = network(images, shipment.labels)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(job.optimizer)
        self.scaler.update()
        job.optimizer.zero_grad(set_to_none=True)
        meter.add(len(shipment.ids), {"loss": loss.detach(), **metrics})

    def _read(self, meter: Meter, rate: float) -> dict[str, float]:
        values = meter.read()
        self.trained_s += values.pop("elapsed_s")
        # The loss is from before the step's update: the update may break weights that a checkpoint would keep.
        norms = torch._foreach_norm([parameter.detach() for parameter in self.job.objective.parameters()])
        broken = {"loss": values["loss"], "norm of the weights": torch.stack(norms).norm().item()}
        for name, value in broken.items():
            if math.isfinite(value):
                continue
            raise FloatingPointError(
                f"{self.job.stage}: the {name} became {value} by step {self.step} (learning rate {rate:.4g});"
                " no checkpoint of it was written. Lower the learning rate or lengthen the warm-up, and start in"
                f" another --out, or go on from {checkpoint.folder(self.job.run)} with the stage's --resume auto"
            )
        return {**values, "learning_rate": rate, "trained_s": round(self.trained_s, 3)}

    def _start(self) -> None:
        job = self.job
        found = self.ranks.on_first(self._newest)
        if found is not None:
            self._restore(*found)
        if job.batch % self.bn_groups:
            raise ValueError(
                f"trainer.bn_groups={self.config.bn_groups} makes {self.bn_groups} parts, which do not divide"
                f" {job.stage}.batch={job.batch}; use a number that does"
            )
        if self.ranks.first:
            checkpoint.write_text(job.run / "recipe.yaml", job.recipe)

    def _newest(self) -> tuple[Path, dict[str, Any]] | None:
        run = self.job.run
        run.mkdir(parents=True, exist_ok=True)
        existing = checkpoint.saved(run)
        if existing and not self.job.resume:
            raise FileExistsError(
                f"run folder {run} already holds {existing[-1].name}; give --resume auto to continue it,"
                " or another --out"
            )
        return (existing[-1], checkpoint.load(existing[-1])) if existing else None

    def _facts(self) -> dict[str, Any]:
        return {**self.job.facts, "batch": self.job.batch, "bn_groups": self.bn_groups}

    def _save(self) -> Path | None:
        """Written by rank 0, whose path it returns; when any rank returns, the statistics are one everywhere.

        The generators are those of rank 0: nothing in a step draws from them, and a rank more needs some, too.
        """
        self._settle()
        job = self.job
        if not self.ranks.first:
            return None
        return checkpoint.save(
            job.run,
            {
                "stage": job.stage,
                "recipe": job.recipe,
                "step": self.step,
                "total_steps": job.schedule.total_steps,
                "objective": job.objective.state_dict(),
                "optimizer": job.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": rng_state(self.runtime.device),
                "fingerprint": job.fingerprint,
                "facts": self._facts(),
                "trained_s": self.trained_s,
                "last": self.last,
            },
            self.config.keep_checkpoints,
        )

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        job = self.job
        begun = state["facts"].setdefault("bn_groups", 1)  # not in checkpoints of one process, of earlier versions
        state["facts"].setdefault("order", "random")  # nor this, when there was no other
        if isinstance(self.config.bn_groups, str) and begun != self.bn_groups:
            logger.info("%s: BN keeps the %d parts of the batch that the run began with", job.stage, begun)
            self.bn_groups = begun
        found = {key: state[key] for key in ("stage", "fingerprint", "total_steps")}
        found |= {**state["facts"], "fp16_scaler": bool(state["scaler"])}
        expected = {"stage": job.stage, "fingerprint": job.fingerprint, **self._facts()}
        # Last, because most of the others change it too.
        expected |= {"fp16_scaler": self.scaler.is_enabled(), "total_steps": job.schedule.total_steps}
        for key, value in expected.items():
            if (seen := found.get(key)) != value:
                raise checkpoint.CheckpointError(
                    f"checkpoint {path} was made with {key}={seen!r}, this run has {key}={value!r};"
                    " a resume continues the same run: give the same settings and data, or another --out"
                )
        load_weights(job.objective, state["objective"], str(path))
        own = [{key: value for key, value in group.items() if key != "params"} for group in job.optimizer.param_groups]
        job.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(job.optimizer.param_groups, own, strict=True):
            group.update(settings)  # this run's, where they were changed
        self.scaler.load_state_dict(state["scaler"])
        set_rng_state(state["rng"], self.runtime.device)
        self.step, self.trained_s, self.last = state["step"], state["trained_s"], state["last"]
        logger.info("%s: resumed from %s at step %d", job.stage, path, self.step)
        if changes := checkpoint.differences(state["recipe"], job.recipe):
            logger.warning("%s: the recipe has changed since, in %s", job.stage, "; ".join(changes))


def bn_groups(config: TrainerConfig, ranks: Ranks) -> int:
    """In how many parts of the global batch BN takes its statistics."""
    if isinstance(config.bn_groups, int):
        return config.bn_groups
    return {"global": 1, "node": ranks.hosts, "rank": ranks.world}[config.bn_groups]
