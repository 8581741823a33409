"""A report of single calls for people: a table a piece of work, beside ours; what runs how, and what failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastsimclr.bench.calls import Row
from fastsimclr.bench.record import Report
from fastsimclr.bench.table import heading
from fastsimclr.runs.text import aligned


def table_of_calls(result: Report) -> str:
    """The report for people: a table a piece of work, each variant beside ours as it runs by default."""
    lines = heading(result)
    for work in result["works"]:
        rows = [row for row in result["rows"] if row["group"] == work["name"]]
        first = next(row for row in rows if row["ours"])
        ratios = {
            r["baseline"]: r for r in result["ratios"] if (r["group"], r["ours"]) == (work["name"], first["name"])
        }
        head = (work["name"], "ms", "(range)", f"{work['unit']}/s", "peak MiB", "roofline %", "time / ours", "(range)")
        cells = [(*head, "memory / ours"), *(_cells(row, ratios.get(row["name"])) for row in rows)]
        lines += ["", *aligned(cells), f"roofline: {1e3 * work['bound_s']:.4g} ms, {work['bound']}"]
        lines += [f"{row['name']}: {row['reason']}" for row in rows if not row["rounds"]]
        lines += [f"{r['name']}: FAILED, no ratio is given: {r['fault']}" for r in rows if r["fault"]]
        lines += [f"{row['family']} at its best setting: {row['name']}" for row in rows if row["best_setting"]]
        for how in dict.fromkeys(row["timed_by"] for row in rows if row["rounds"]):
            names = ", ".join(row["name"] for row in rows if row.get("timed_by") == how)
            lines.append(f"timed by {how}: {names}")
    lines += _errors(result["op_errors"]) if "op_errors" in result else []
    lines += [
        "",
        *(f"check: {key}: {f'{v:.3g}' if isinstance(v, float) else v}" for key, v in result["checks"].items()),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])])


def _cells(row: Row, ratio: dict[str, Any] | None) -> tuple[str, ...]:
    if not row["rounds"]:
        return (row["name"], *("-",) * 8)
    ms = row["ms"]
    compared = ("-", "-", "-")
    if ratio is not None:
        times = f"{ratio['median']:.2f}", f"({ratio['min']:.2f}-{ratio['max']:.2f})"
        compared = (*times, f"{ratio['memory']:.1f}" if ratio["memory"] else "-")
    return (
        row["name"],
        f"{ms['median']:.4g}",
        f"({ms['min']:.4g}-{ms['max']:.4g})",
        _rate(row["per_s"]["median"]),
        f"{row['peak_memory_mib']:,.1f}",
        f"{row['roofline_pct']:.1f}",
        *compared,
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _errors(errors: Sequence[dict[str, Any]]) -> list[str]:
    """What each view op is off by, as a table."""
    head = ("op, |ours - theirs| of values in [0, 1]", "theirs", "views", "max", "mean", "max, uint8", "mean, uint8")
    keys = ("max", "mean", "uint8_max", "uint8_mean")
    cells = [
        (row["op"], row["oracle"], str(row["images"]), *("-" if row[k] is None else f"{row[k]:.1e}" for k in keys))
        for row in errors
    ]
    return ["", *aligned([head, *cells])]
