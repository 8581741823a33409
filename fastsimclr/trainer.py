"""The training loop: one for pretraining, supervised training, linear evaluation, fine-tuning and distillation."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fastsimclr import checkpoint
from fastsimclr.feed import Feed, Shipment
from fastsimclr.loaders import Batch, Policy
from fastsimclr.models import load_weights
from fastsimclr.objectives import Objective
from fastsimclr.optim import Schedule, set_lr
from fastsimclr.runlog import RunLog, logger
from fastsimclr.runtime import Runtime
from fastsimclr.stopping import StopFlag, Stopped


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The loop: precision, logging and checkpoints."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision; weights stay float32. auto: bf16 on CUDA and on CPUs with AMX, else fp32. fp16 adds a loss
    scaler, which waits for the device once a step."""
    channels_last: bool = True
    """Keep activations and convolution weights channels-last."""
    log_every_steps: int = 20
    """Steps between two records in metrics.jsonl; the only time the loop reads numbers from the device."""
    checkpoint_every_steps: int = 500
    """Steps between two checkpoints. One more is always written at the end and on a clean stop."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""

    def __post_init__(self) -> None:
        for key in ("log_every_steps", "checkpoint_every_steps", "keep_checkpoints"):
            if getattr(self, key) < 1:
                raise ValueError(f"trainer.{key}={getattr(self, key)} must be at least 1")


class Hook(Protocol):
    """Called after each step, outside the step itself; returns numbers to record, or None."""

    kind: str

    def __call__(self, step: int) -> dict[str, float] | None: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, on what, and where its state goes. Everything the loop needs that is not a setting of the loop.

    batches(start, stop): the loader's batches for those steps. facts: what must be equal for a resume to be exact.
    resume: continue from the newest checkpoint in `run`, if there is one; False refuses a folder that has one.
    """

    stage: str
    run: Path
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    batches: Callable[[int, int], Iterable[Batch]]
    policy: Policy
    seed: int
    fingerprint: str
    recipe: str
    facts: dict[str, Any]
    resume: bool
    hooks: Sequence[Hook] = ()


class Trainer:
    """Runs a job from step 0, or from its newest checkpoint, to the schedule's end."""

    def __init__(self, config: TrainerConfig, runtime: Runtime, job: Job) -> None:
        self.config, self.runtime, self.job = config, runtime, job
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        self.step = 0
        self.trained_s = 0.0
        self.last: dict[str, float] = {}

    def fit(self) -> dict[str, float]:
        """Train to the end and return the last record. Stopped when asked to stop first (state saved)."""
        self._start()
        job, config, total = self.job, self.config, self.job.schedule.total_steps
        if self.step >= total:
            return self.last
        log = RunLog(job.run, title=job.stage, total_steps=total, from_step=self.step)
        job.objective.train()
        batches = job.batches(self.step, total)
        with (
            contextlib.closing(log),
            StopFlag() as flag,
            Feed(batches, job.policy, seed=job.seed, views=job.objective.views, runtime=self.runtime) as feed,
        ):
            meter = _Meter(feed)
            for shipment in feed:
                rate = job.schedule(self.step)
                self._train_step(shipment, rate, meter)
                self.step += 1
                signum = flag.signum  # read once: what comes later is for the next step
                save = signum is not None or self.step == total or self.step % config.checkpoint_every_steps == 0
                if save or self.step % config.log_every_steps == 0:
                    self.last = self._read(meter, rate)
                    log.record("train", self.step, self.last)
                    log.progress(self.step, _shown(self.last))
                with meter.paused():
                    for hook in job.hooks:
                        values = hook(self.step)
                        if values is not None:
                            log.record(hook.kind, self.step, values)
                            job.objective.train()
                    path = self._save() if save else None
                if signum is not None:
                    break
            if flag.signum is not None:  # the state is saved: of this step, or of the last
                raise Stopped(
                    flag.signum, f"{job.stage}: stopped at step {self.step} of {total}, state saved in {path}"
                )
        return self.last

    def _train_step(self, shipment: Shipment, rate: float, meter: _Meter) -> None:
        job = self.job
        set_lr(job.optimizer, rate)
        with self.runtime.autocast():
            images = shipment.views(job.policy, self.runtime.view_dtype)
            outcome = job.objective(images, shipment.labels)
        self.scaler.scale(outcome.loss).backward()
        self.scaler.step(job.optimizer)
        self.scaler.update()
        job.optimizer.zero_grad(set_to_none=True)
        meter.add(len(shipment.ids), {"loss": outcome.loss.detach(), **outcome.metrics})

    def _read(self, meter: _Meter, rate: float) -> dict[str, float]:
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
        job.run.mkdir(parents=True, exist_ok=True)
        existing = checkpoint.saved(job.run)
        if existing and not job.resume:
            raise FileExistsError(
                f"run folder {job.run} already holds {existing[-1].name}; give --resume auto to continue it,"
                " or another --out"
            )
        if existing:
            self._restore(existing[-1])
        checkpoint.write_text(job.run / "recipe.yaml", job.recipe)

    def _save(self) -> Path:
        job = self.job
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
                "facts": job.facts,
                "trained_s": self.trained_s,
                "last": self.last,
            },
            self.config.keep_checkpoints,
        )

    def _restore(self, path: Path) -> None:
        job = self.job
        state = checkpoint.load(path)
        found = {key: state[key] for key in ("stage", "fingerprint", "total_steps")}
        found |= {**state["facts"], "fp16_scaler": bool(state["scaler"])}
        expected = {"stage": job.stage, "fingerprint": job.fingerprint, **job.facts}
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


class _Meter:
    """Sums metrics on the device between two reads; a read is the loop's only synchronisation."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = self._images = 0
        self._since, self._waited = time.perf_counter(), self._feed.waited_s

    def add(self, images: int, values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            value = value.float()
            self._sums[key] = self._sums[key] + value if key in self._sums else value
        self._steps += 1
        self._images += images

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of probes and checkpoints out of the rates."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        keys = list(self._sums)
        means = (torch.stack([self._sums[key] for key in keys]) / self._steps).tolist()
        elapsed = time.perf_counter() - self._since
        values = dict(zip(keys, means, strict=True))
        values["images_per_s"] = round(self._images / elapsed, 2)
        values["data_wait_pct"] = round(100 * (self._feed.waited_s - self._waited) / elapsed, 2)
        values["elapsed_s"] = elapsed
        self._restart()
        return values


def _shown(values: dict[str, float]) -> dict[str, str]:
    shown = {"loss": f"{values['loss']:.3f}"}
    shown |= {key: f"{value:.2f}" for key, value in values.items() if key.endswith(("top1", "agreement"))}
    return shown | {"img/s": f"{values['images_per_s']:.0f}", "wait": f"{values['data_wait_pct']:.0f}%"}


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every global generator: Python, NumPy, torch and the device."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
