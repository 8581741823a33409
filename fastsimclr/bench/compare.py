"""Two reports of one bench, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastsimclr.bench.record import FORMAT
from fastsimclr.runs.text import aligned

# May differ: where things lie, and how the device was asked for.
_FREE = ("config.json", "config.root", "config.device", "config.plot", "config.profile")
_MORE: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("step p50 ms", ("step_ms", "p50"), ",.1f"),
    ("p99 ms", ("step_ms", "p99"), ",.1f"),
    ("peak MiB", ("peak_memory_mib",), ",.0f"),
    ("MFU %", ("mfu_pct",), ".1f"),
)


def compare(baseline: Path, candidate: Path) -> str:
    """Speed of `candidate` over `baseline` for each variant in both, and what differs between the two.

    ValueError for a file that is no report, or two of other benches, devices or settings: the keys are named.
    """
    a, b = _read(baseline), _read(candidate)
    differing = [
        f"{key} ({mine!r} and {other!r})" for key, mine, other in _keys(a, b) if mine != other and key not in _FREE
    ]
    if differing:
        raise ValueError(
            f"{baseline} and {candidate} cannot be compared, they differ in {', '.join(differing)}; measure alike"
        )
    rows = [("variant", f"{_unit(a)}/s, first", "second", "second / first")]
    mine, others = _rates(a), _rates(b)
    for name in mine:
        if name in others:
            x, y = mine[name], others[name]
            apart = x["max"] < y["min"] or y["max"] < x["min"]
            verdict = "" if apart else " (ranges overlap)"
            ratio = f"{y['median'] / x['median']:.3f}{verdict}"
            rows.append((name, f"{x['median']:,.1f}", f"{y['median']:,.1f}", ratio))
    rest = _more(_by_name(a), _by_name(b))
    only = [f"only in one: {name}" for name in sorted(set(mine) ^ set(others))]
    facts = sorted(a["environment"].keys() | b["environment"].keys())
    changed = [
        f"{key}: {a['environment'].get(key)} and {b['environment'].get(key)}"
        for key in facts
        if a["environment"].get(key) != b["environment"].get(key)
    ]
    return "\n".join([f"bench {a['bench']} on {a['environment']['device']}", *aligned(rows), *rest, *only, *changed])


def _unit(report: dict[str, Any]) -> str:
    return str(report["works"][0]["unit"]) if "works" in report else "images"


def _by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The row of each variant that ran, by its name and, where there are several, its piece of work."""
    several = len(report.get("works", ())) > 1
    ran = [row for row in report["rows"] if row["rounds"]]
    return {f"{row['group']}: {row['name']}" if several else row["name"]: row for row in ran}


def _rates(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    key = "per_s" if "works" in report else "images_per_s"
    return {name: row[key] for name, row in _by_name(report).items()}


def _more(mine: dict[str, dict[str, Any]], others: dict[str, dict[str, Any]]) -> list[str]:
    """Step times, memory and MFU, first -> second, of what both reports have of a variant."""
    both = [name for name in mine if name in others]
    columns = []
    for title, path, form in _MORE:
        pairs = {name: (_value(mine[name], path), _value(others[name], path)) for name in both}
        if any(None not in pair for pair in pairs.values()):
            columns.append((title, pairs, form))
    if not columns:
        return []
    lines = [("first -> second", *(title for title, _, _ in columns))]
    for name in both:
        cells = [(*pairs[name], form) for _, pairs, form in columns]
        shown = ("-" if x is None or y is None else f"{x:{form}} -> {y:{form}}" for x, y, form in cells)
        lines.append((name, *shown))
    return ["", *aligned(lines)]


def _value(row: dict[str, Any], path: tuple[str, ...]) -> float | None:
    found: Any = row
    for key in path:
        found = (found or {}).get(key)
    return None if found is None else float(found)


def _keys(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    found = [("bench", a["bench"], b["bench"])]
    found += [(key, a["environment"].get(key), b["environment"].get(key)) for key in ("device", "threads")]
    found.append(("checks.images", a["checks"].get("images"), b["checks"].get("images")))
    settings = sorted(a["config"].keys() | b["config"].keys())
    return found + [(f"config.{key}", a["config"].get(key), b["config"].get(key)) for key in settings]


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is not JSON; give a file that fastsimclr bench wrote with --json") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT or "rows" not in result:
        raise ValueError(f"{path} is no bench report of format {FORMAT}; give a file that bench wrote with --json")
    return result
