"""The settings of the stages that train a network, each a section of the recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fastsimclr.models import ModelConfig
from fastsimclr.optim import OptimConfig

Labels = Literal["subset", "all"]
"""Which training labels a stage uses: the few of data.label_*, or all."""


def check_positive(section: str, config: object, *keys: str) -> None:
    """ValueError naming section.key where one of the keys is neither None nor greater than 0 and finite."""
    for key in keys:
        value = getattr(config, key)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{section}.{key}={value} must be greater than 0 and finite")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Contrastive pretraining."""

    epochs: int = 100
    """Passes over all images."""
    batch: int = 512
    """Images a step, over all ranks; each gives two views."""
    temperature: float = 0.5
    """Of the softmax over similarities. .1 on ImageNet, .5 on CIFAR-10 (Chen et al. 2020, App. B)."""
    scaling: Literal["paper", "google"] = "paper"
    """paper: mean over the 2N rows. google: the sum of both views' means, twice that, as in google-research/simclr."""
    memory: int = 0
    """Negatives of earlier batches, held in a queue; all contrasts then come from a momentum encoder. 65536 in SimCLRv2
    (configs/v2-paper.yaml); 0: none of both. One forward pass more a step. Excludes trainer.cuda_graph."""
    momentum: float = 0.999
    """With memory: what share of itself the momentum encoder keeps at each step, 0 or more and below 1."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1.0, weight_decay=1e-4, warmup_epochs=10))
    """Optimizer and schedule."""
    sizes: tuple[tuple[float, int], ...] = ()
    """Progressive resolution: from [share of the steps, side in pixels] on, views of that side; [[0, 160], [0.5, 192],
    [0.8, 224]] ends at 224. Empty: views.size throughout. Where it ends is the size that the network is measured at."""
    probe_every_epochs: int | None = None
    """Measure kNN and linear accuracy of the features every so many epochs; null: never."""

    def __post_init__(self) -> None:
        check_positive("pretrain", self, "epochs", "batch", "temperature", "probe_every_epochs")
        if self.batch < 2:
            raise ValueError(f"pretrain.batch={self.batch} leaves no negatives to contrast with; use at least 2")
        if self.memory < 0:
            raise ValueError(f"pretrain.memory={self.memory} must be 0 (no queue) or more; SimCLRv2 has 65536")
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"pretrain.momentum={self.momentum} must be 0 or more and below 1, or the momentum encoder never moves;"
                " use 0.999"
            )
        shares = [share for share, _ in self.sizes]
        if shares != sorted(set(shares)) or any(not 0 <= share < 1 or side < 1 for share, side in self.sizes):
            raise ValueError(
                f"pretrain.sizes={[list(pair) for pair in self.sizes]} must be pairs of a share of the steps, rising"
                " from 0 or more and below 1, and a side of 1 pixel or more, as [[0, 160], [0.5, 192], [0.8, 224]]"
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tuning of the whole network on the labels, from a layer of the projection head."""

    head_layer: int = 1
    """How many layers of the projection head stay: 0 = encoder output, 1 = after the first layer's ReLU (SimCLRv2)."""
    labels: Labels = "subset"
    """Train on the few labels (subset; all if data names no subset) or on all training labels."""
    epochs: int = 60
    """Passes over the labelled images."""
    batch: int | None = None
    """Images a step; null: 256, or all labelled images where fewer."""
    scale: tuple[float, float] | None = None
    """Range of a crop's area as a part of the image's; null: that of views."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=0.005, lr_scaling="sqrt", weight_decay=0.0, warmup_epochs=0)
    )
    """Optimizer and schedule. 0.005·sqrt(B), LARS, no decay (SimCLRv2, Sec. 4.1 and google-research/simclr)."""
    frozen_bn: bool = False
    """Keep the pretrained BN statistics instead of each batch's: for batches too small to have statistics."""
    validate_every_epochs: int | None = None
    """Measure top-1 of the validation images every so many epochs, for curves; null: at the end only."""

    def __post_init__(self) -> None:
        check_positive("finetune", self, "epochs", "batch", "validate_every_epochs")
        if not 0 <= self.head_layer <= 4:
            raise ValueError(f"finetune.head_layer={self.head_layer} must be 0 (encoder output) to 4")


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """The baseline: the same network trained from scratch on the same labels."""

    labels: Labels = "subset"
    """Train on the few labels (subset; all if data names no subset) or on all training labels."""
    epochs: int = 100
    """Passes over the labelled images."""
    batch: int | None = None
    """Images a step; null: 256, or all labelled images where fewer."""
    scale: tuple[float, float] | None = None
    """Range of a crop's area as a part of the image's; null: that of views."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(name="sgd", lr=0.1, nesterov=True, weight_decay=5e-4, warmup_epochs=5)
    )
    """Optimizer and schedule."""
    validate_every_epochs: int | None = None
    """Measure top-1 of the validation images every so many epochs, for curves; null: at the end only."""

    def __post_init__(self) -> None:
        check_positive("supervised", self, "epochs", "batch", "validate_every_epochs")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation of a fine-tuned teacher into a student, on unlabelled images."""

    student: ModelConfig = field(default_factory=lambda: ModelConfig(head_layers=0))
    """The student's architecture; its projection head is not used."""
    into_itself: bool = False
    """Give the student the first teacher's architecture instead of student's (self-distillation); --student same."""
    self_first: bool = False
    """In the chain (fastsimclr run): distill the fine-tuned network into itself first, then that into the student."""
    temperature: float | None = None
    """Of both softmaxes. null: .1 where the student has the teacher's depth, width and kernels, else 1
    (google-research/simclr)."""
    teacher_view: Literal["same", "fixed"] = "same"
    """What the teacher sees. same: the student's own random crop, at each step. fixed: each image once, in its
    evaluation view, before training; its logits are kept in the run folder and looked up (another recipe, and no
    teacher in the step)."""
    label_weight: float = 0.0
    """Weight w of the few labels' cross-entropy: (1 - w)·distillation + w·CE; 0 uses no label at all."""
    epochs: int = 400
    """Passes over all images."""
    batch: int = 512
    """Images a step, over all ranks."""
    scale: tuple[float, float] | None = None
    """Range of a crop's area as a part of the image's; null: that of views."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1.0, weight_decay=1e-4, warmup_epochs=10))
    """Optimizer and schedule."""

    def __post_init__(self) -> None:
        check_positive("distill", self, "epochs", "batch", "temperature")
        if not 0 <= self.label_weight <= 1:
            raise ValueError(f"distill.label_weight={self.label_weight} must be between 0 and 1")
