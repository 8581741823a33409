"""The published evaluation protocols of one run in a row, each in its own folder, going on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastsimclr.evaluation.config import EvaluateConfig
from fastsimclr.loaders import DataError, label_subset
from fastsimclr.loaders.sets.splits import counts_of
from fastsimclr.methods.config import Labels
from fastsimclr.models import ModelConfig
from fastsimclr.recipe import Recipe, changes, dump_recipe
from fastsimclr.runs.log import logger
from fastsimclr.runs.text import write_text
from fastsimclr.stages.classifiers import finetune
from fastsimclr.stages.evaluation import evaluate_knn, evaluate_linear
from fastsimclr.stages.measured import as_json, report_entries
from fastsimclr.stages.networks import classifier_and_facts, digest, load_trained
from fastsimclr.stages.published import published_entry
from fastsimclr.stages.setting import Setting
from fastsimclr.stages.training import classifier_score, write_evaluation

Stage = Callable[[Setting, Path, Path, bool], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One row of the table: its name, its folder, the stage that measures it, and that stage's recipe.

    published: whether the papers' numbers were measured so.
    """

    name: str
    folder: str
    stage: Stage
    recipe: Recipe
    published: bool = True


def evaluate(recipe: Recipe, source: Path, out: Path, resume: bool) -> dict[str, Any]:
    """Every protocol of recipe.evaluate on the encoder of run `source`, or the report on it where it is a classifier.

    Each in its own folder under `out`; out/evaluation.json, which is returned, grows with them: under "protocols" a row
    each, under "report" the whole result of a classifier. With `resume`, what is done is not measured again, a stopped
    training goes on, and rows of protocols that are no longer asked for stay. FileExistsError where `out` holds
    something else.
    """
    setting = Setting(recipe)
    ranks = setting.ranks
    evaluated, before = ranks.on_first(lambda: _claim(recipe, source, out, resume))
    a_classifier = bool(evaluated["classes"])
    protocols = [_report_of(recipe, evaluated["stage"])] if a_classifier else list(_protocols(setting, recipe))
    rows = {row["folder"]: row for row in before}
    evaluation: dict[str, Any] = {"network": evaluated, "environment": setting.environment, "protocols": before}
    for protocol in protocols:
        run, its_recipe = out / protocol.folder, protocol.recipe
        result = ranks.on_first(lambda run=run, its_recipe=its_recipe: _done(run, its_recipe))  # type: ignore[misc]
        if result is not None:
            logger.info("%s: done before, in %s", protocol.name, run / "result.json")
        else:
            result = protocol.stage(setting.with_recipe(its_recipe), source, run, True)
        rows[protocol.folder] = _row(protocol, result)
        evaluation["protocols"] = list(rows.values())
        if a_classifier:
            evaluation["report"] = result
        if ranks.is_first:
            write_text(out / "evaluation.json", as_json(evaluation))
    return evaluation


def _claim(recipe: Recipe, source: Path, out: Path, resume: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is evaluated, and the rows that `out` has of it; `out` is then a folder for it."""
    network, stage, facts = load_trained(source)
    evaluated = {"run": str(source), "stage": stage, "classes": len(facts["classes"]), "weights": digest(network)}
    path = out / "evaluation.json"
    rows: list[dict[str, Any]] = []
    if path.is_file():
        held = json.loads(path.read_text())
        before, rows = held["network"], held["protocols"]
        if not resume:
            raise FileExistsError(
                f"{out} holds an evaluation of {before['run']}; go on with --resume auto, or give another --out"
            )
        if before["weights"] != evaluated["weights"]:
            raise FileExistsError(
                f"{out} holds an evaluation of {before['run']} with other weights than {source}; give another --out"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty and holds no evaluation; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "recipe.yaml", dump_recipe(recipe))
    if not path.is_file():
        write_text(path, as_json({"network": evaluated, "protocols": []}))
    return evaluated, rows


def _protocols(setting: Setting, recipe: Recipe) -> Iterator[Protocol]:
    linear, asked = recipe.linear, recipe.evaluate.protocols
    if "knn" in asked:
        near = replace(recipe.knn, labels="all")
        yield Protocol(name="kNN", folder="knn", stage=evaluate_knn, recipe=_with(recipe, knn=near))
    if "logistic" in asked:
        fitted = replace(linear, method="lbfgs", labels="all", sweep_lr=(), sweep_weight_decay=())
        name, plain = "logistic regression", _with(recipe, linear=fitted)
        yield Protocol(name=name, folder="logistic", stage=evaluate_linear, recipe=plain, published=False)
    if "linear" in asked:
        steps = replace(linear, method="sgd", labels="all", sweep_l2=())
        yield Protocol(name="linear", folder="linear", stage=evaluate_linear, recipe=_with(recipe, linear=steps))
    if "finetune" in asked:
        yield from _finetunings(setting, recipe)


def _finetunings(setting: Setting, recipe: Recipe) -> Iterator[Protocol]:
    config, train = recipe.evaluate, setting.splits.train
    counts = counts_of(train)
    for i, fraction in enumerate(config.fractions):
        name, whole = f"fine-tuned on {100 * fraction:g} %", fraction == 1
        listed = config.lists[i] if config.lists else None
        data = replace(recipe.data, label_fraction=fraction, labels_per_class=None, label_list=None)
        if listed is not None:
            data = replace(data, label_fraction=None, label_list=listed)
            share = setting.ranks.on_first(lambda data=data: len(label_subset(train, data))) / len(train)  # type: ignore[misc]
            if abs(share / fraction - 1) > 0.05:
                raise DataError(
                    f"evaluate.lists: {listed} holds {share:.4f} of the labelled training images, where"
                    f" evaluate.fractions says {fraction}; give the lists in the order of the fractions"
                )
        elif len(few := np.flatnonzero(np.rint(fraction * counts) < 1)):
            logger.info(
                "%s: left out, class %s has %d labels, of which that share is none",
                name,
                train.classes[few[0]],
                counts[few[0]],
            )
            continue
        tuned = replace(
            recipe.finetune,
            labels="all" if whole and listed is None else "subset",
            head_layer=0 if whole else recipe.finetune.head_layer,
            epochs=config.epochs[i] if config.epochs else 60 if fraction < 0.1 else 30,
        )
        made = _with(recipe, data=data, finetune=tuned)
        yield Protocol(name=name, folder=f"finetune-{100 * fraction:g}", stage=finetune, recipe=made)


def _with(recipe: Recipe, **sections: Any) -> Recipe:
    """The recipe of one protocol, which those of the others do not change."""
    return replace(recipe, evaluate=EvaluateConfig(), **sections)


def _report_of(recipe: Recipe, stage: str) -> Protocol:
    """The report on a classifier of that stage."""
    labels: dict[str, Labels] = {"linear": recipe.linear.labels, "finetune": recipe.finetune.labels}

    def measure(setting: Setting, source: Path, run: Path, resume: bool) -> dict[str, Any]:
        start = time.perf_counter()
        network, made = setting.ranks.on_first(lambda: classifier_and_facts(source))
        here, classes = setting.splits.val, tuple(made["classes"])
        if here.classes != classes:
            raise DataError(
                f"the classifier {source} knows {len(classes)} classes ({', '.join(classes[:3])}, …), the validation"
                f" data {here.name} has {len(here.classes)} ({', '.join(here.classes[:3])}, …);"
                " give images of the same classes"
            )
        setting.runtime.to_device(network)
        found = classifier_score(setting, network)
        own = setting.ranks.on_first(lambda: _result_of(source))
        learned = own.get("labels")
        facts = {"of": stage, **({} if learned is None else {"labels": learned}), **report_entries(setting, found)}
        # An import has measured nothing. What was measured, and not found comparable, is not so now.
        comparable = not own.get("metrics") or bool(own.get("published"))
        if comparable and stage in ("linear", "finetune", "distill"):
            model = ModelConfig(**made["model"])
            facts |= published_entry(setting, stage, model, labels.get(stage, recipe.finetune.labels))
        return write_evaluation(setting, run, "report", found.metrics, facts, network, time.perf_counter() - start)

    return Protocol(name=f"{stage}, as it is", folder="report", stage=measure, recipe=_with(recipe))


def _result_of(source: Path) -> dict[str, Any]:
    """What the run of a classifier says of it; nothing where it has not ended."""
    path = (source.parent.parent if source.is_file() else source) / "result.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return result


def _done(run: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The result in folder `run`, if there is one. FileExistsError where it was begun with another recipe."""
    if not (run / "recipe.yaml").is_file():
        return None
    if found := changes((run / "recipe.yaml").read_text(), recipe.at_smoke_size()):
        raise FileExistsError(
            f"{run} was begun with other settings ({'; '.join(found[:3])}); give the same to go on, or another --out"
        )
    path = run / "result.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _row(protocol: Protocol, result: dict[str, Any]) -> dict[str, Any]:
    known = result.get("published") if protocol.published else None
    groups = result.get("subgroups")
    return {
        "protocol": protocol.name,
        "folder": protocol.folder,
        "labels": result.get("labels"),
        **{key: result["metrics"].get(key) for key in ("top1", "top5", "ece", "nll")},
        "published": known[0] if known else None,
        **({} if groups is None else {"worst_subgroup": groups["worst"]}),
        "seconds": result["seconds"],
    }
