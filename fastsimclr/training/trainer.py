"""The training loop: one for every stage that trains, for detection and for segmentation."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from fastsimclr.distributed.ranks import Agreement
from fastsimclr.distributed.torchrun import step_done
from fastsimclr.kernels.backend import choose
from fastsimclr.models import ResNet, set_fused
from fastsimclr.optim import set_lr
from fastsimclr.runs import checkpoint
from fastsimclr.runs.log import RunLog
from fastsimclr.runs.stop import StopFlag, Stopped
from fastsimclr.runtime.device import Runtime
from fastsimclr.runtime.malloc import freed_memory_kept
from fastsimclr.training.config import TrainerConfig
from fastsimclr.training.cuda_graph import GraphedStep
from fastsimclr.training.feed import Shipment
from fastsimclr.training.job import TrainingJob as TrainingJob
from fastsimclr.training.meter import Meter, shown
from fastsimclr.training.state import TrainingState
from fastsimclr.training.step import Step, parallel

NOT_FINITE = "the loss is not finite"


class Trainer(TrainingState):
    """Runs a job from step 0, or from its newest checkpoint, to the schedule's end. Every rank runs one."""

    def __init__(self, config: TrainerConfig, runtime: Runtime, job: TrainingJob) -> None:
        super().__init__(config, runtime, job)
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
        log = RunLog(job.run if self.ranks.is_first else None, title=job.stage, total_steps=total, from_step=self.step)
        job.objective.train()
        signum, path = 0, None
        with contextlib.closing(log), StopFlag() as flag, _garbage_left(), freed_memory_kept(self.runtime.device):
            stop, meter = Agreement(self.ranks), Meter(self.runtime)
            for end, policy in job.spans(self.step):
                crops = job.crops(policy)
                batches, step = job.batches(self.step, end, crops), self._step_of()
                with job.feed(batches, crops, self.runtime) as feed:
                    meter.follow(feed)
                    for shipment in feed:
                        rate = job.schedule(self.step)
                        self._train_step(step, shipment, rate, meter)
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

    def _train_step(self, step: Step, shipment: Shipment, rate: float, meter: Meter) -> None:
        optimizer = self.job.optimizer
        set_lr(optimizer, rate)
        with self.runtime.autocast():
            images = shipment.render(self.runtime.view_dtype)
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

    def _broken(self, failure: str, step: int) -> FloatingPointError:
        return FloatingPointError(
            f"{self.job.stage}: {failure} by step {step} (learning rate {self.job.schedule(step - 1):.4g});"
            " no checkpoint of it was written. Lower the learning rate or lengthen the warm-up, and start in"
            f" another --out, or go on from {checkpoint.folder(self.job.run)} with the stage's --resume auto"
        )

    def _prepare(self) -> None:
        """Set the networks up as the settings want them. ValueError for settings that do not fit."""
        config, job = self.config, self.job
        if config.cuda_graph and not self.runtime.captures:
            raise ValueError(f"trainer.cuda_graph=True is for CUDA devices, not {self.runtime.device}; leave it out")
        if config.cuda_graph and self.ranks.world > 1:
            raise ValueError(
                f"trainer.cuda_graph=True is for one rank, not {self.ranks.world}: it was never tried with several;"
                " leave it out"
            )
        share = job.batch // self.ranks.world
        micro = config.at_once(share, joint=job.objective.joint, batch_name=f"{job.stage}.batch={job.batch}")
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
