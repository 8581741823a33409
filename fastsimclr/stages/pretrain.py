"""Contrastive pretraining: encoder and projection head on all images, no labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastsimclr.evaluation.knn import knn
from fastsimclr.evaluation.logistic import logistic_regression
from fastsimclr.methods import Contrastive, MomentumContrast
from fastsimclr.models import SimCLRNet, build_simclr
from fastsimclr.recipe import Recipe
from fastsimclr.runs.log import logger
from fastsimclr.stages.networks import network_facts
from fastsimclr.stages.setting import Setting
from fastsimclr.stages.training import train, write_result
from fastsimclr.training.hooks import Hook, steps_of


def pretrain(setting: Setting, run: Path, resume: bool) -> dict[str, Any]:
    """Train and return the result, which is also in run/result.json."""
    recipe = setting.recipe
    config = recipe.pretrain
    torch.manual_seed(recipe.seed)
    network = build_simclr(recipe.model, recipe.views.size)
    objective = _objective(recipe, network)
    source = setting.splits.unlabelled
    if config.memory > (most := 2 * max(0, len(source) - config.batch)):
        logger.warning(
            "pretrain: --pretrain.memory %d is more than two views of the %d images of %s less a batch of %d: earlier"
            " views of the batch's own images will be among the negatives; use at most %d",
            *(config.memory, len(source), source.name, config.batch, most),
        )
    hooks = []
    if config.probe_every_epochs is not None and not (len(setting.splits.train) and len(setting.splits.val)):
        logger.warning("pretrain: no probes, %s has no labelled images for training and validation", source.name)
    elif config.probe_every_epochs is not None:
        hooks.append(Probe(setting, network, steps_of(config.probe_every_epochs, len(source), config.batch)))
    outcome = train(
        setting,
        stage="pretrain",
        run=run,
        objective=objective,
        source=source,
        config=config,
        policy=recipe.views,
        metadata={
            **network_facts(recipe.model, recipe.views.size),
            "pretrain.memory": config.memory or None,
            "pretrain.momentum": config.momentum if config.memory else None,
        },
        resume=resume,
        hooks=lambda batch: hooks,
        sizes=config.sizes,
    )
    return write_result(setting, run, outcome, metrics={}, network=network)


def _objective(recipe: Recipe, network: SimCLRNet) -> Contrastive:
    config = recipe.pretrain
    if not config.memory:
        return Contrastive(network, temperature=config.temperature, scaling=config.scaling)
    return MomentumContrast(
        network,
        temperature=config.temperature,
        scaling=config.scaling,
        memory=config.memory,
        momentum=config.momentum,
    )


_PROBE_IMAGES = 20_000  # enough to follow a training; all of ImageNet would take the GPU's memory


class Probe(Hook):
    """kNN and linear accuracy of the encoder so far, on the labels that the linear stage would use."""

    def __init__(self, setting: Setting, network: SimCLRNet, every_steps: int) -> None:
        super().__init__(every_steps)
        self._setting, self._network = setting, network

    def __call__(self, step: int) -> dict[str, float]:
        return probe(self._setting, self._network.encoder.eval())


def probe(setting: Setting, encoder: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
    """knn_top1 and linear_top1 of `encoder`'s features, on at most 20,000 labelled images."""
    recipe, runtime = setting.recipe, setting.runtime
    labelled = setting.spread_subset(setting.labelled(recipe.linear.labels), _PROBE_IMAGES)
    bank = setting.features(encoder, labelled)
    test = setting.features(encoder, setting.splits.val)
    classes = len(labelled.classes)
    k, temperature = recipe.knn.ks[:1], recipe.knn.temperatures[:1]
    (near,) = knn(bank, test, classes, ks=k, temperatures=temperature, ranks=runtime.ranks).values()
    linear = logistic_regression(bank, classes, l2=recipe.linear.l2, ranks=runtime.ranks)
    return {"knn_top1": near.top1, "linear_top1": linear.score(test, runtime.ranks).top1}
