"""A recipe: every setting of every stage. One YAML file in configs/ is one recipe, and drives each command."""

from __future__ import annotations

import functools
from argparse import ArgumentError
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from fastsimclr.evaluation.config import EvaluateConfig, KnnConfig, LinearConfig
from fastsimclr.loaders import DataConfig, Policy
from fastsimclr.methods.config import DistillConfig, FinetuneConfig, PretrainConfig, SupervisedConfig
from fastsimclr.models import ModelConfig
from fastsimclr.runs.text import differences
from fastsimclr.training.config import TrainerConfig

StageName = Literal["pretrain", "linear", "knn", "finetune", "supervised", "distill"]
"""The stages, each a section of the recipe; stages/registry.py says what they are."""
_SMOKE_BATCH = 16
# How and where a run is computed, not what; trainer.* the stages look at themselves.
_GOES_ON_WITH_OTHERS = ("trainer.", "device:", "data.threads:", "data.loader:", "data.cache", "data.resident_gib:")


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


@functools.lru_cache(16)
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
