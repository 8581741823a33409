"""The trainings of a study: each a stage in its own folder, done once, one after the other or side by side on GPUs."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastsimclr import stages
from fastsimclr.loaders import thread_count
from fastsimclr.recipe import Recipe, StageName, changes, dump_recipe
from fastsimclr.runs import checkpoint
from fastsimclr.runs.log import logger
from fastsimclr.runs.stop import StopFlag, Stopped
from fastsimclr.runs.text import write_text

_POLL_S = 0.2
_RECORD = "jobs.json"


@dataclass(frozen=True, kw_only=True)
class StudyJob:
    """One stage. name: its folder below the study's. It starts from the run of the job `after`, or from the run folder
    `start`, which no job of the study made; pretrain and supervised from nothing."""

    name: str
    stage: StageName
    recipe: Recipe
    after: StudyJob | None = None
    start: str | None = None

    def begins_at(self, out: Path) -> Path | None:
        """The run that it starts from."""
        if self.after is not None:
            return out / self.after.name
        return None if self.start is None else Path(self.start)

    @property
    def chain(self) -> tuple[StudyJob, ...]:
        """The jobs that must be done for it, the first first, and itself."""
        return (*(self.after.chain if self.after is not None else ()), self)

    @cached_property
    def origin(self) -> str:
        """What it starts from, so that another start is known: a job of the study, or a run and its weights."""
        if self.after is not None:
            return self.after.name
        if self.start is None:
            return ""
        newest = checkpoint.newest(Path(self.start))
        with newest.open("rb") as file:
            return f"{self.start}, weights {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"

    def command(self, out: Path) -> list[str]:
        """The words after `fastsimclr` that run it; its recipe is the file beside its folder."""
        words = [self.stage, "--config", str(self.file(out))]
        if (start := self.begins_at(out)) is not None:
            words += ["--teacher" if stages.STAGES[self.stage].start == "teachers" else "--from", str(start)]
        return [*words, "--out", str(out / self.name), "--resume", "auto"]

    def file(self, out: Path) -> Path:
        """Where its recipe is kept."""
        return out / f"{self.name}.yaml"


@dataclass(kw_only=True)
class Outcomes:
    """results: of each finished job its result.json, by name. failed: why the others failed. record: of each job what
    it started from ("start"), and its seconds over all calls, decoding, probes and checkpoints included ("wall_s")."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    record: dict[str, dict[str, Any]] = field(default_factory=dict)


def in_order(jobs: Sequence[StudyJob]) -> list[StudyJob]:
    """Every job of the chains once, those that others need first. ValueError where two of one name differ."""
    found: dict[str, StudyJob] = {}
    for job in (step for last in jobs for step in last.chain):
        if found.setdefault(job.name, job) != job:
            raise ValueError(f"two jobs are called {job.name} and differ; give each setting its own name")
    return list(found.values())


def run_jobs(jobs: Sequence[StudyJob], out: Path, slots: Sequence[str | None]) -> Outcomes:
    """Run what has no result yet. A job that fails is noted, and the others go on, but not where none has succeeded.

    slots: empty: one after the other in this process; else as many at a time, each in a process of its own that sees
    one GPU, as CUDA_VISIBLE_DEVICES names it, or none. CUDA needs that: a loss that is no number ends its process.
    Raises Stopped when asked to stop, FileExistsError for a folder that holds a run of another recipe or start.
    """
    outcomes = Outcomes(record=_record(out))
    for job in jobs:
        _check(job, out, outcomes)
    waiting = [job for job in jobs if not _collect(job, out, outcomes)]
    if outcomes.results:
        logger.info("study: %d of %d trainings were done before", len(outcomes.results), len(jobs))
    if slots:
        _side_by_side(waiting, out, outcomes, slots)
    else:
        _one_by_one(waiting, out, outcomes)
    return outcomes


def _check(job: StudyJob, out: Path, outcomes: Outcomes) -> None:
    path = out / job.name / "recipe.yaml"
    if not path.is_file():
        return
    found = changes(path.read_text(), job.recipe.at_smoke_size())
    if (before := outcomes.record.get(job.name, {}).get("start", job.origin)) != job.origin:
        found.insert(0, f"started from: {before} -> {job.origin}")
    if found:
        raise FileExistsError(
            f"{path.parent} holds a run of another recipe ({'; '.join(found[:3])}); give the same settings to go on,"
            " or another --out"
        )


def _collect(job: StudyJob, out: Path, outcomes: Outcomes) -> bool:
    path = out / job.name / "result.json"
    if path.is_file():
        outcomes.results[job.name] = json.loads(path.read_text())
    return path.is_file()


def _record(out: Path) -> dict[str, dict[str, Any]]:
    path = out / _RECORD
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _note(job: StudyJob, out: Path, outcomes: Outcomes, seconds: float) -> None:
    before = outcomes.record.get(job.name, {}).get("wall_s", 0.0)
    outcomes.record[job.name] = {"start": job.origin, "wall_s": round(before + seconds, 2)}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / _RECORD, json.dumps(outcomes.record, indent=2) + "\n")


def _left_out(job: StudyJob, outcomes: Outcomes) -> bool:
    """Whether what it needs has failed; it is then noted as failed, too."""
    if job.after is not None and job.after.name in outcomes.failed:
        outcomes.failed[job.name] = f"{job.after.name} failed"
    return job.name in outcomes.failed


def _one_by_one(jobs: Sequence[StudyJob], out: Path, outcomes: Outcomes) -> None:
    setting: stages.Setting | None = None
    for number, job in enumerate(jobs, start=1):
        if _left_out(job, outcomes):
            continue
        logger.info("study: %d of %d: %s", number, len(jobs), job.name)
        start, first = time.perf_counter(), setting is None or setting.ranks.is_first
        try:
            setting = stages.Setting(job.recipe) if setting is None else setting.with_recipe(job.recipe)
            first = setting.ranks.is_first
            if first:
                _note(job, out, outcomes, 0.0)
            outcomes.results[job.name] = _run(job, setting, out)
        except Stopped:
            raise
        except Exception as error:
            if not outcomes.results or setting is None or setting.ranks.world > 1:
                raise
            outcomes.failed[job.name] = f"{type(error).__name__}: {error}"
            logger.error("study: %s failed: %s", job.name, error)
        finally:
            if first:
                _note(job, out, outcomes, time.perf_counter() - start)


def _run(job: StudyJob, setting: stages.Setting, out: Path) -> dict[str, Any]:
    start = job.begins_at(out)
    return stages.STAGES[job.stage].run(setting, [] if start is None else [str(start)], out / job.name, resume=True)


def slots_of(recipe: Recipe, side_by_side: int) -> tuple[str | None, ...]:
    """Where the trainings of a study run: see `run_jobs`. side_by_side: how many at a time; 0: one a GPU.

    ValueError for a GPU that is not there, where the recipe names one.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = [str(index) for index in range(torch.cuda.device_count())]
    devices = named.split(",")[: len(every)] if named else every
    if recipe.device == "cpu" or not devices:
        return (None,) * side_by_side if side_by_side > 1 else ()
    if recipe.device.startswith("cuda:"):
        number = int(recipe.device.removeprefix("cuda:"))
        if number >= len(devices):
            raise ValueError(f"device={recipe.device}: {len(devices)} GPUs are visible here; use --device auto")
        devices = [devices[number]]
    return tuple(devices[k % len(devices)] for k in range(side_by_side or len(devices)))


def _side_by_side(jobs: Sequence[StudyJob], out: Path, outcomes: Outcomes, slots: Sequence[str | None]) -> None:
    waiting = list(jobs)
    running: dict[int, tuple[StudyJob, subprocess.Popen[bytes], float]] = {}
    with StopFlag() as flag:
        try:
            while waiting or running:
                for slot, (job, process, start) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        _note(job, out, outcomes, time.perf_counter() - start)
                        _finished(job, process, out, outcomes, alone=not running)
                if flag.signum:
                    break
                waiting = [job for job in waiting if not _left_out(job, outcomes)]
                for slot, device in enumerate(slots):
                    ready = (job for job in waiting if job.after is None or job.after.name in outcomes.results)
                    if slot not in running and (following := next(ready, None)) is not None:
                        waiting.remove(following)
                        _note(following, out, outcomes, 0.0)
                        process = _started(following, out, device, len(slots))
                        running[slot] = following, process, time.perf_counter()
                time.sleep(_POLL_S)
        finally:
            for _, process, _ in running.values():
                process.send_signal(signal.SIGTERM)  # each saves its state
            for job, process, start in running.values():
                process.wait()
                _note(job, out, outcomes, time.perf_counter() - start)
    if flag.signum:
        raise Stopped(flag.signum, f"study: stopped with {len(waiting) + len(running)} trainings to go, states saved")


def _started(job: StudyJob, out: Path, device: str | None, slots: int) -> subprocess.Popen[bytes]:
    file = job.file(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    threads = job.recipe.data.threads or max(1, thread_count(0) // slots)
    recipe = replace(job.recipe, data=replace(job.recipe.data, threads=threads))
    recipe = recipe if device is None else replace(recipe, device="cuda")  # the only one that it sees
    write_text(file, dump_recipe(recipe))
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


def _finished(job: StudyJob, process: subprocess.Popen[bytes], out: Path, outcomes: Outcomes, *, alone: bool) -> None:
    log = job.file(out).with_suffix(".log")
    if process.returncode == 0 and _collect(job, out, outcomes):
        return
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    reason = f"{lines[-1] if lines else f'exit code {process.returncode}'} (see {log})"
    if alone and not outcomes.results:
        raise RuntimeError(f"{job.name}: {reason}")
    outcomes.failed[job.name] = reason
    logger.error("study: %s failed: %s", job.name, reason)
