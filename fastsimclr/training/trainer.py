"""The training loop: one for pretraining, supervised training, linear evaluation, fine-tuning and distillation."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastsimclr.distributed.ranks import Agreement
from fastsimclr.distributed.torchrun import step_done
from fastsimclr.kernels.backend import choose
from fastsimclr.loaders import Batch, Policy
from fastsimclr.methods import Objective
from fastsimclr.models import ResNet, average_running_statistics, load_weights, set_fused
from fastsimclr.optim import Schedule, set_lr
from fastsimclr.runs import checkpoint
from fastsimclr.runs.log import RunLog, logger
from fastsimclr.runs.stop import StopFlag, Stopped
from fastsimclr.runs.text import differences, write_text
from fastsimclr.runtime.device import Runtime
from fastsimclr.runtime.malloc import freed_memory_kept
from fastsimclr.runtime.rng_state import rng_state, set_rng_state
from fastsimclr.training.config import TrainerConfig, bn_groups
from fastsimclr.training.cuda_graph import GraphedStep
from fastsimclr.training.feed import Feed, Shipment
from fastsimclr.training.hooks import Hook
from fastsimclr.training.meter import Meter, shown
from fastsimclr.training.step import Step, parallel

NOT_FINITE = "the loss is not finite"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, on what, and where its state goes. Everything the loop needs that is not a setting of the loop.

    batches(start, stop): the rank's batches for those steps. batch: images a step, over all ranks.
    facts: what must be equal for a resume to be exact.
    sizes: (share of the steps, side): from there on views are that large, instead of policy.size; rising shares.
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
    sizes: Sequence[tuple[float, int]] = ()

    def spans(self, step: int) -> Iterator[tuple[int, Policy]]:
        """The runs of steps of one size of views from `step` on: where each ends, and its policy."""
        total = self.schedule.total_steps
        starts = [(0, self.policy.size), *((math.ceil(share * total), size) for share, size in self.sizes)]
        for (_, size), (stop, _) in zip(starts, [*starts[1:], (total, 0)], strict=True):
            if step < stop:
                yield stop, replace(self.policy, size=size)


class Trainer:
    """Runs a job from step 0, or from its newest checkpoint, to the schedule's end. Every rank runs one.

    bn_groups: in how many parts of the global batch BN takes its statistics. micro: images of a rank at once; None is
    all.
    """

    def __init__(self, config: TrainerConfig, runtime: Runtime, job: Job) -> None:
        self.config, self.runtime, self.job = config, runtime, job
        self.ranks = runtime.ranks
        self.bn_groups = bn_groups(config, self.ranks)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        self.step = 0
        self.trained_s = 0.0
        self.last: dict[str, float] = {}
        self.micro: int | None = None
        self._prepare()

    def fit(self) -> dict[str, float]:
        """Train to the end and return the last record. Stopped when any rank was asked to stop first (state saved).

        FloatingPointError where the loss or the weights are no longer finite.
        """
        self._start()
        if self.step >= self.job.schedule.total_steps:
            return self.last
        try:
            return self._fit()
        except RuntimeError as error:
            if NOT_FINITE in str(error):
                raise self._broken("the loss became nan or infinite", self.step + 1) from None
            if "device-side assert" in str(error):
                what = "the loss became nan or infinite, or an index was out of range (see the line with Assertion)"
                raise self._broken(what, self.step + 1) from error
            raise

    def _fit(self) -> dict[str, float]:
        job, total = self.job, self.job.schedule.total_steps
        log = RunLog(job.run if self.ranks.first else None, title=job.stage, total_steps=total, from_step=self.step)
        job.objective.train()
        signum, path = 0, None
        with contextlib.closing(log), StopFlag() as flag, _garbage_left(), freed_memory_kept(self.runtime.device):
            stop, meter = Agreement(self.ranks), Meter(self.runtime)
            for end, policy in job.spans(self.step):
                batches, step = job.batches(self.step, end), self._step_of()
                with Feed(batches, policy, seed=job.seed, views=job.objective.views, runtime=self.runtime) as feed:
                    meter.follow(feed)
                    for shipment in feed:
                        rate = job.schedule(self.step)
                        self._train_step(step, shipment, policy, rate, meter)
                        self.step += 1
                        step_done()
                        signum = stop.propose(flag.signum or 0)  # read once: what comes later is for the next step
                        path = self._between_steps(log, meter, rate, stopping=signum > 0)
                        if signum:
                            break
                if signum:
                    break
            signum = stop.final(flag.signum or 0)  # which also waits for rank 0 and its file
            if signum:  # the state is saved: of this step, or of the last
                raise Stopped(signum, f"{job.stage}: stopped at step {self.step} of {total}, state saved in {path}")
        return self.last

    def _between_steps(self, log: RunLog, meter: Meter, rate: float, *, stopping: bool) -> Path | None:
        """What is due after a step: records, probes and checkpoints; the path of a checkpoint where one was written."""
        config = self.config
        save = stopping or self.step == self.job.schedule.total_steps or self.step % config.checkpoint_every_steps == 0
        if save or self.step % config.log_every_steps == 0:
            self.last = self._read(meter, rate)
            log.record("train", self.step, self.last)
            log.progress(self.step, shown(self.last))
            gc.collect(2 if save else 1)
        with meter.paused():
            self._run_hooks(log)
            return self._save() if save else None

    def _step_of(self) -> Step:
        """The step of views of one size."""
        step = parallel(
            self.job.objective,
            groups=self.bn_groups,
            runtime=self.runtime,
            timeout_s=self.config.timeout_s,
            micro=self.micro,
            bucket_mb=self.config.bucket_mb,
        )
        return GraphedStep(step, self.job.objective) if self.config.cuda_graph else step

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

    def _train_step(self, step: Step, shipment: Shipment, policy: Policy, rate: float, meter: Meter) -> None:
        optimizer = self.job.optimizer
        set_lr(optimizer, rate)
        with self.runtime.autocast():
            images = shipment.views(policy, self.runtime.view_dtype)
        outcome = step(images, shipment.labels, self.scaler.scale)
        if not self.scaler.is_enabled():  # with it no bad gradient reaches the weights, and the next log finds the loss
            torch._assert_async(torch.isfinite(outcome.loss), NOT_FINITE)  # on the device; nobody waits for it
        self.scaler.step(optimizer)
        self.scaler.update()
        self.job.objective.updated()
        optimizer.zero_grad(set_to_none=True)
        meter.add(len(shipment.ids), {"loss": outcome.loss, **outcome.metrics})

    def _read(self, meter: Meter, rate: float) -> dict[str, float]:
        values = meter.read()
        self.trained_s += values.pop("elapsed_s")
        # The loss is from before the step's update: the update may break weights that a checkpoint would keep.
        norms = torch._foreach_norm([parameter.detach() for parameter in self.job.objective.parameters()])
        broken = {"loss": values["loss"], "norm of the weights": torch.stack(norms).norm().item()}
        for name, value in broken.items():
            if math.isfinite(value):
                continue
            raise self._broken(f"the {name} became {value}", self.step)
        return {**values, "learning_rate": rate, "trained_s": round(self.trained_s, 3)}

    def _broken(self, what: str, step: int) -> FloatingPointError:
        return FloatingPointError(
            f"{self.job.stage}: {what} by step {step} (learning rate {self.job.schedule(step - 1):.4g});"
            " no checkpoint of it was written. Lower the learning rate or lengthen the warm-up, and start in"
            f" another --out, or go on from {checkpoint.folder(self.job.run)} with the stage's --resume auto"
        )

    def _prepare(self) -> None:
        """Set the networks up as the settings want them. ValueError for settings that do not fit."""
        config, job = self.config, self.job
        if config.cuda_graph and self.runtime.device.type != "cuda":
            raise ValueError(f"trainer.cuda_graph=True is for CUDA devices, not {self.runtime.device}; leave it out")
        if config.cuda_graph and self.ranks.world > 1:
            raise ValueError(
                f"trainer.cuda_graph=True is for one rank, not {self.ranks.world}: it was never tried with several;"
                " leave it out"
            )
        share = job.batch // self.ranks.world
        micro = config.at_once(share, joint=job.objective.joint, whole=f"{job.stage}.batch={job.batch}")
        self.micro = micro if micro < share else None
        if config.fused_bn:
            if not self.runtime.channels_last or self.runtime.precision == "fp64":
                raise ValueError(
                    f"trainer.fused_bn=True needs channels-last activations of 16 or 32 bits, not precision="
                    f"{self.runtime.precision} with channels_last={self.runtime.channels_last}; leave it out"
                )
            try:
                choose("batch_norm", "fused", self.runtime.device)
            except ValueError as error:
                raise ValueError(f"trainer.fused_bn=True cannot be had, leave it out: {error}") from None
        set_fused(job.objective, config.fused_bn)
        for module in job.objective.modules():
            if isinstance(module, ResNet):
                module.checkpoint_blocks = config.checkpoint_activations
                if config.compile:
                    module.compile()

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
            write_text(job.run / "recipe.yaml", job.recipe)

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
        """micro_batch: images of all ranks that go through the networks at once; null: the whole batch."""
        return {
            **self.job.facts,
            "batch": self.job.batch,
            "bn_groups": self.bn_groups,
            "micro_batch": None if self.micro is None else self.micro * self.ranks.world,
            "sizes": [list(pair) for pair in self.job.sizes],
        }

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
        state["facts"].setdefault("order", "random")  # nor these, when there was no other
        state["facts"].setdefault("micro_batch", None)
        state["facts"].setdefault("sizes", [])
        if self.micro is not None and self.ranks.world > 1:
            logger.info(
                "%s: at another number of ranks other images share a micro-batch, and with it BN statistics", job.stage
            )
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
                remedy = "a resume continues the same run: give the same settings and data, or another --out"
                raise checkpoint.CheckpointError(
                    f"checkpoint {path} was made with {key}={seen!r}, this run has {key}={value!r};"
                    f" {self._micro_batch_of(seen) if key == 'micro_batch' else remedy}"
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
        if changes := differences(state["recipe"], job.recipe):
            logger.warning("%s: the recipe has changed since, in %s", job.stage, "; ".join(changes))

    def _micro_batch_of(self, begun: int | None) -> str:
        """What to set so that `begun` images of all ranks go through the networks at once."""
        if begun is None:
            return "leave trainer.micro_batch out"
        world, both = self.ranks.world, "images of all ranks that go through the networks at once"
        if begun % world:
            return f"these are {both}, which {world} ranks cannot share; start a number of ranks that divides {begun}"
        return f"these are {both}; give {world} ranks trainer.micro_batch={begun // world}"


@contextlib.contextmanager
def _garbage_left() -> Iterator[None]:
    """Python's own collections would stop the loop at any moment; the loop collects where it waits anyway.

    What is there before the loop, most of it modules, is collected once and then left out, if it was not before.
    """
    enabled, frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.disable()
    if not frozen:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()
