"""A study from its settings to its files: rows.csv, table.md, plot.png and study.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastsimclr.recipe import Recipe, dump_recipe
from fastsimclr.runs.text import write_text
from fastsimclr.studies.base import Study
from fastsimclr.studies.jobs import Outcomes, StudyJob, in_order, run_jobs, slots_of
from fastsimclr.studies.table import as_csv, as_markdown, rows_of


def run_study(
    study: Study, recipe: Recipe, out: Path, *, world: int = 1, is_first: bool = True
) -> tuple[str, Outcomes]:
    """Run what is not done yet, write the files to `out`, and return the table for people and what came of each job.

    world: ranks of this process's group, which then share each training; is_first: whether this one writes the files.
    ValueError where matplotlib is missing; see `run_jobs` for the rest.
    """
    if find_spec("matplotlib") is None:
        raise ValueError('a study draws its picture by matplotlib; pip install "fastsimclr[study]"')
    if world > 1 and study.side_by_side > 1:
        raise ValueError(
            f"--side_by_side {study.side_by_side} is for one process, not for {world} ranks; start it without"
            " torchrun, or leave it out"
        )
    slots = () if world > 1 else slots_of(recipe, study.side_by_side)
    cells = study.cells(recipe)
    jobs = in_order([cell.job for cell in cells])
    if is_first:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "recipe.yaml", dump_recipe(recipe))
    outcomes = run_jobs(jobs, out, slots)
    rows = rows_of(cells, outcomes)
    text = as_markdown(rows)
    if not is_first or not rows:
        return text, outcomes
    remarks = study.remarks(rows, out)
    cost = _cost(jobs, outcomes, len(slots) or 1)
    text = "\n\n".join([text, *(["\n".join(f"- {line}" for line in remarks)] if remarks else []), _told(cost)])
    write_text(out / "rows.csv", as_csv(rows, study.name))
    write_text(out / "table.md", f"# Study {study.name}\n\n{text}\n")
    facts = {
        "study": study.name,
        "settings": asdict(study),
        "cost": cost,
        "remarks": remarks,
        "failed": outcomes.failed,
        "rows": [asdict(row) for row in rows],
    }
    write_text(out / "study.json", json.dumps(facts, indent=2) + "\n")
    study.draw(rows, out / "plot.png")
    return text, outcomes


def _cost(jobs: Sequence[StudyJob], outcomes: Outcomes, side_by_side: int) -> dict[str, Any]:
    results = list(outcomes.results.values())
    return {
        "trainings": len(results),
        "seconds_of_steps": round(sum(result["seconds"] for result in results), 1),
        "wall_seconds": round(
            sum(outcomes.record[job.name]["wall_s"] for job in jobs if job.name in outcomes.record), 1
        ),
        "side_by_side": side_by_side,
        "environment": results[0]["environment"] if results else {},
    }


def _told(cost: dict[str, Any]) -> str:
    where = cost["environment"]
    return (
        f"Total: {cost['trainings']} trainings and evaluations, {cost['seconds_of_steps']:,.0f} s of steps,"
        f" {cost['wall_seconds']:,.0f} s of wall-clock time summed over them, {cost['side_by_side']} at a time, on"
        f" {where.get('device', '?')}, {where.get('precision', '?')}, torch {where.get('torch', '?')},"
        f" commit {where.get('commit', '?')}."
    )
