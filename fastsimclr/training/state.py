"""The state of a training: saved in checkpoints, and restored where the facts of the run are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastsimclr.models import average_running_statistics, load_weights
from fastsimclr.runs import checkpoint
from fastsimclr.runs.log import logger
from fastsimclr.runs.text import differences, write_text
from fastsimclr.runtime.device import Runtime
from fastsimclr.runtime.rng_state import rng_state, set_rng_state
from fastsimclr.training.config import TrainerConfig, bn_groups
from fastsimclr.training.job import TrainingJob


class TrainingState:
    """The state of a training of `job`, saved in its run folder and restored from it. Every rank has one.

    step: steps done. trained_s: seconds that they took. last: the last record.
    bn_groups: number of parts of the global batch over which BN takes its statistics.
    micro: images of a rank per forward pass; None: all.
    """

    def __init__(self, config: TrainerConfig, runtime: Runtime, job: TrainingJob) -> None:
        self.config, self.runtime, self.job = config, runtime, job
        self.ranks = runtime.ranks
        self.bn_groups = bn_groups(config, self.ranks)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        self.step = 0
        self.trained_s = 0.0
        self.last: dict[str, float] = {}
        self.micro: int | None = None

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
        if self.ranks.is_first:
            write_text(job.run / "recipe.yaml", job.recipe)

    def _settle(self) -> None:
        """One set of BN statistics on all ranks, before anybody reads them."""
        average_running_statistics(self.job.objective, self.ranks.group)

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
            **self.job.metadata,
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
        if not self.ranks.is_first:
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
