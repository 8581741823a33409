"""Our side of a bench: networks, objective, views and optimizer of each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fastsimclr.bench.training_configs import StageBench, TrainingStage
from fastsimclr.loaders import Batch, Crops, Policy
from fastsimclr.methods import Contrastive, CrossEntropy, Distillation, Objective
from fastsimclr.models import ClassifierNet, ModelConfig, SimCLRNet, build_classifier, build_simclr
from fastsimclr.optim import OptimConfig, Schedule, build_optimizer
from fastsimclr.training.trainer import TrainingJob

# What both sides train with; SimCLR v1's head, which lightly's default is too.
HEAD_LAYERS, HEAD_DIM, TEMPERATURE = 2, 128, 0.5
# A small rate: losses stay comparable where a baseline sees the same few views again.
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
SOFTNESS = 1.0  # temperature of a distillation
Batches = Callable[[int, int, Crops], Iterable[Batch]]
"""(start, stop, crops) -> the batches of those steps, of which `crops` are the views."""


def network(arch: str, size: int, seed: int) -> SimCLRNet:
    """Our full-width network with SimCLR v1's head; the same weights for the same seed."""
    torch.manual_seed(seed)
    return build_simclr(ModelConfig(arch=arch, head_layers=HEAD_LAYERS, head_dim=HEAD_DIM), size)  # type: ignore[arg-type]


def classifier(arch: str, size: int, classes: int, seed: int) -> ClassifierNet:
    """Our full-width encoder with a classifier; the same weights for the same seed."""
    torch.manual_seed(seed)
    return build_classifier(ModelConfig(arch=arch, head_layers=0), size, classes, init="normal")  # type: ignore[arg-type]


def policy_for(size: int) -> Policy:
    """SimCLR's views: the CIFAR recipe (half colour strength, no blur) up to 32 px, else ImageNet's."""
    return Policy(size=size, strength=0.5, blur=0.0) if size <= 32 else Policy(size=size)


def policy_of(stage: TrainingStage, size: int) -> Policy:
    """The views of a stage: SimCLR's in pretraining, crop and flip in the others."""
    views = policy_for(size)
    return views if stage == "pretrain" else replace(views.plain(), flip=views.flip)


def objective_of(config: StageBench) -> Objective:
    """The stage's objective on the CPU; the same weights for the same seed."""
    if config.stage == "pretrain":
        net = network(config.arch, config.size, config.seed)
        return Contrastive(net, temperature=TEMPERATURE, scaling="paper")
    student = classifier(config.arch, config.size, config.classes, config.seed)
    if config.stage == "distill":
        teacher = classifier(config.teacher, config.size, config.classes, config.seed + 1)
        return Distillation(student, teacher, temperature=SOFTNESS)
    return CrossEntropy(student, frozen_body=config.stage == "linear")


def networks_of(objective: Objective) -> Sequence[nn.Module]:
    """Every network that a step goes through, the trained one first."""
    return [child for child in objective.children() if isinstance(child, SimCLRNet | ClassifierNet)]


def optimizer_of(config: StageBench, objective: Objective, global_batch: int) -> tuple[torch.optim.Optimizer, str]:
    """The stage's optimizer as the recipes have it, and its name: SGD for a linear classifier, LARS for all else."""
    if config.stage == "linear":
        optim = OptimConfig(
            name="sgd", lr=LR, lr_scaling="none", momentum=MOMENTUM, nesterov=True, weight_decay=0.0, warmup_epochs=0
        )
    else:
        optim = OptimConfig(lr=LR, lr_scaling="none", momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    heads = objective.supervised_heads()
    name = "SGD (Nesterov)" if optim.name == "sgd" else "LARS (google)"
    return build_optimizer(optim, objective, global_batch=global_batch, heads=heads), name


def job_of(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    schedule: Schedule,
    *,
    policy: Policy,
    batch: int,
    seed: int,
    run: Path,
) -> TrainingJob:
    """A trainer's job that belongs to no recipe and resumes nothing. batch: of all ranks. run: its folder."""
    return TrainingJob(
        stage="bench",
        run=run,
        objective=objective,
        optimizer=optimizer,
        schedule=schedule,
        batches=batches,
        policy=policy,
        batch=batch,
        seed=seed,
        fingerprint="",
        recipe="",
        metadata={},
        resume=False,
    )
