"""The trainings of a study: each a stage in its own folder, done once, one after the other or side by side on GPUs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fastsimclr import checkpoint, stages
from fastsimclr.recipe import Recipe, dump_recipe
from fastsimclr.runlog import logger
from fastsimclr.stopping import StopFlag, Stopped

_POLL_S = 0.2
_TIMES = "times.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage. name: its folder below the study's. It starts from the run of the job `after`, or from the run folder
    `start`, which no job of the study made; pretrain and supervised from nothing."""

    name: str
    stage: Literal["pretrain", "linear", "knn", "finetune", "supervised", "distill"]
    recipe: Recipe
    after: Job | None = None
    start: str | None = None

    def begins_at(self, out: Path) -> Path | None:
        """The run that it starts from."""
        if self.after is not None:
            return out / self.after.name
        return None if self.start is None else Path(self.start)

    @property
    def chain(self) -> tuple[Job, ...]:
        """The jobs that must be done for it, the first first, and itself."""
        return (*(self.after.chain if self.after is not None else ()), self)

    def command(self, out: Path) -> list[str]:
        """The words after `fastsimclr` that run it; its recipe is the file beside its folder."""
        words = [self.stage, "--config", str(self.file(out))]
        if (start := self.begins_at(out)) is not None:
            words += ["--teacher" if self.stage == "distill" else "--from", str(start)]
        return [*words, "--out", str(out / self.name), "--resume", "auto"]

    def file(self, out: Path) -> Path:
        """Where its recipe is kept."""
        return out / f"{self.name}.yaml"


@dataclass(kw_only=True)
class Outcomes:
    """results: of each finished job its result.json, by name. failed: why the others failed. wall_s: time of each job,
    decoding, probes and checkpoints included, over all calls."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    wall_s: dict[str, float] = field(default_factory=dict)

    def blocked(self, job: Job) -> bool:
        """Whether a job that it needs has failed."""
        return any(before.name in self.failed for before in job.chain)


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """Every job of the chains once, those that others need first. ValueError where two of one name differ."""
    found: dict[str, Job] = {}
    for job in (step for last in jobs for step in last.chain):
        if found.setdefault(job.name, job) != job:
            raise ValueError(f"two jobs are called {job.name} and differ; give each setting its own name")
    return list(found.values())


def run_jobs(jobs: Sequence[Job], out: Path, side_by_side: int) -> Outcomes:
    """Run what has no result yet. A job that fails is noted, and the others go on, but not where none has succeeded.

    side_by_side: 1: in this process; more: each in a process and on a GPU of its own, in turn.
    Raises Stopped when asked to stop, FileExistsError for a folder that holds a run of another recipe.
    """
    outcomes = Outcomes(wall_s=_times(out))
    for job in jobs:
        _check(job, out)
    waiting = [job for job in jobs if not _collect(job, out, outcomes)]
    if outcomes.results:
        logger.info("study: %d of %d trainings were done before", len(outcomes.results), len(jobs))
    (_one_by_one if side_by_side == 1 else _side_by_side)(waiting, out, outcomes, side_by_side)
    return outcomes


def _check(job: Job, out: Path) -> None:
    path = out / job.name / "recipe.yaml"
    if not path.is_file():
        return
    found = checkpoint.differences(path.read_text(), dump_recipe(job.recipe.at_smoke_size()))
    if changes := [change for change in found if not change.startswith(("trainer.", "device"))]:
        raise FileExistsError(
            f"{path.parent} holds a run of another recipe ({'; '.join(changes[:3])}); give the same settings to go on,"
            " or another --out"
        )


def _collect(job: Job, out: Path, outcomes: Outcomes) -> bool:
    path = out / job.name / "result.json"
    if path.is_file():
        outcomes.results[job.name] = json.loads(path.read_text())
    return path.is_file()


def _times(out: Path) -> dict[str, float]:
    path = out / _TIMES
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _took(job: Job, out: Path, outcomes: Outcomes, since: float) -> None:
    outcomes.wall_s[job.name] = round(outcomes.wall_s.get(job.name, 0.0) + time.perf_counter() - since, 2)
    checkpoint.write_text(out / _TIMES, json.dumps(outcomes.wall_s, indent=2) + "\n")


def _one_by_one(jobs: Sequence[Job], out: Path, outcomes: Outcomes, side_by_side: int) -> None:
    setting: stages.Setting | None = None
    for number, job in enumerate(jobs, start=1):
        if outcomes.blocked(job):
            outcomes.failed[job.name] = f"{job.after.name} failed" if job.after else "failed"
            continue
        logger.info("study: %d of %d: %s", number, len(jobs), job.name)
        start = time.perf_counter()
        try:
            setting = stages.Setting(job.recipe) if setting is None else setting.with_recipe(job.recipe)
            outcomes.results[job.name] = _run(job, setting, out)
        except Stopped:
            raise
        except Exception as error:
            if not outcomes.results or setting is None or setting.ranks.world > 1:
                raise
            outcomes.failed[job.name] = f"{type(error).__name__}: {error}"
            logger.error("study: %s failed: %s", job.name, error)
        finally:
            if setting is not None and setting.ranks.first:
                _took(job, out, outcomes, start)


def _run(job: Job, setting: stages.Setting, out: Path) -> dict[str, Any]:
    folder = out / job.name
    if job.stage == "pretrain":
        return stages.pretrain(setting, folder, resume=True)
    if job.stage == "supervised":
        return stages.supervised(setting, folder, resume=True)
    start = job.begins_at(out)
    assert start is not None  # the other stages start from a run
    stage = {
        "linear": stages.evaluate_linear,
        "knn": stages.evaluate_knn,
        "finetune": stages.finetune,
        "distill": stages.distill,
    }[job.stage]
    return stage(setting, start, folder, resume=True)


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = [str(index) for index in range(torch.cuda.device_count())]
    return named.split(",")[: len(every)] if named else every


def _side_by_side(jobs: Sequence[Job], out: Path, outcomes: Outcomes, side_by_side: int) -> None:
    places: list[tuple[int, str | None]] = [(k, None) for k in range(side_by_side)]
    if devices := gpus():
        places = [(k, devices[k % len(devices)]) for k in range(side_by_side)]
    waiting = list(jobs)
    running: dict[int, tuple[Job, subprocess.Popen[bytes], float]] = {}
    with StopFlag() as flag:
        try:
            while waiting or running:
                for place, (job, process, start) in list(running.items()):
                    if process.poll() is not None:
                        del running[place]
                        _took(job, out, outcomes, start)
                        _finished(job, process, out, outcomes, alone=not running)
                if flag.signum:
                    break
                for place, device in places:
                    job_now = None if place in running else _next(waiting, running, outcomes)
                    if job_now is not None:
                        waiting.remove(job_now)
                        running[place] = (job_now, _started(job_now, out, device), time.perf_counter())
                waiting = [job for job in waiting if not _left_out(job, outcomes)]
                time.sleep(_POLL_S)
        finally:
            for job, process, start in running.values():
                process.send_signal(signal.SIGTERM)  # each saves its state
                process.wait()
                _took(job, out, outcomes, start)
    if flag.signum:
        raise Stopped(flag.signum, f"study: stopped with {len(waiting) + len(running)} trainings to go, states saved")


def _next(waiting: Sequence[Job], running: dict[int, Any], outcomes: Outcomes) -> Job | None:
    """The first job whose start is there."""
    return next((job for job in waiting if job.after is None or job.after.name in outcomes.results), None)


def _left_out(job: Job, outcomes: Outcomes) -> bool:
    if outcomes.blocked(job):
        outcomes.failed[job.name] = f"{job.after.name} failed" if job.after else "failed"
    return job.name in outcomes.failed


def _started(job: Job, out: Path, device: str | None) -> subprocess.Popen[bytes]:
    file = job.file(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(file, dump_recipe(job.recipe))
    logger.info("study: %s%s", job.name, "" if device is None else f" on GPU {device}")
    environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    with file.with_suffix(".log").open("ab") as log:
        # A process group of its own: Ctrl-C is for the study, which stops its trainings itself.
        return subprocess.Popen(
            [sys.executable, "-m", "fastsimclr", *job.command(out)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _finished(job: Job, process: subprocess.Popen[bytes], out: Path, outcomes: Outcomes, *, alone: bool) -> None:
    log = job.file(out).with_suffix(".log")
    if process.returncode == 0 and _collect(job, out, outcomes):
        return
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    reason = f"{lines[-1] if lines else f'exit code {process.returncode}'} (see {log})"
    if alone and not outcomes.results:
        raise RuntimeError(f"{job.name}: {reason}")
    outcomes.failed[job.name] = reason
    logger.error("study: %s failed: %s", job.name, reason)
