"""Single calls under measurement, all candidates for one piece of work in turn: time, peak memory, roofline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from fastsimclr.bench.ceilings import Ceilings, measure_ceilings
from fastsimclr.bench.memory import Call, free_memory, peak_in_child, peak_on_gpu
from fastsimclr.bench.record import Report, Round, frame, logger, spread
from fastsimclr.loaders.shards.cache import GIB
from fastsimclr.runtime.device import Runtime

Row = dict[str, Any]
_MOST_CALLS = 10_000
Timed = Literal["graph", "events", "clock"]
HOW: dict[Timed, str] = {
    "graph": "CUDA graph: GPU time of its replay",
    "events": "CUDA events around calls launched one by one: waits for the host are in it",
    "clock": "the clock, results waited for",
}


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to do a bench's work. family, timed: as of a Candidate. cuda_only: whether it is left out on a CPU."""

    family: str
    timed: Timed = "graph"
    cuda_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One implementation of a piece of work.

    family: whose it is; of several in one family, the fastest is its best setting. make: inputs to a call without
    arguments; make_small: the same at a small size. Both are picklable, as partials of top-level functions are.
    items: of the work's unit, in one call. timed: how on CUDA (events where a graph cannot hold it); always the clock
    on a CPU. needs: bytes that it is known to allocate. rival: False where it does another job and stands for scale.
    fault: why no ratio is given, as its result is off. absent: why it cannot run.
    """

    name: str
    family: str
    make: Callable[[], Call]
    make_small: Callable[[], Call]
    items: int
    timed: Timed = "graph"
    needs: int = 0
    rival: bool = True
    fault: str | None = None
    absent: str | None = None

    @property
    def ours(self) -> bool:
        """Whether the others are compared with it."""
        return self.family == "ours"


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """What all candidates do; ours, as it runs by default, comes first.

    unit, items: what a rate counts, and how many make the work whole, to which milliseconds refer.
    bound: from the ceilings of the device to the seconds that they allow, and the reckoning in words.
    """

    name: str
    unit: str
    items: int
    bound: Callable[[Ceilings], tuple[float, str]]
    candidates: Sequence[Candidate]


def report_of_calls(
    bench: str,
    config: dict[str, Any],
    runtime: Runtime,
    works: Sequence[OpCase],
    *,
    round_ms: float,
    checks: dict[str, Any],
    notes: Sequence[str],
) -> Report:
    """Measures all works and the device's ceilings, these before and after, of which the better counts."""
    device = runtime.device
    ceilings = measure_ceilings(device)
    rows = [row for work in works for row in measure_case(work, config["rounds"], round_ms, device)]
    ceilings = ceilings.best(measure_ceilings(device))
    facts = []
    for work in works:
        bound_s, bound = work.bound(ceilings)
        facts.append({"name": work.name, "unit": work.unit, "items": work.items, "bound_s": bound_s, "bound": bound})
        for row in (row for row in rows if row["group"] == work.name and row["rounds"]):
            row["roofline_pct"] = 100 * 1e3 * bound_s / row["ms"]["median"]
    notes = [f"measured ceilings: {ceilings.words()}", *notes]
    report = frame(bench, config, runtime, rows, ratios_of(rows), checks=checks, notes=notes)
    return report | {"ceilings": asdict(ceilings), "works": facts}


def measure_case(work: OpCase, rounds: int, round_ms: float, device: torch.device) -> list[Row]:
    """One row a candidate, those that cannot run included. All take turns; the first round is warm-up.

    RuntimeError where one of ours cannot run; a baseline that fails has the reason in its row.
    """
    reasons: dict[str, str] = {}
    calls: dict[str, tuple[Call, Timed, int]] = {}
    for candidate in work.candidates:
        try:
            if candidate.absent:
                raise MemoryError(candidate.absent)
            calls[candidate.name] = _ready(candidate, device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            reasons[candidate.name] = _first_line(error) if isinstance(error, MemoryError) else "out of memory"
        except Exception as error:  # somebody else's code, which must not cost the other rows
            if candidate.ours:
                raise
            reasons[candidate.name] = f"failed: {_first_line(error)}"
        if candidate.name in reasons:
            logger.info("%s: %s", candidate.name, reasons[candidate.name])
    running = [candidate for candidate in work.candidates if candidate.name in calls]
    turns: dict[str, list[Round]] = {candidate.name: [] for candidate in running}
    counts = dict.fromkeys(turns, 1)
    for turn in range(rounds + 1):
        for candidate in running:
            call, timed, _ = calls[candidate.name]
            if candidate.name in reasons:
                continue
            try:
                laps = _turn(call, timed, counts[candidate.name], device)
            except Exception as error:  # memory that was enough before, say; the other rows must not be lost
                if candidate.ours:
                    raise
                reasons[candidate.name] = f"failed in round {turn}: {_first_line(error)}"
                continue
            done = Round(images=candidate.items * len(laps), seconds=sum(laps), step_s=laps, phase_s={})
            turns[candidate.name].append(done)
            each = done.seconds / len(done.step_s)
            if turn == 0:
                counts[candidate.name] = max(1, min(_MOST_CALLS, round(round_ms / 1e3 / each)))
            what = f"round {turn} of {rounds}" if turn else "warm-up"
            logger.info("%s: %s: %s: %.4g ms a call", work.name, what, candidate.name, 1e3 * each)
    rows = [
        _row(work, candidate, turns[candidate.name], *calls[candidate.name][1:])
        if candidate.name not in reasons
        else _missing(work, candidate, reasons[candidate.name])
        for candidate in work.candidates
    ]
    _name_best(rows)
    return rows


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _ready(candidate: Candidate, device: torch.device) -> tuple[Call, Timed, int]:
    """The call, how it is timed, and its peak memory in bytes, measured apart from the timed rounds."""
    if device.type != "cuda":
        free = free_memory()
        if free is not None and candidate.needs > free:
            raise MemoryError(f"needs about {candidate.needs / GIB:.1f} GiB, {free / GIB:.1f} GiB are free")
        return candidate.make(), "clock", peak_in_child(candidate.make_small, candidate.make)
    call = candidate.make()
    peak, timed = peak_on_gpu(call, device), candidate.timed
    if timed == "graph":
        try:
            _replayed(call, 1)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # it waits for the device somewhere, for example
            logger.info("%s: no CUDA graph holds it: %s", candidate.name, _first_line(error))
            timed = "events"
    torch.cuda.empty_cache()
    return call, timed, peak


def _turn(call: Call, timed: Timed, count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` calls. What a turn allocates on a GPU is given back before the next one's."""
    if timed == "clock":
        return [_clocked(call, device) for _ in range(count)]
    seconds = _replayed(call, count) if timed == "graph" else _between_events(call, count)
    torch.cuda.empty_cache()
    return [seconds / count] * count


def _clocked(call: Call, device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _between_events(run: Call, count: int) -> float:
    """Seconds of `count` runs on the GPU, the first of count + 1 left out."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    run()
    first.record()
    for _ in range(count):
        run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def _replayed(call: Call, count: int) -> float:
    """Seconds of `count` replays of the call in a CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a capture needs everything set up, and on a stream of its own
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return _between_events(graph.replay, count)


def _row(work: OpCase, candidate: Candidate, turns: Sequence[Round], timed: Timed, peak: int) -> Row:
    warmup, *counted = turns
    seconds = [turn.seconds / turn.images for turn in counted]  # of one item
    ms = spread([1e3 * work.items * each for each in seconds])
    return _head(work, candidate) | {
        "ms": ms,
        "per_s": spread([1 / each for each in seconds]),
        "peak_memory_mib": peak / 2**20,
        "timed_by": HOW[timed],
        "calls_a_round": len(counted[0].step_s),
        "warmup": _brief(warmup),
        "rounds": [_brief(turn) for turn in counted],
    }


def _brief(turn: Round) -> dict[str, Any]:
    """The round without the times of single calls, of which there may be thousands."""
    return {key: value for key, value in asdict(turn).items() if key in ("images", "seconds")}


def _missing(work: OpCase, candidate: Candidate, reason: str) -> Row:
    return _head(work, candidate) | {"reason": reason, "rounds": []}


def _head(work: OpCase, candidate: Candidate) -> Row:
    return {
        "name": candidate.name,
        "group": work.name,
        "family": candidate.family,
        "ours": candidate.ours,
        "items_a_call": candidate.items,
        "fault": candidate.fault,
        "rival": candidate.rival,
        "best_setting": False,
    }


def _name_best(rows: Sequence[Row]) -> None:
    """Marks the fastest row of each family that has several settings to choose from."""
    for family in {row["family"] for row in rows if not row["ours"]}:
        settings = [row for row in rows if row["family"] == family and row["rounds"] and not row["fault"]]
        if len(settings) > 1:
            min(settings, key=lambda row: row["ms"]["median"])["best_setting"] = True


def ratios_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each rival's time over that of each of ours, round by round, and its peak memory; faults have no ratio."""
    sound = [row for row in rows if row["rounds"] and row["rival"] and not row["fault"]]
    found = []
    for mine in (row for row in sound if row["ours"]):
        for other in (row for row in sound if not row["ours"] and row["group"] == mine["group"]):
            pairs = zip(mine["rounds"], other["rounds"], strict=True)
            values = [b["seconds"] / b["images"] * a["images"] / a["seconds"] for a, b in pairs]
            memory = other["peak_memory_mib"] / mine["peak_memory_mib"] if mine["peak_memory_mib"] else None
            found.append(
                {"group": mine["group"], "ours": mine["name"], "baseline": other["name"], "memory": memory}
                | spread(values)
            )
    return found
