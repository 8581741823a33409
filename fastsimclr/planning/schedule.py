"""The stages of a recipe in steps and hours."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

from fastsimclr.methods.config import Labels
from fastsimclr.models import ModelConfig
from fastsimclr.planning.estimate import StepPlan, StepTime, counted_for, step_time
from fastsimclr.planning.hardware import Cluster, PlanOptions
from fastsimclr.planning.rates import Rates
from fastsimclr.planning.work import Work
from fastsimclr.recipe import Recipe

# Training images, labelled ones among them, validation images, classes.
SETS = {
    "digits": (1_438, 1_438, 359, 10),
    "cifar10": (50_000, 50_000, 10_000, 10),
    "cifar100": (50_000, 50_000, 10_000, 100),
    "stl10": (105_000, 5_000, 8_000, 10),
}
IMAGENET = (1_281_167, 1_281_167, 50_000, 1_000)
EVALUATION_BATCH = 256  # of a rank


@dataclass(frozen=True, kw_only=True)
class Images:
    """How many images each stage has. few: of the few-label stages. held: small enough to lie decoded on the device."""

    unlabelled: int
    labelled: int
    few: int
    val: int
    held: bool

    def of(self, labels: Labels) -> int:
        """Those of a stage that trains on `labels`."""
        return self.few if labels == "subset" else self.labelled


@dataclass(frozen=True, kw_only=True)
class Span:
    """Steps of one kind. stage: whose. time: of one of them."""

    stage: str
    size: int
    steps: int
    time: StepTime

    @property
    def hours(self) -> float:
        """Of all of them."""
        return self.steps * self.time.seconds / 3600


class Training(Protocol):
    """What a plan needs of the settings of a training stage."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch(self) -> int | None: ...


def images_of(recipe: Recipe, options: PlanOptions) -> Images:
    """Counts of the recipe's data set, or of the options where they are given."""
    data = recipe.data
    if data.source == "synthetic":
        known = (data.synthetic_images, data.synthetic_images, data.synthetic_images, data.synthetic_classes)
    else:
        known = SETS.get(data.source, IMAGENET)
    unlabelled = options.images or known[0]
    labelled = options.labelled or (unlabelled if options.images else known[1])
    if options.few is not None:
        few = options.few
    elif data.labels_per_class is not None:
        few = min(labelled, data.labels_per_class * known[3])
    elif data.label_list is not None:
        few = round(0.01 * labelled)
    else:
        few = labelled if data.label_fraction is None else round(data.label_fraction * labelled)
    held = data.source in (*SETS, "synthetic") or data.loader in ("resident", "synthetic")
    return Images(unlabelled=unlabelled, labelled=labelled, few=few, val=known[2], held=held)


def pretraining(recipe: Recipe, precision: str, size: int) -> StepPlan:
    """A pretraining step at `size` pixels."""
    return StepPlan(
        model=recipe.model,
        size=size,
        stem_size=recipe.views.size,
        batch=recipe.pretrain.batch,
        views=2,
        precision=precision,
        memory=recipe.pretrain.memory,
    )


def spans(
    recipe: Recipe, images: Images, cluster: Cluster, rates: Rates, precision: str, loader_images_s: float | None
) -> list[Span]:
    """Every stage of `fastsimclr run`, pretraining in as many spans as it has sizes. ValueError as the run has."""
    if images.held:
        loader_images_s = None
    size, model = recipe.views.size, recipe.model

    def timed(step: StepPlan) -> StepTime:
        return step_time(step, recipe.trainer, cluster, rates, loader_images_s)

    def training(stage: str, config: Training, n: int, step: StepPlan) -> Span:
        batch = config.batch or max(cluster.gpus, min(256, n) - min(256, n) % cluster.gpus)
        if batch > n:
            raise ValueError(f"{stage}.batch={batch} is larger than its {n} images; use at most {n}")
        try:
            time = timed(replace(step, batch=batch))
        except ValueError as error:
            raise ValueError(f"{stage}: {error}") from None
        return Span(stage=stage, size=step.size, steps=n * config.epochs // batch + 1, time=time)

    def passed(stage: str, n: int) -> Span:
        batch = EVALUATION_BATCH * cluster.gpus
        seconds = rates.seconds(_forward(model, size, EVALUATION_BATCH, precision))
        reading = None if loader_images_s is None else batch / cluster.nodes / loader_images_s
        time = StepTime(images=batch, compute_s=seconds, input_s=reading or 0.0)
        return Span(stage=stage, size=size, steps=math.ceil(n / batch), time=time)

    def distilled(stage: str, student: ModelConfig, layer: int) -> list[Span]:
        """Of the recipe's network with a classifier on head layer `layer`."""
        step = replace(classifier, model=student)
        if recipe.distill.teacher_view == "fixed":
            recording = passed(f"{stage}, teacher's logits", images.unlabelled)
            return [recording, training(stage, recipe.distill, images.unlabelled, step)]
        share = max(1, recipe.distill.batch // cluster.gpus)
        step = replace(step, teacher=_forward(model, size, share, precision, layer))
        return [training(stage, recipe.distill, images.unlabelled, step)]

    classifier = StepPlan(model=model, size=size, stem_size=size, batch=0, views=1, precision=precision, layer=0)
    found = []
    total = images.unlabelled * recipe.pretrain.epochs // recipe.pretrain.batch + 1
    ends = [*(math.ceil(share * total) for share, _ in recipe.pretrain.sizes), total]
    sides = [size, *(side for _, side in recipe.pretrain.sizes)]
    for begin, end, side in zip([0, *ends[:-1]], ends, sides, strict=True):
        if end > begin:
            try:
                time = timed(pretraining(recipe, precision, side))
            except ValueError as error:
                raise ValueError(f"pretrain: {error}") from None
            found.append(Span(stage="pretrain", size=side, steps=end - begin, time=time))
    measured = images.of(recipe.knn.labels) + images.val
    found.append(passed("knn, and untrained" if recipe.knn.baselines else "knn", measured * (1 + recipe.knn.baselines)))
    if recipe.linear.method == "lbfgs":
        found.append(passed("linear, features", images.of(recipe.linear.labels) + images.val))
    else:
        n = images.of(recipe.linear.labels)
        found.append(training("linear", recipe.linear, n, replace(classifier, frozen=True)))
    found.append(training("supervised", recipe.supervised, images.of(recipe.supervised.labels), classifier))
    layer = min(recipe.finetune.head_layer, model.head_layers)
    tuned = replace(classifier, layer=layer)
    found.append(training("finetune", recipe.finetune, images.of(recipe.finetune.labels), tuned))
    own = replace(model, head_layers=0)
    if recipe.distill.self_first:
        found += distilled("self-distill", own, layer)
    student = own if recipe.distill.into_itself else recipe.distill.student
    return found + distilled("distill", student, 0 if recipe.distill.self_first else layer)


def _forward(model: ModelConfig, size: int, images: int, precision: str, layer: int = 0) -> Work:
    """A forward pass of one view each of a rank's images."""
    step = StepPlan(model=model, size=size, stem_size=size, batch=images, views=1, precision=precision, layer=layer)
    return counted_for(step, images).forward
