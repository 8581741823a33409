"""The whole chain: pretrain, linear, knn, finetune, supervised, distill, going on where it stopped."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsimclr import checkpoint
from fastsimclr.recipe import Recipe, dump_recipe
from fastsimclr.runlog import logger
from fastsimclr.stages.classifiers import distill, finetune, supervised
from fastsimclr.stages.evaluation import evaluate_knn, evaluate_linear
from fastsimclr.stages.pretrain import pretrain
from fastsimclr.stages.setting import Setting

Results = dict[str, dict[str, Any]]


def run_chain(recipe: Recipe, out: Path) -> Results:
    """Every stage in its own folder under `out`. A stage with a result.json is not run again; a stopped one goes on.

    Raises FileExistsError if `out` holds a run of another recipe.
    """
    _claim(recipe, out)
    setting: Setting | None = None
    results: Results = {}
    for stage in ("pretrain", "knn", "linear", "supervised", "finetune", "distill"):
        run = out / stage
        done = run / "result.json"
        if done.is_file():
            logger.info("%s: done before, in %s", stage, done)
            results[stage] = json.loads(done.read_text())
            continue
        setting = setting or Setting(recipe)
        match stage:
            case "pretrain":
                result = pretrain(setting, run, resume=True)
            case "knn":
                result = evaluate_knn(setting, out / "pretrain", run, resume=True)
            case "linear":
                result = evaluate_linear(setting, out / "pretrain", run, resume=True)
            case "supervised":
                result = supervised(setting, run, resume=True)
            case "finetune":
                result = finetune(setting, out / "pretrain", run, resume=True)
            case _:
                result = distill(setting, out / "finetune", run, resume=True)
        results[stage] = result
        logger.info("%s: %s", stage, _brief(result))
    checkpoint.write_text(out / "result.json", json.dumps(results, indent=2) + "\n")
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


def _claim(recipe: Recipe, out: Path) -> None:
    path, text = out / "recipe.yaml", dump_recipe(recipe)
    if path.is_file() and path.read_text() != text:
        pairs = zip(path.read_text().splitlines(), text.splitlines(), strict=False)
        before, now = next(((a, b) for a, b in pairs if a != b), ("", ""))
        raise FileExistsError(
            f"{out} holds a run of another recipe ({before.strip()!r} there, {now.strip()!r} now);"
            " give the same settings to go on, or another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(path, text)


def _brief(result: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.3f}" for key, value in result["metrics"].items()) or "done"


def summary(runs: list[Results]) -> str:
    """What each stage gave, as a table; with several runs mean ± standard deviation and the paired differences."""
    rows = [("", "top-1", "labels", "parameters", "seconds")]

    def row(name: str, stage: str, metric: str = "top1", own_network: bool = True) -> None:
        if metric not in runs[0][stage]["metrics"]:
            return
        result = runs[0][stage]
        seconds = [run[stage].get("seconds", run[stage].get("training", {}).get("seconds", 0.0)) for run in runs]
        parameters = f"{result['parameters']:,}" if own_network else "-"
        took = f"{sum(seconds) / len(seconds):.0f}" if own_network and metric == "top1" else "-"
        labels = f"{result['labels']:,}" if "labels" in result else "-"
        rows.append((name, spread([run[stage]["metrics"][metric] for run in runs]), labels, parameters, took))

    row("kNN, raw pixels", "knn", "raw_pixels_top1", own_network=False)
    row("kNN, untrained network", "knn", "untrained_top1")
    row("kNN, pretrained", "knn")
    row("linear on pretrained", "linear")
    row("fine-tuned", "finetune")
    row("supervised, same labels", "supervised")
    row("distilled student", "distill")
    widths = [max(len(line[column]) for line in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=True))) for r in rows]
    steps = runs[0]["pretrain"]["training"]
    took = sum(run["pretrain"]["training"]["seconds"] for run in runs) / len(runs)
    lines.insert(0, f"pretraining: {steps['steps']:,} steps, {took:.0f} s, {steps['images_per_s']:.0f} images/s at its end")
    for name, one, other in (("fine-tuned - supervised", "finetune", "supervised"), ("student - teacher", "distill", "finetune")):
        gains = [run[one]["metrics"]["top1"] - run[other]["metrics"]["top1"] for run in runs]
        lines.append(f"{name}: {spread(gains, signed=True)}")
    lines.append(f"{runs[0]['pretrain']['data']['val']:,} validation images, {runs[0]['pretrain']['environment']['device']}, seeds: {len(runs)}")
    return "\n".join(lines)


def spread(values: list[float], signed: bool = False) -> str:
    """The mean, with ± the sample standard deviation where there are several."""
    mean = sum(values) / len(values)
    text = f"{mean:+.3f}" if signed else f"{mean:.3f}"
    if len(values) == 1:
        return text
    return f"{text} ± {math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)):.3f}"
