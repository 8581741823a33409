"""Distillation of one or several teachers into a student, or of a network into itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsimclr.loaders import Source
from fastsimclr.methods import Distillation
from fastsimclr.methods.distillation import Ensemble, RecordedDistillation
from fastsimclr.models import ClassifierNet, ModelConfig, build_classifier, count_parameters
from fastsimclr.runs.log import logger
from fastsimclr.stages.networks import network_facts
from fastsimclr.stages.published import published_entry
from fastsimclr.stages.setting import Setting
from fastsimclr.stages.teachers import (
    Teacher,
    joint_digest,
    load_teachers,
    numbered,
    recorded_logits,
    refuse_begun,
)
from fastsimclr.stages.training import classifier_score, train, write_scores

SELF_TEMPERATURE, TEMPERATURE = 0.1, 1.0  # google-research/simclr


def distill(setting: Setting, teachers: Path | Sequence[str], run: Path, resume: bool) -> dict[str, Any]:
    """Distill the classifiers of runs, or of libraries, into the recipe's student; also in run/result.json.

    teachers: a run, or several of runs and networks as "timm:NAME" and "torchvision:NAME" (fastsimclr.models.foreign).
    """
    recipe, config = setting.recipe, setting.recipe.distill
    taught = load_teachers(setting, [str(teachers)] if isinstance(teachers, Path) else teachers)
    classes = setting.splits.val.classes
    model = student_of(config.student, taught, config.into_itself)
    temperature = temperature_of(config.temperature, model, taught)
    whole = taught[0].network if len(taught) == 1 else Ensemble([one.network for one in taught], temperature)
    labels = len(setting.labelled("subset")) if config.label_weight else 0
    source = setting.with_few_labels() if labels else setting.splits.unlabelled
    torch.manual_seed(recipe.seed)
    student = build_classifier(model, recipe.views.size, len(classes), init="normal")
    facts = network_facts(model, recipe.views.size, classes) | {"teacher": joint_digest(taught)}
    if config.teacher_view == "fixed":
        setting.ranks.on_first(lambda: refuse_begun(run, resume))
        facts["teacher_view"] = "fixed"
        objective, source, recording = _recorded(setting, student, whole, source, run, facts, temperature)
    else:
        recording = None
        objective = Distillation(student, whole, temperature=temperature, label_weight=config.label_weight)
    outcome = train(
        setting,
        stage="distill",
        run=run,
        objective=objective,
        source=source,
        config=config,
        policy=setting.crop_flip_policy(config.scale),
        metadata=facts,
        resume=resume,
    )
    known = all(one.model is not None for one in taught)
    return write_scores(
        setting,
        run,
        outcome,
        student,
        {"labels": labels},
        more_metrics={"teacher_top1": _top1(setting, whole)},
        temperature=temperature,
        teacher_parameters=count_parameters(whole),
        **({} if recording is None else {"recording_seconds": round(recording, 2)}),
        **({} if len(taught) == 1 else {"teachers": [_said_of(setting, one) for one in taught]}),
        **(published_entry(setting, "distill", model, recipe.finetune.labels) if known else {}),
    )


def student_of(student: ModelConfig, teachers: Sequence[Teacher], into_itself: bool) -> ModelConfig:
    """The student's architecture: that of the first teacher, without head layers, or the given one.

    ValueError where that teacher is a library's network.
    """
    if not into_itself:
        return student
    first = teachers[0]
    if first.model is None:
        raise ValueError(
            f"distill.into_itself=true (--student same) has no network like {first.name} to train; give a student"
        )
    return replace(first.model, head_layers=0)


def temperature_of(asked: float | None, student: ModelConfig, teachers: Sequence[Teacher]) -> float:
    """The temperature asked for, else .1 where all teachers have the student's encoder, else 1. Logs which of two."""

    def encoder(model: ModelConfig) -> tuple[object, ...]:
        return model.arch, model.width, model.selective_kernels

    same = all(one.model is not None and encoder(one.model) == encoder(student) for one in teachers)
    usual = SELF_TEMPERATURE if same else TEMPERATURE
    if asked not in (None, usual):
        logger.info(
            "distill: temperature %g, as the recipe insists; without (--distill.temperature null) %g", asked, usual
        )
    return usual if asked is None else asked


def _recorded(
    setting: Setting,
    student: ClassifierNet,
    teacher: nn.Module,
    source: Source,
    run: Path,
    metadata: dict[str, Any],
    temperature: float,
) -> tuple[Distillation, Source, float]:
    """The objective by recorded logits, its source of row numbers, and the seconds that the recording took."""
    rows = numbered(source)
    made_by = {key: metadata[key] for key in ("classes", "size", "teacher")}
    if isinstance(teacher, Ensemble):
        made_by["temperature"] = temperature  # of which its logits are made
    logits, seconds = recorded_logits(setting, teacher, rows, run, made_by)
    objective = RecordedDistillation(
        student,
        logits=logits,
        labels=torch.tensor(source.labels),
        temperature=temperature,
        label_weight=setting.recipe.distill.label_weight,
    )
    return objective, rows, seconds


def _top1(setting: Setting, network: nn.Module) -> float:
    setting.runtime.to_device(network)
    return classifier_score(setting, network).top1


def _said_of(setting: Setting, teacher: Teacher) -> dict[str, Any]:
    return {
        "name": teacher.name,
        "parameters": count_parameters(teacher.network),
        "top1": _top1(setting, teacher.network),
    }
