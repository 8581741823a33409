"""A report of batches as text: one line a variant, then phases, ratios, checks and notes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastsimclr.bench.record import Report
from fastsimclr.runs.text import aligned

Row = dict[str, Any]


def heading(result: Report) -> list[str]:
    """Bench, device and versions, in two lines."""
    facts, rounds = result["environment"], result["config"].get("rounds", len(result["rows"][0]["rounds"]))
    label = "GPU" if result["kind"] == "cuda" else "CPU figures, which say nothing of a GPU"
    run = f"commit {facts['commit']}, seed {result['seed']}, {rounds} rounds in turn after a warm-up"
    return [f"bench {result['bench']} on {facts['device']} ({label})", f"torch {facts['torch']}, {run}"]


_Cell = Callable[[Row], str | None]


def _range(row: Row) -> str:
    rate = row["images_per_s"]
    return f"({rate['min']:,.1f}-{rate['max']:,.1f})"


def _step(share: str) -> _Cell:
    return lambda row: f"{row['step_ms'][share]:,.1f}" if share in row["step_ms"] else None


def _number(key: str, form: str) -> _Cell:
    return lambda row: None if row.get(key) is None else format(row[key], form)


_COLUMNS: tuple[tuple[str, _Cell], ...] = (
    ("images/s", lambda row: f"{row['images_per_s']['median']:,.1f}"),
    ("(range)", _range),
    ("views/s", lambda row: f"{row['views_per_s']['median']:,.1f}" if row["views_per_s"] else None),
    ("step p50 ms", _step("p50")),
    ("p90 ms", _step("p90")),
    ("p99 ms", _step("p99")),
    ("data wait %", _number("data_wait_pct", ".1f")),
    ("peak MiB", _number("peak_memory_mib", ",.0f")),
    ("MFU %", _number("mfu_pct", ".1f")),
    ("of GEMM %", _number("gemm_pct", ".1f")),
)


def table(result: Report) -> str:
    """The report for people. A column that no variant has a value for is left out."""
    rows = result["rows"]
    columns = [(title, cell) for title, cell in _COLUMNS if any(cell(row) is not None for row in rows)]
    lines = [("variant", *(title for title, _ in columns))]
    lines += [(row["name"], *(cell(row) or "-" for _, cell in columns)) for row in rows]
    phases = [
        f"  {row['name']}: " + ", ".join(f"{key} {ms:.1f}" for key, ms in row["phase_ms"].items())
        for row in rows
        if len(row["phase_ms"]) > 2
    ]
    ratios = [(f"{r['ours']} / {r['baseline']}", r) for r in result["ratios"]]
    return "\n".join(
        [
            *heading(result),
            "",
            *aligned(lines),
            *_section("ms a step by phase", phases),
            *_section("images/s, ours / baseline: median (range) over the rounds", _spreads(ratios)),
            *_section("derived: median (range)", _spreads([(d["name"], d) for d in result.get("derived", ())])),
            "",
            *(f"check: {key}: {f'{v:.3g}' if isinstance(v, float) else v}" for key, v in result["checks"].items()),
            *(f"note: {note}" for note in result["notes"]),
            f"note: peak memory of the process, all variants together: {result['process_peak_mib']:,.0f} MiB",
        ]
    )


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", title, *lines] if lines else []


def _spreads(named: Sequence[tuple[str, dict[str, float]]]) -> list[str]:
    return [f"  {name}: {v['median']:.2f} ({v['min']:.2f}-{v['max']:.2f})" for name, v in named]
