"""Linear and nearest-neighbour evaluation of a pretrained encoder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastsimclr.evaluation.features import Features, calibrate_bn, raw_pixels
from fastsimclr.evaluation.knn import knn
from fastsimclr.evaluation.logistic import logistic_regression
from fastsimclr.evaluation.scores import Score, score
from fastsimclr.loaders import DataError, Source, hold_out
from fastsimclr.methods import CrossEntropy, LinearSweep
from fastsimclr.models import Classifier, ClassifierNet, ModelConfig, ProjectionHead, build_encoder
from fastsimclr.optim import HeadSetting
from fastsimclr.runs import checkpoint
from fastsimclr.stages.measured import measure, report_entries
from fastsimclr.stages.networks import digest, load_encoder
from fastsimclr.stages.published import published_entry
from fastsimclr.stages.setting import Setting
from fastsimclr.stages.training import train, write_evaluation, write_scores

_CALIBRATION_IMAGES = 4096
_MOST_HELD_OUT = 10_000


def evaluate_linear(setting: Setting, source: Path, run: Path, resume: bool) -> dict[str, Any]:
    """Linear evaluation of the encoder of run `source`; the result is also in run/result.json."""
    config, ranks = setting.recipe.linear, setting.ranks
    if config.method == "sgd":
        return _linear_sgd(setting, source, run, resume)
    start = time.perf_counter()
    labelled = setting.labelled(config.labels)
    classes, l2 = len(labelled.classes), config.l2
    trained, made = ranks.on_first(lambda: load_encoder(source))
    encoder = setting.runtime.to_device(trained).eval()

    sweep: dict[str, Any] = {}
    if config.sweep_l2:
        rest, held = _held_out(setting, labelled)
        bank, choice = setting.features(encoder, rest), setting.features(encoder, held)
        tried = [
            logistic_regression(bank, classes, l2=each, ranks=ranks).score(choice, ranks) for each in config.sweep_l2
        ]
        sweep, chosen = _table(held, [{"l2": each} for each in config.sweep_l2], tried)
        l2, bank = config.sweep_l2[chosen], bank.and_also(choice)
    else:
        bank = setting.features(encoder, labelled)
    fitted = logistic_regression(bank, classes, l2=l2, ranks=ranks)
    test = setting.features(encoder, setting.splits.val)
    logits = fitted.logits(test)
    found = measure(setting, score(logits, test.labels, ranks), test, logits)
    facts = {
        "method": "lbfgs",
        "l2": l2,
        "iterations": fitted.iterations,
        "labels": len(labelled),
        **sweep,
        **report_entries(setting, found),
        **_published(setting, "linear", made),
    }
    return write_evaluation(setting, run, "linear", found.metrics, facts, encoder, time.perf_counter() - start)


def _linear_sgd(setting: Setting, source: Path, run: Path, resume: bool) -> dict[str, Any]:
    recipe = setting.recipe
    config, swept = recipe.linear, recipe.linear.swept
    labelled = setting.labelled(config.labels)
    encoder, made = setting.ranks.on_first(lambda: load_encoder(source))
    head = ProjectionHead(encoder.out_channels, 0)
    network = ClassifierNet(encoder, head, Classifier(encoder.out_channels, len(labelled.classes)))
    objective: CrossEntropy | LinearSweep = CrossEntropy(network, frozen_body=True)
    facts = made | {"classes": list(labelled.classes), "head_layer": 0, "start": digest(encoder)}
    held: Source | None = None
    if swept:
        highest = max(lr for lr, _ in swept)
        config = replace(config, optim=replace(config.optim, lr=highest))
        settings = [HeadSetting(lr_scale=lr / highest if highest else 0.0, weight_decay=decay) for lr, decay in swept]
        objective = LinearSweep(network, settings)
        facts["sweep"] = [list(pair) for pair in swept]
        labelled, held = _held_out(setting, labelled)
    outcome = train(
        setting,
        stage="linear",
        run=run,
        objective=objective,
        source=labelled,
        config=config,
        policy=setting.crop_flip_policy(),
        metadata=facts,
        resume=resume,
    )
    sweep: dict[str, Any] = {}
    if held is not None:
        assert isinstance(objective, LinearSweep)
        sweep = _choose(setting, run, objective, held, [{"lr": lr, "weight_decay": decay} for lr, decay in swept])
    entries = {"method": "sgd", "labels": len(labelled), **sweep}
    return write_scores(setting, run, outcome, network, entries, **_published(setting, "linear", made))


def _choose(
    setting: Setting, run: Path, objective: LinearSweep, held: Source, settings: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """Give the network, also that of the last checkpoint, the classifier that is best on `held`; {"sweep": ...}."""
    network = objective.network.eval()
    features = setting.features(network.features, held)
    values = features.values.to(next(objective.candidates.parameters()).dtype)
    with torch.no_grad():
        tried = [score(candidate(values), features.labels, setting.ranks) for candidate in objective.candidates]
    sweep, chosen = _table(held, settings, tried)
    objective.choose(chosen)

    def keep() -> None:
        state = checkpoint.load(checkpoint.newest(run))
        state["objective"] = {key: value.cpu() for key, value in objective.state_dict().items()}
        checkpoint.save(run, state, setting.recipe.trainer.keep_checkpoints)

    setting.ranks.on_first(keep)
    return sweep


def _held_out(setting: Setting, labelled: Source) -> tuple[Source, Source]:
    """(what a sweep trains on, what it chooses on): parts of the labelled training images, by the run's seed."""
    share = min(setting.recipe.linear.sweep_holdout, _MOST_HELD_OUT / len(labelled))
    rest, held = hold_out(labelled, share, setting.recipe.seed)
    if not len(held):
        raise DataError(
            f"{labelled.name} has one labelled image a class, none to choose a setting on; give more labels, or"
            " leave out the sweep of linear"
        )
    return rest, held


def _table(held: Source, settings: Sequence[dict[str, float]], tried: Sequence[Score]) -> tuple[dict[str, Any], int]:
    """({"sweep": what was tried, and what was chosen on how many images}, which): the first of the best."""
    rows = [setting | {"held_out_top1": found.top1} for setting, found in zip(settings, tried, strict=True)]
    chosen = max(range(len(rows)), key=lambda i: rows[i]["held_out_top1"])
    return {"sweep": {"held_out": len(held), "tried": rows, "chosen": dict(settings[chosen])}}, chosen


def _published(setting: Setting, stage: str, network_metadata: dict[str, Any]) -> dict[str, Any]:
    """The published accuracies of an encoder like this one; nothing where it learned from labels."""
    if network_metadata["classes"]:
        return {}
    labels = setting.recipe.linear.labels if stage == "linear" else setting.recipe.knn.labels
    return published_entry(setting, stage, ModelConfig(**network_metadata["model"]), labels)


def evaluate_knn(setting: Setting, source: Path, run: Path, resume: bool) -> dict[str, Any]:
    """kNN evaluation of the encoder of run `source`, beside raw pixels and the untrained network."""
    start = time.perf_counter()
    recipe, runtime, ranks = setting.recipe, setting.runtime, setting.ranks
    config, policy = recipe.knn, setting.evaluation_policy
    labelled, val = setting.labelled(config.labels), setting.splits.val

    def tried(network: Any) -> tuple[dict[tuple[int, float], Score], Features]:
        bank = setting.features(network, labelled)
        test = setting.features(network, val)
        classes = len(labelled.classes)
        return knn(bank, test, classes, ks=config.ks, temperatures=config.temperatures, ranks=ranks), test

    trained, made = ranks.on_first(lambda: load_encoder(source))
    encoder = runtime.to_device(trained).eval()
    table, test = tried(encoder)
    (k, temperature), first = next(iter(table.items()))
    found = measure(setting, first, test)
    metrics = dict(found.metrics)
    if config.baselines:
        torch.manual_seed(recipe.seed)
        untrained = runtime.to_device(build_encoder(ModelConfig(**made["model"]), made["size"]))
        few = setting.spread_subset(labelled, _CALIBRATION_IMAGES)
        calibrate_bn(untrained, setting.passes(few, sharded=False), policy, runtime)
        metrics["untrained_top1"] = next(iter(tried(untrained)[0].values())).top1
        metrics["raw_pixels_top1"] = next(iter(tried(raw_pixels)[0].values())).top1
    facts: dict[str, Any] = {"k": k, "temperature": temperature, "labels": len(labelled)}
    if len(table) > 1:
        facts["table"] = [{"k": k, "temperature": t, **entry.metrics} for (k, t), entry in table.items()]
    facts |= report_entries(setting, found) | _published(setting, "knn", made)
    return write_evaluation(setting, run, "knn", metrics, facts, encoder, time.perf_counter() - start)
