"""A recipe: every setting of every stage. One YAML file in configs/ is one recipe, and drives each command."""

from __future__ import annotations

import math
from argparse import ArgumentError
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from fastsimclr.loaders import DataConfig, Policy
from fastsimclr.models import ModelConfig
from fastsimclr.optim import OptimConfig
from fastsimclr.runs.text import differences
from fastsimclr.training.config import TrainerConfig

Labels = Literal["subset", "all"]
StageName = Literal["pretrain", "linear", "knn", "finetune", "supervised", "distill"]
"""The stages, each a section of the recipe; stages/registry.py says what they are."""
_SMOKE_BATCH = 16
# How and where a run is computed, not what; trainer.* the stages look at themselves.
_GOES_ON_WITH_OTHERS = ("trainer.", "device:", "data.threads:", "data.loader:", "data.cache", "data.resident_gib:")


def _positive(section: str, config: object, *keys: str) -> None:
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
        _positive("pretrain", self, "epochs", "batch", "temperature", "probe_every_epochs")
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
class LinearConfig:
    """Linear evaluation: a classifier on the frozen encoder."""

    method: Literal["lbfgs", "sgd"] = "lbfgs"
    """lbfgs: logistic regression to convergence on features of the plain images, computed once. sgd: the published
    protocol, minibatches with crop and flip."""
    labels: Labels = "subset"
    """Train on the few labels (subset; all if data names no subset) or on all training labels."""
    l2: float = 1e-3
    """lbfgs: weight of the squared L2 norm of the classifier's kernel, on features of length sqrt(C)."""
    epochs: int = 90
    """sgd: passes over the labelled images."""
    batch: int | None = None
    """sgd: images a step; null: 256, or all labelled images where fewer."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(name="sgd", lr=0.1, nesterov=True, weight_decay=0.0, warmup_epochs=0)
    )
    """sgd: optimizer and schedule. 0.1·B/256 with Nesterov momentum (google-research/simclr)."""
    sweep_l2: tuple[float, ...] = ()
    """lbfgs: try these instead of l2. The best on held-out training labels is fitted again on all of them."""
    sweep_lr: tuple[float, ...] = ()
    """sgd: train one classifier with each of these instead of optim.lr, side by side on the same features, and keep the
    best on held-out training labels."""
    sweep_weight_decay: tuple[float, ...] = ()
    """sgd: likewise instead of optim.weight_decay; with sweep_lr, every pair."""
    sweep_holdout: float = 0.1
    """Share of each class's training labels that a sweep chooses on, at least one image, at most 10,000 in all."""

    def __post_init__(self) -> None:
        _positive("linear", self, "epochs", "batch", "l2")
        for key, method in (("sweep_l2", "lbfgs"), ("sweep_lr", "sgd"), ("sweep_weight_decay", "sgd")):
            values = getattr(self, key)
            if values and method != self.method:
                raise ValueError(
                    f"linear.{key}={list(values)} is for linear.method={method}, not {self.method}; leave it out"
                )
            lowest = 0.0 if key == "sweep_weight_decay" else math.ulp(0.0)
            if not all(lowest <= value < math.inf for value in values):
                rule = "at least 0" if lowest == 0 else "greater than 0"
                raise ValueError(f"linear.{key}={list(values)}: each must be {rule} and finite")
            if len(set(values)) < len(values):
                raise ValueError(f"linear.{key}={list(values)} has a value twice; give each once")
        if not 0 < self.sweep_holdout < 1:
            raise ValueError(f"linear.sweep_holdout={self.sweep_holdout} must be between 0 and 1")

    @property
    def swept(self) -> tuple[tuple[float, float], ...]:
        """sgd: the (learning rate, weight decay) of each classifier of the sweep; () without one."""
        if not (self.sweep_lr or self.sweep_weight_decay):
            return ()
        rates, decays = self.sweep_lr or (self.optim.lr,), self.sweep_weight_decay or (self.optim.weight_decay,)
        return tuple((lr, decay) for lr in rates for decay in decays)


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Weighted k-nearest-neighbour evaluation on cosine similarity. Wu et al. 2018, Sec. 3.4."""

    k: int | tuple[int, ...] = 200
    """Neighbours; all labelled images where fewer. Of several, each with each temperature, the first gives top1."""
    temperature: float | tuple[float, ...] = 0.1
    """A neighbour's vote weighs exp(similarity / temperature). One or several, as k."""
    labels: Labels = "all"
    """Which training labels vote."""
    baselines: bool = True
    """Also measure raw pixels and the untrained network with calibrated BN statistics."""

    def __post_init__(self) -> None:
        for key, values in (("k", self.ks), ("temperature", self.temperatures)):
            if not values or not all(0 < value < math.inf for value in values):
                raise ValueError(f"knn.{key}={getattr(self, key)} must be greater than 0 and finite, one or several")

    @property
    def ks(self) -> tuple[int, ...]:
        """k as a tuple."""
        return self.k if isinstance(self.k, tuple) else (self.k,)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """temperature as a tuple."""
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)


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
        _positive("finetune", self, "epochs", "batch", "validate_every_epochs")
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
        _positive("supervised", self, "epochs", "batch", "validate_every_epochs")


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
        _positive("distill", self, "epochs", "batch", "temperature")
        if not 0 <= self.label_weight <= 1:
            raise ValueError(f"distill.label_weight={self.label_weight} must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which protocols `fastsimclr evaluate` runs on a pretraining, with the settings of knn, linear and finetune."""

    protocols: tuple[Literal["knn", "logistic", "linear", "finetune"], ...] = ("knn", "logistic", "linear", "finetune")
    """knn; logistic: linear by lbfgs; linear: by sgd, the published one; each on all labels. finetune: on fractions."""
    fractions: tuple[float, ...] = (0.01, 0.1)
    """Shares of the training labels to fine-tune on; add 1 for all of them. A share that leaves a class without a label
    is left out. All labels are fine-tuned on from head layer 0, fewer from finetune.head_layer (SimCLRv2, Sec. 3.1)."""
    lists: tuple[str | None, ...] = ()
    """For each of the fractions the file that lists its images, as data.label_list, or null to draw them; empty: draw
    all. Google's are 1percent.txt and 10percent.txt."""
    epochs: tuple[int, ...] = ()
    """Epochs of fine-tuning for each of the fractions. Empty: 60 below 10 %, 30 from there on (SimCLRv2, Sec. 3.1)."""

    def __post_init__(self) -> None:
        if not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(f"evaluate.fractions={list(self.fractions)}: each must be above 0 and up to 1")
        for key in ("protocols", "fractions"):
            if len(set(values := getattr(self, key))) < len(values):
                raise ValueError(f"evaluate.{key}={list(values)} has a value twice; give each once")
        for key in ("lists", "epochs"):
            if (values := getattr(self, key)) and len(values) != len(self.fractions):
                raise ValueError(
                    f"evaluate.{key}={list(values)} must have one for each of evaluate.fractions={list(self.fractions)}"
                )
        if not all(epochs >= 1 for epochs in self.epochs):
            raise ValueError(f"evaluate.epochs={list(self.epochs)}: each must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of every stage."""

    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""
    seed: int = 0
    """Of weights, order and views: the same seed gives the same run. 0 to 4294967295."""
    smoke: bool = False
    """A few steps at tiny size, to see that everything runs: 64 images a split, batches of at most 16
    where one is set, one epoch, eighth width, views of at most 32 pixels, a queue of at most 64."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images, labels and how they are loaded."""
    views: Policy = field(default_factory=Policy)
    """Augmentation in pretraining; the other stages use its crop, flip and rotation only, evaluation its size."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Encoder and projection head."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """The loop: precision, logging and checkpoints."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Contrastive pretraining."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    """Linear evaluation."""
    knn: KnnConfig = field(default_factory=KnnConfig)
    """Nearest-neighbour evaluation."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Fine-tuning."""
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    """Training from scratch on the same labels."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Distillation."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """The protocols of `fastsimclr evaluate`."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be between 0 and {2**32 - 1}")
        if self.trainer.cuda_graph and self.pretrain.memory:
            raise ValueError(
                f"trainer.cuda_graph=True is for steps of one shape, not for pretrain.memory={self.pretrain.memory},"
                " whose queue grows; leave one of them out"
            )

    def at_smoke_size(self) -> Recipe:
        """The same recipe at the size of --smoke; image counts are cut where the sources are opened."""
        if not self.smoke:
            return self

        def quick(config: Any, **changes: Any) -> Any:
            optim = replace(config.optim, warmup_epochs=0)
            batch = None if config.batch is None else min(config.batch, _SMOKE_BATCH)
            return replace(config, epochs=1, batch=batch, optim=optim, **changes)

        student = replace(self.distill.student, width=min(self.distill.student.width, 0.125))
        return replace(
            self,
            views=replace(self.views, size=min(self.views.size, 32)),
            model=replace(self.model, width=min(self.model.width, 0.125)),
            trainer=replace(self.trainer, log_every_steps=1),
            pretrain=quick(self.pretrain, sizes=(), memory=min(self.pretrain.memory, 4 * _SMOKE_BATCH)),
            linear=quick(self.linear),
            finetune=quick(self.finetune),
            supervised=quick(self.supervised),
            distill=quick(self.distill, student=student),
        )


def add_recipe_arguments(parser: ArgumentParser) -> None:
    """Every key of a recipe as a dotted option of `parser`, with its docstring as help."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser.add_class_arguments(Recipe, as_group=False)


def recipe_keys() -> tuple[str, ...]:
    """The top-level keys of a recipe."""
    return tuple(Recipe.__dataclass_fields__)


def recipe_from(values: Any) -> Recipe:
    """The recipe in an instantiated jsonargparse namespace."""
    return Recipe(**{key: values[key] for key in recipe_keys()})


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `parse_recipe` and --config read back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return str(yaml.safe_dump(plain(asdict(recipe)), sort_keys=False))


def check_sections(text: str, origin: str) -> None:
    """ValueError where a recipe's text is no YAML mapping, or gives a plain value in the place of a section's keys.

    origin: what the error calls the text, normally its file. jsonargparse passes over such values.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not YAML: {error}") from error
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{origin} is {type(values).__name__}, not a mapping; write key: value")

    def check(section: object, values: dict[str, object], within: str) -> None:
        for key, value in values.items():
            inner = getattr(section, str(key), None)
            if is_dataclass(inner) and not isinstance(value, dict):
                raise ValueError(f"{origin}: {within}{key}={value!r} must be a section; write its keys below it")
            if is_dataclass(inner) and isinstance(value, dict):
                check(inner, value, f"{within}{key}.")

    check(Recipe(), values or {}, "")


def parse_recipe(text: str) -> Recipe:
    """The recipe in YAML text, other keys and wrong types refused with ValueError."""
    check_sections(text, "the recipe")
    parser = ArgumentParser(exit_on_error=False)
    add_recipe_arguments(parser)
    try:
        return recipe_from(parser.instantiate(parser.parse_string(text)))
    except ArgumentError as error:
        raise ValueError(f"the recipe is refused: {error}") from error


def changes(before: str, recipe: Recipe) -> list[str]:
    """What `recipe` has otherwise than the recipe text that a run was begun with, each as "section.key: old -> new".

    Keys that the text lacks, which an earlier version wrote, have had their defaults. Left out is what a run may go on
    with another of: trainer.*, device, data.threads, data.loader, data.cache, data.cache_gib and data.resident_gib.
    ValueError where the text is no recipe.
    """
    now = dump_recipe(recipe)
    if before == now:
        return []
    found = differences(dump_recipe(parse_recipe(before)), now)
    return [change for change in found if not change.startswith(_GOES_ON_WITH_OTHERS)]
