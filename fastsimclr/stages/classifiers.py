"""Fine-tuning on the labels, and the same network from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastsimclr.loaders import Source
from fastsimclr.methods import CrossEntropy
from fastsimclr.methods.config import FinetuneConfig, SupervisedConfig
from fastsimclr.models import ModelConfig, build_classifier, classifier_from
from fastsimclr.stages.networks import digest, load_simclr, network_facts
from fastsimclr.stages.published import published_entry
from fastsimclr.stages.setting import Setting
from fastsimclr.stages.training import train, validations, write_scores


def finetune(setting: Setting, source: Path, run: Path, resume: bool) -> dict[str, Any]:
    """Fine-tune the pretrained network of run `source` on the labels; the result is also in run/result.json."""
    config = setting.recipe.finetune
    labelled = setting.labelled(config.labels)
    pretrained, facts = setting.ranks.on_first(lambda: load_simclr(source))
    network = classifier_from(pretrained, config.head_layer, len(labelled.classes))
    return _train_and_score(
        setting,
        "finetune",
        run,
        resume,
        config,
        CrossEntropy(network, frozen_bn=config.frozen_bn),
        labelled,
        facts | {"classes": list(labelled.classes), "head_layer": config.head_layer, "start": digest(pretrained)},
        **published_entry(setting, "finetune", ModelConfig(**facts["model"]), config.labels),
    )


def supervised(setting: Setting, run: Path, resume: bool) -> dict[str, Any]:
    """Train the recipe's network from scratch on the labels; the result is also in run/result.json."""
    recipe = setting.recipe
    config = recipe.supervised
    labelled = setting.labelled(config.labels)
    torch.manual_seed(recipe.seed)
    network = build_classifier(recipe.model, recipe.views.size, len(labelled.classes), init="normal")
    metadata = network_facts(recipe.model, recipe.views.size, labelled.classes)
    return _train_and_score(setting, "supervised", run, resume, config, CrossEntropy(network), labelled, metadata)


def _train_and_score(
    setting: Setting,
    stage: str,
    run: Path,
    resume: bool,
    config: FinetuneConfig | SupervisedConfig,
    objective: CrossEntropy,
    labelled: Source,
    metadata: dict[str, Any],
    **entries: Any,
) -> dict[str, Any]:
    """Train the classifier of `objective` on `labelled`, score it and write its result, `entries` included."""
    outcome = train(
        setting,
        stage=stage,
        run=run,
        objective=objective,
        source=labelled,
        config=config,
        policy=setting.crop_flip_policy(config.scale),
        metadata=metadata,
        resume=resume,
        hooks=validations(setting, objective.network, labelled, config.validate_every_epochs),
    )
    return write_scores(setting, run, outcome, objective.network, {"labels": len(labelled)}, **entries)
