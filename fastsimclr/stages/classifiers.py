"""Fine-tuning on the labels, the same network from scratch, and distillation into a student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastsimclr.loaders import DataError
from fastsimclr.models import ModelConfig, build_classifier, classifier_from, count_parameters
from fastsimclr.objectives import CrossEntropy, Distillation
from fastsimclr.stages.networks import digest, load_classifier, load_simclr, network_facts
from fastsimclr.stages.published import beside
from fastsimclr.stages.setting import Setting
from fastsimclr.stages.training import classifier_score, train, write_result


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
        facts=facts | {"classes": list(labelled.classes), "head_layer": config.head_layer, "start": digest(pretrained)},
        resume=resume,
    )
    found = classifier_score(setting, network)
    return write_result(
        setting,
        run,
        outcome,
        metrics=found.metrics,
        network=network,
        labels=len(labelled),
        per_class=found.per_class(labelled.classes),
        **beside(setting, "finetune", ModelConfig(**facts["model"]), config.labels),
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
        facts=network_facts(recipe.model, recipe.views.size, labelled.classes),
        resume=resume,
    )
    found = classifier_score(setting, network)
    return write_result(
        setting,
        run,
        outcome,
        metrics=found.metrics,
        network=network,
        labels=len(labelled),
        per_class=found.per_class(labelled.classes),
    )


def distill(setting: Setting, teacher: Path, run: Path, resume: bool) -> dict[str, Any]:
    """Distill the classifier of run `teacher` into the recipe's student; the result is also in run/result.json."""
    recipe = setting.recipe
    config = recipe.distill
    taught, classes = setting.ranks.on_first(lambda: load_classifier(teacher))
    if setting.splits.val.classes != classes:
        here = setting.splits.val
        raise DataError(
            f"the teacher {teacher} knows {len(classes)} classes ({', '.join(classes[:3])}, …), the data {here.name}"
            f" has {len(here.classes)} ({', '.join(here.classes[:3])}, …); use the data that the teacher learned from"
        )
    labels = len(setting.labelled("subset")) if config.label_weight else 0
    source = setting.with_few_labels() if labels else setting.splits.unlabelled
    torch.manual_seed(recipe.seed)
    student = build_classifier(config.student, recipe.views.size, len(classes), init="normal")
    outcome = train(
        setting,
        stage="distill",
        run=run,
        objective=Distillation(student, taught, temperature=config.temperature, label_weight=config.label_weight),
        source=source,
        config=config,
        policy=setting.crop_flip_policy(config.scale),
        facts=network_facts(config.student, recipe.views.size, classes) | {"teacher": digest(taught)},
        resume=resume,
    )
    found = classifier_score(setting, student)
    return write_result(
        setting,
        run,
        outcome,
        metrics=found.metrics | {"teacher_top1": classifier_score(setting, taught).top1},
        network=student,
        labels=labels,
        per_class=found.per_class(classes),
        teacher_parameters=count_parameters(taught),
        **beside(setting, "distill", config.student, recipe.finetune.labels),
    )
