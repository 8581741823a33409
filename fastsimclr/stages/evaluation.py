"""Linear and nearest-neighbour evaluation of a pretrained encoder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from fastsimclr.evaluate import calibrate_bn, extract, knn, logistic_regression, raw_pixels
from fastsimclr.models import Classifier, ClassifierNet, ModelConfig, ProjectionHead, build_encoder
from fastsimclr.objectives import CrossEntropy
from fastsimclr.stages.networks import digest, load_encoder
from fastsimclr.stages.setting import Setting
from fastsimclr.stages.training import classifier_metrics, train, write_evaluation, write_result

_CALIBRATION_IMAGES = 4096


def evaluate_linear(setting: Setting, source: Path, run: Path, resume: bool) -> dict[str, Any]:
    """Linear evaluation of the encoder of run `source`; the result is also in run/result.json."""
    config = setting.recipe.linear
    if config.method == "sgd":
        return _linear_sgd(setting, source, run, resume)
    start = time.perf_counter()
    labelled = setting.labelled(config.labels)
    encoder = setting.runtime.place(load_encoder(source)[0]).eval()
    bank = extract(encoder, setting.passes(labelled), setting.evaluation_policy, setting.runtime)
    test = extract(encoder, setting.passes(setting.splits.val), setting.evaluation_policy, setting.runtime)
    metrics, iterations = logistic_regression(bank, test, len(labelled.classes), l2=config.l2)
    facts = {"method": "lbfgs", "iterations": iterations, "labels": len(labelled)}
    return write_evaluation(setting, run, "linear", metrics, facts, encoder, time.perf_counter() - start)


def _linear_sgd(setting: Setting, source: Path, run: Path, resume: bool) -> dict[str, Any]:
    recipe = setting.recipe
    config = recipe.linear
    labelled = setting.labelled(config.labels)
    encoder, facts = load_encoder(source)
    head = ProjectionHead(encoder.out_channels, 0)
    network = ClassifierNet(encoder, head, Classifier(encoder.out_channels, len(labelled.classes)))
    outcome = train(
        setting,
        stage="linear",
        run=run,
        objective=CrossEntropy(network, frozen_body=True),
        source=labelled,
        config=config,
        policy=setting.crop_flip_policy(),
        facts=facts | {"classes": list(labelled.classes), "head_layer": 0, "start": digest(encoder)},
        resume=resume,
    )
    metrics = classifier_metrics(setting, network)
    return write_result(setting, run, outcome, metrics=metrics, network=network, labels=len(labelled))


def evaluate_knn(setting: Setting, source: Path, run: Path, resume: bool) -> dict[str, Any]:
    """kNN evaluation of the encoder of run `source`, beside raw pixels and the untrained network."""
    start = time.perf_counter()
    recipe, runtime = setting.recipe, setting.runtime
    config, policy = recipe.knn, setting.evaluation_policy
    labelled, val = setting.labelled(config.labels), setting.splits.val

    def measure(network: Any) -> dict[str, float]:
        bank = extract(network, setting.passes(labelled), policy, runtime)
        test = extract(network, setting.passes(val), policy, runtime)
        return knn(bank, test, len(labelled.classes), k=config.k, temperature=config.temperature)

    trained, made = load_encoder(source)
    encoder = runtime.place(trained).eval()
    metrics = measure(encoder)
    if config.baselines:
        torch.manual_seed(recipe.seed)
        untrained = runtime.place(build_encoder(ModelConfig(**made["model"]), made["size"]))
        calibrate_bn(untrained, setting.passes(setting.first(labelled, _CALIBRATION_IMAGES)), policy, runtime)
        metrics["untrained_top1"] = measure(untrained)["top1"]
        metrics["raw_pixels_top1"] = measure(raw_pixels)["top1"]
    facts = {"k": min(config.k, len(labelled)), "temperature": config.temperature, "labels": len(labelled)}
    return write_evaluation(setting, run, "knn", metrics, facts, encoder, time.perf_counter() - start)
