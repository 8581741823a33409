"""Fine-tuning on the labels, and the same network from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastsimclr.methods import CrossEntropy
from fastsimclr.models import ModelConfig, build_classifier, classifier_from
from fastsimclr.stages.measured import report_entries
from fastsimclr.stages.networks import digest, load_simclr, network_facts
from fastsimclr.stages.published import published_entry
from fastsimclr.stages.setting import Setting
from fastsimclr.stages.training import classifier_score, train, validations, write_result


def finetune(setting: Setting, source: Path, run: Path, resume: bool) -> dict[str, Any]:
    """Fine-tune the pretrained network of run `source` on the labels; the result is also in run/result.json."""
    config = setting.recipe.finetune
    labelled = setting.labelled(config.labels)
    pretrained, facts = setting.ranks.on_first(lambda: load_simclr(source))
    network = classifier_from(pretrained, config.head_layer, len(labelled.classes))
    outcome = train(
        setting,
        stage="finetune",
        run=run,
        objective=CrossEntropy(network, frozen_bn=config.frozen_bn),
        source=labelled,
        config=config,
        policy=setting.crop_flip_policy(config.scale),
        metadata=facts
        | {"classes": list(labelled.classes), "head_layer": config.head_layer, "start": digest(pretrained)},
        resume=resume,
        hooks=validations(setting, network, labelled, config.validate_every_epochs),
    )
    found = classifier_score(setting, network)
    return write_result(
        setting,
        run,
        outcome,
        metrics=found.metrics,
        network=network,
        labels=len(labelled),
        **report_entries(setting, found),
        **published_entry(setting, "finetune", ModelConfig(**facts["model"]), config.labels),
    )


def supervised(setting: Setting, run: Path, resume: bool) -> dict[str, Any]:
    """Train the recipe's network from scratch on the labels; the result is also in run/result.json."""
    recipe = setting.recipe
    config = recipe.supervised
    labelled = setting.labelled(config.labels)
    torch.manual_seed(recipe.seed)
    network = build_classifier(recipe.model, recipe.views.size, len(labelled.classes), init="normal")
    outcome = train(
        setting,
        stage="supervised",
        run=run,
        objective=CrossEntropy(network),
        source=labelled,
        config=config,
        policy=setting.crop_flip_policy(config.scale),
        metadata=network_facts(recipe.model, recipe.views.size, labelled.classes),
        resume=resume,
        hooks=validations(setting, network, labelled, config.validate_every_epochs),
    )
    found = classifier_score(setting, network)
    return write_result(
        setting,
        run,
        outcome,
        metrics=found.metrics,
        network=network,
        labels=len(labelled),
        **report_entries(setting, found),
    )
