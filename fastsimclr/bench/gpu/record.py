"""The record of a part of the GPU check: jobs in order of importance within a time budget, written after each."""

from __future__ import annotations

import gc
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Entry = dict[str, Any]
Clock = Callable[[], float]
BROKEN = ("CUDA error", "device-side assert", "illegal memory access")
"""Errors after which the process cannot use the device any more."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of a job. expected_s: seconds on a cold machine. run: returns the entry, with ok=False on a failure."""

    name: str
    expected_s: float
    run: Callable[[], Entry]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A measurement or a check. sizes: the first one that fits in the remaining time and in memory runs.

    unless: names of jobs; the job is left out when one of them is ok.
    """

    name: str
    sizes: Sequence[Size]
    unless: Sequence[str] = ()


class Sheet:
    """Runs jobs and keeps their entries in a JSON file, which is complete after every entry.

    head: facts about the whole part. keep: start from the entries that the file already has.
    Status of an entry: running, ok, failed (a check), error (an exception) or dropped (no time was left).
    """

    def __init__(
        self,
        path: Path,
        head: Entry,
        budget_s: float,
        *,
        keep: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self._head, self._clock = path, head, clock
        self._end = clock() + budget_s
        self._expected_s = self._taken_s = 0.0
        self.entries: dict[str, Entry] = {}
        if keep and path.exists():
            self.entries = json.loads(path.read_text())["entries"]
        self.write()

    @property
    def left_s(self) -> float:
        """The seconds until the end of the budget."""
        return self._end - self._clock()

    @property
    def failed(self) -> list[str]:
        """The names of the jobs that failed a check or raised an exception."""
        return [name for name, entry in self.entries.items() if entry["status"] in ("failed", "error")]

    def run(self, jobs: Sequence[Job]) -> list[str]:
        """Run the jobs in order. Returns the names of those that need a new process: an error broke the device."""
        for number, job in enumerate(jobs):
            if any(self.entries.get(name, {}).get("status") == "ok" for name in job.unless):
                continue
            self._run(job)
            gc.collect()
            if any(text in self.entries[job.name].get("error", "") for text in BROKEN):
                return [other.name for other in jobs[number + 1 :]]
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.empty_cache()
        return []

    def put(self, name: str, **entry: Any) -> None:
        """Set an entry and write the file."""
        self.entries[name] = entry
        self.write()

    def write(self) -> None:
        """Write the file: completely or not at all."""
        status = [entry["status"] for entry in self.entries.values()]
        counts = {name: status.count(name) for name in sorted(set(status))}
        dropped = [name for name, entry in self.entries.items() if entry["status"] == "dropped"]
        text = json.dumps(
            _finite({**self._head, "counts": counts, "dropped": dropped, "entries": self.entries}), indent=1
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text + "\n")
        os.replace(temporary, self.path)

    def _run(self, job: Job) -> None:
        passed_over: dict[str, str] = {}
        status = "dropped"
        for size in job.sizes:
            # Machines are slower or faster than expected: the jobs so far tell by how much.
            expected_s = size.expected_s * max(1.0, self._taken_s / self._expected_s if self._expected_s else 1.0)
            if expected_s > self.left_s:
                passed_over[size.name] = f"it needs about {expected_s:.0f} s and {max(0.0, self.left_s):.0f} s are left"
                continue
            self.put(job.name, status="running", size=size.name, passed_over=passed_over)
            start = self._clock()
            try:
                entry = size.run()
            except (MemoryError, torch.OutOfMemoryError) as error:
                passed_over[size.name], status = f"out of memory: {str(error).partition('.')[0]}", "error"
                del error
                gc.collect()
                continue
            except Exception as error:  # it must not stop the jobs after it
                text = f"{type(error).__name__}: {error}"
                trace = traceback.format_exc().splitlines()[-12:]
                self.put(job.name, status="error", size=size.name, error=text, trace=trace, passed_over=passed_over)
                print(f"gpu-check: {job.name}: {text}", flush=True)
                return
            finally:
                self._expected_s, self._taken_s = (
                    self._expected_s + size.expected_s,
                    self._taken_s + self._clock() - start,
                )
            status = "ok" if entry.pop("ok", True) else "failed"
            facts = {"status": status, "size": size.name, "seconds": round(self._clock() - start, 2)}
            self.put(job.name, **facts, passed_over=passed_over, **entry)
            print(f"gpu-check: {job.name}: {status} in {facts['seconds']} s", flush=True)
            return
        self.put(job.name, status=status, passed_over=passed_over)
        print(f"gpu-check: {job.name}: {status}, {passed_over}", flush=True)


def _finite(value: Any) -> Any:
    """`value` with NaN and infinity as strings, as JSON has no numbers for them."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
