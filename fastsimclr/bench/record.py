"""What a bench measures and how it is told: rounds in turn, a table, and a JSON file with every raw time."""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsimclr.bench.machine import clocks, machine
from fastsimclr.runs.log import logger as logger
from fastsimclr.runs.text import write_text
from fastsimclr.runtime.device import Runtime
from fastsimclr.runtime.environment import environment

FORMAT = 1
LAST = "rest"  # the phase that ends a step
Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Round:
    """One turn of one contestant. seconds: from a standing start to the end of the last step, waits included.

    step_s: seconds of each step. phase_s: seconds of each phase, summed over the steps.
    loss: mean over the steps. first_loss: that of the first step.
    """

    images: int
    seconds: float
    step_s: list[float]
    phase_s: dict[str, float]
    loss: float | None = None
    first_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One variant under measurement. `run` does one round; views: how many views of an image it makes.

    details: what a reader must know of it: precision, layout, parameters, time of set-up. flops: of an image in a step,
    0 where they are not counted. rival: False for a part of the work, of which no ratio is formed. prepare: what comes
    before its first round, compiling and capturing; gives the seconds.
    """

    name: str
    ours: bool
    views: int
    run: Callable[[], Round]
    details: dict[str, Any]
    flops: int = 0
    rival: bool = True
    prepare: Callable[[], float] | None = None


class Stopwatch:
    """Marks moments on a device without waiting for it: CUDA events there, the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.start()

    def start(self) -> None:
        """Forget all marks; time runs from here."""
        self._phases: list[str] = []
        self._moments = [self._now()]

    def mark(self, phase: str) -> None:
        """`phase` ends here. LAST ends a step."""
        self._phases.append(phase)
        self._moments.append(self._now())

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def round(self, batch: int, losses: Sequence[torch.Tensor] = ()) -> Round:
        """The marks since start as a round of steps of `batch` images and these losses. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        step_s: list[float] = []
        phase_s = dict.fromkeys(self._phases, 0.0)
        current = 0.0
        for phase, a, b in zip(self._phases, self._moments, self._moments[1:], strict=False):
            lap = b - a if self._device.type != "cuda" else a.elapsed_time(b) / 1e3
            phase_s[phase] += lap
            current += lap
            if phase == LAST:
                step_s.append(current)
                current = 0.0
        done = Round(images=batch * len(step_s), seconds=sum(step_s), step_s=step_s, phase_s=phase_s)
        if not losses:
            return done
        values = torch.stack(list(losses)).tolist()
        return replace(done, loss=statistics.mean(values), first_loss=values[0])


def measure(contestants: Sequence[Contestant], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row a contestant. All take turns, round by round; the first round is warm-up, reported and not counted."""
    turns: list[list[Round]] = [[] for _ in contestants]
    peaks = [0] * len(contestants)
    prepared: list[dict[str, float]] = [{} for _ in contestants]
    for turn in range(rounds + 1):
        for index, contestant in enumerate(contestants):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            if turn == 0 and contestant.prepare is not None:
                prepared[index] = {"prepared_s": round(contestant.prepare(), 3)}
            done = contestant.run()
            turns[index].append(done)
            if device.type == "cuda":
                peaks[index] = max(peaks[index], torch.cuda.max_memory_allocated(device))
            what = f"round {turn} of {rounds}" if turn else "warm-up"
            logger.info("%s: %s: %.1f images/s", what, contestant.name, done.images / done.seconds)
    return [_row(*each) for each in zip(contestants, turns, peaks, prepared, strict=True)]


def _row(contestant: Contestant, turns: list[Round], peak: int, prepared: dict[str, float]) -> dict[str, Any]:
    warmup, *counted = turns
    rates = [turn.images / turn.seconds for turn in counted]
    steps = [step for turn in counted for step in turn.step_s]
    seconds = sum(turn.seconds for turn in counted)
    phases = {key: 1e3 * sum(turn.phase_s[key] for turn in counted) / len(steps) for key in warmup.phase_s}
    losses = [turn.loss for turn in counted if turn.loss is not None]
    return {
        "name": contestant.name,
        "ours": contestant.ours,
        "rival": contestant.rival,
        "views_per_image": contestant.views,
        "images_per_s": spread(rates),
        "views_per_s": spread([contestant.views * rate for rate in rates]) if contestant.views else None,
        "step_ms": {f"p{share}": 1e3 * float(np.percentile(steps, share)) for share in (50, 90, 99)},
        "phase_ms": phases,
        "data_wait_pct": 100 * sum(turn.phase_s.get("wait", 0.0) for turn in counted) / seconds,
        "peak_memory_mib": peak / 2**20 or None,
        "flops_per_image": contestant.flops or None,
        "loss": statistics.mean(losses) if losses else None,
        "facts": contestant.details | prepared,
        "warmup": asdict(warmup),
        "rounds": [asdict(turn) for turn in counted],
    }


def seconds_an_image(row: dict[str, Any]) -> list[float]:
    """Of each counted round."""
    return [turn["seconds"] / turn["images"] for turn in row["rounds"]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """images/s of each of ours over each baseline of as many views, round by round: median and range."""
    found = []
    rivals = [row for row in rows if row["rival"]]
    for ours in (row for row in rivals if row["ours"]):
        alike = (row for row in rivals if not row["ours"] and row["views_per_image"] == ours["views_per_image"])
        for other in alike:
            pairs = zip(seconds_an_image(ours), seconds_an_image(other), strict=True)
            values = [b / a for a, b in pairs]
            found.append({"ours": ours["name"], "baseline": other["name"], **spread(values)})
    return found


def report(
    bench: str,
    config: dict[str, Any],
    runtime: Runtime,
    rows: list[dict[str, Any]],
    *,
    checks: dict[str, Any],
    notes: Sequence[str] = (),
) -> Report:
    """Rows and their ratios with all that a reader needs to repeat or doubt them. No ratios where losses are off."""
    alike, verdict = _losses_alike(rows)
    found = ratios(rows) if alike else []
    return frame(bench, config, runtime, rows, found, checks=checks | {"losses": verdict}, notes=notes)


def frame(
    bench: str,
    config: dict[str, Any],
    runtime: Runtime,
    rows: list[dict[str, Any]],
    ratio_rows: list[dict[str, Any]],
    *,
    checks: dict[str, Any],
    notes: Sequence[str],
) -> Report:
    """What every report has: rows and their ratios, `ratio_rows`, with device, versions, commit, settings and seed."""
    facts = environment(runtime)
    for key in ("precision", "channels_last"):  # each row has its own
        facts.pop(key)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "bench": bench,
        "format": FORMAT,
        "kind": runtime.device.type,
        "environment": facts | machine(runtime.device),
        "clocks": clocks(runtime.device),
        "config": config,
        "seed": config["seed"],
        "checks": checks,
        "notes": list(notes),
        "rows": rows,
        "ratios": ratio_rows,
        "process_peak_mib": round(peak / 2**20, 1),
    }


def _losses_alike(rows: Sequence[dict[str, Any]]) -> tuple[bool, str]:
    """Whether all losses are finite and the very first ones within a fifth of their median: the same task."""
    first = [row["warmup"]["first_loss"] for row in rows if row["loss"] is not None]
    if not first:
        return True, "nothing is trained"
    middle = statistics.median(first)
    alike = all(abs(loss - middle) <= 0.2 * middle for loss in first)
    finite = all(math.isfinite(row["loss"]) for row in rows if row["loss"] is not None)
    verdict = (
        "all finite, comparable" if alike and finite else "FAILED, not finite or not comparable; no ratio is given"
    )
    return alike and finite, f"{verdict}; first steps {', '.join(f'{loss:.3f}' for loss in first)}"


def write(path: Path, result: Report) -> None:
    """The report as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
