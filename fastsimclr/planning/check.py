"""How well the model predicts: our own measurements that its fit left out, and published speeds."""

from __future__ import annotations

from collections.abc import Sequence

from fastsimclr.planning.published import POINTS, law, predicted
from fastsimclr.planning.rates import Measured, Rates, rates_of
from fastsimclr.runs.text import aligned

LIMIT = 0.25  # relative error of a held-out step


def check(measurements: Sequence[Measured]) -> tuple[str, bool]:
    """(tables, whether every measurement held out of the fit is predicted within LIMIT). Without any: the second alone.

    ValueError where measurements have none to fit or none held out.
    """
    if not measurements:
        return "\n".join(_published()), True
    lines, worst = _own(measurements)
    return "\n".join([*lines, "", *_published()]), worst <= LIMIT


def fitted(measurements: Sequence[Measured]) -> Rates:
    """Rates from those that are not held out. ValueError where that leaves nothing to fit, or nothing to check."""
    seen, held = [one for one in measurements if not one.held_out], [one for one in measurements if one.held_out]
    if not seen or not held:
        raise ValueError(
            f"{len(seen)} rows to fit and {len(held)} held out; give a report of bench grid, which has both"
        )
    return rates_of(seen, None)


def _own(measurements: Sequence[Measured]) -> tuple[list[str], float]:
    rates = fitted(measurements)
    rows = [("configuration", "role", "measured ms", "predicted ms", "error")]
    errors = []
    for one in sorted(measurements, key=lambda one: one.held_out):
        guess = rates.seconds(one.work())
        error = guess / one.seconds - 1
        if one.held_out:
            errors.append(abs(error))
        role = "held out" if one.held_out else "fitted"
        rows.append((one.name, role, f"{1e3 * one.seconds:,.1f}", f"{1e3 * guess:,.1f}", f"{error:+.1%}"))
    worst = max(errors)
    what = (
        "a GPU's steps" if measurements[0].kind == "cuda" else "a CPU's steps: they check the form of the model, no GPU"
    )
    return [
        f"{rates.origin}: {what}",
        f"  t = {rates.s_per_flop * 1e9:.4g} ns a FLOP + {rates.s_per_byte * 1e9:.4g} ns a byte"
        f" + {rates.s_per_op * 1e6:.4g} us an operation",
        "",
        *aligned(rows),
        "",
        f"held out: {len(errors)}, worst error {worst:.1%}, limit {LIMIT:.0%}:"
        f" {'kept' if worst <= LIMIT else 'MISSED'}",
    ], worst


def _published() -> list[str]:
    found = law()
    rows = [("published training speed, views/s of a GPU", "role", "published", "model", "error")]
    for point in POINTS:
        guess = predicted(point)
        error = guess / point.views_s - 1
        rows.append((point.name, point.role, f"{point.views_s:,.0f}", f"{guess:,.0f}", f"{error:+.0%}"))
    return [
        *aligned(rows),
        "",
        f"law: t = {found.a:.3f} flops/peak + {found.b:.3f} bytes/bandwidth + {1e6 * found.c:.2f} us an operation"
        f" (MLPerf's code), times {found.pytorch:.3f} for PyTorch",
        "end to end: neither loader nor evaluations are modelled, so the model gives what the GPUs alone would do",
        *(f"  {point.name}: {point.assumed}" for point in POINTS if point.assumed),
    ]
