"""The whole chain: pretrain, knn, linear, supervised, finetune, distill, going on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsimclr.recipe import Recipe, changes, dump_recipe
from fastsimclr.runs.log import logger
from fastsimclr.runs.text import write_text
from fastsimclr.stages.registry import STAGES, chain_steps
from fastsimclr.stages.setting import Setting

Results = dict[str, dict[str, Any]]


def run_chain(recipe: Recipe, out: Path) -> Results:
    """Every stage in its own folder under `out`. A stage with a result.json is not run again; a stopped one goes on.

    Raises FileExistsError if `out` holds a run of another recipe.
    """
    setting = Setting(recipe)
    steps = chain_steps(recipe.distill.self_first)
    first = setting.ranks.on_first
    first(lambda: _claim(recipe, out))
    results: Results = first(lambda: _done(out, [step.folder for step in steps]))
    for step in steps:
        stage, run = step.folder, out / step.folder
        if stage in results:
            logger.info("%s: done before, in %s", stage, run / "result.json")
            continue
        starts = [] if step.after is None else [str(out / step.after)]
        own = setting
        if step.into_itself:
            own = setting.with_recipe(replace(recipe, distill=replace(recipe.distill, into_itself=True)))
        result = STAGES[step.stage].run(own, starts, run, resume=True)
        results[stage] = result
        logger.info("%s: %s", stage, _brief(result))
    results = {step.folder: results[step.folder] for step in steps}
    if setting.ranks.is_first:
        write_text(out / "result.json", json.dumps(results, indent=2) + "\n")
    return results


def run_seeds(recipe: Recipe, out: Path, seeds: int) -> list[Results]:
    """The chain once, or with several seeds (of weights, views and the draw of labels) in folders seed-S."""
    if seeds < 1:
        raise ValueError(f"--seeds {seeds} must be at least 1")
    if seeds == 1:
        return [run_chain(recipe, out)]
    every = []
    for shift in range(seeds):
        seed = recipe.seed + shift
        data = replace(recipe.data, label_seed=recipe.data.label_seed + shift)
        every.append(run_chain(replace(recipe, seed=seed, data=data), out / f"seed-{seed}"))
    return every


def _done(out: Path, stages: Sequence[str]) -> Results:
    files = {stage: out / stage / "result.json" for stage in stages}
    return {stage: json.loads(path.read_text()) for stage, path in files.items() if path.is_file()}


def _claim(recipe: Recipe, out: Path) -> None:
    path = out / "recipe.yaml"
    begun = any((out / stage / "recipe.yaml").is_file() for stage in STAGES)
    if begun and path.is_file() and (found := changes(path.read_text(), recipe)):
        raise FileExistsError(
            f"{out} holds a run of another recipe ({'; '.join(found[:3])});"
            " give the same settings to go on, or another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, dump_recipe(recipe))


def _brief(result: dict[str, Any]) -> str:
    shown = result["metrics"] or {key: result["training"][key] for key in ("loss", "images_per_s")}
    return ", ".join(f"{key} {value:.3f}" for key, value in shown.items())
