"""`study labels`: few labels against many, SimCLR against supervised training. Chen et al. 2020b, Table 3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from fastsimclr.methods.config import FinetuneConfig, SupervisedConfig
from fastsimclr.recipe import Recipe
from fastsimclr.studies.base import Study, seeded, several
from fastsimclr.studies.cells import Cell, Row
from fastsimclr.studies.curves import read_curves, write_curves
from fastsimclr.studies.jobs import StudyJob
from fastsimclr.studies.plot import panels
from fastsimclr.studies.table import crossing, means

Method = Literal["linear", "fine-tuned", "distilled", "supervised"]
_AXIS = "label_fraction"
_CURVES = (("loss", "training loss"), ("train_top1", "training top-1"), ("val_top1", "validation top-1"))


@dataclass(frozen=True, kw_only=True)
class LabelsStudy(Study):
    """Shares of the labels, several draws of each: SimCLR with a linear classifier, fine-tuned and distilled, beside
    supervised training on the same labels and on all of them."""

    name: ClassVar[str] = "labels"
    x: ClassVar[str] = _AXIS
    unit: ClassVar[str] = "share of the training labels"
    logarithmic: ClassVar[bool] = True

    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Shares of each class's training labels."""
    methods: tuple[Method, ...] = ("linear", "fine-tuned", "distilled", "supervised")
    """What is compared. Supervised training on all labels is added where it is not among the fractions."""
    pretrainings: Literal["one", "each"] = "one"
    """one: a single pretraining, with the recipe's seed, from which all draws start; the spread is then that of labels,
    order and views. each: one for each seed."""
    finetune_epochs: tuple[int, ...] = ()
    """Epochs of fine-tuning at each fraction, in their order; empty: finetune.epochs below 10 % of the labels, half as
    many from there on (SimCLRv2: 60 and 30)."""
    supervised_epochs: tuple[int, ...] = ()
    """Epochs of supervised training at each fraction, likewise; all labels take the last."""
    validations: int = 10
    """How often the validation images are measured along a training, for the curves; 0: at the end only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        several("fractions", self.fractions)
        several("methods", self.methods)
        if not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(f"--fractions {list(self.fractions)} must be above 0 and up to 1")
        for key in ("finetune_epochs", "supervised_epochs"):
            epochs = getattr(self, key)
            if epochs and (len(epochs) != len(self.fractions) or min(epochs) < 1):
                raise ValueError(
                    f"--{key} {list(epochs)} must be {len(self.fractions)} numbers of 1 or more, one for each of"
                    f" --fractions {list(self.fractions)}"
                )
        if self.validations < 0:
            raise ValueError(f"--validations {self.validations} must be 0 or more")

    def cells(self, recipe: Recipe) -> list[Cell]:
        """Of each fraction and seed, those of the methods."""
        found: list[Cell] = []
        for seed in self.seeds_of(recipe):
            first = recipe if self.pretrainings == "one" else replace(recipe, seed=seed)
            name = "pretrain" if self.pretrainings == "one" else f"seed-{seed}/pretrain"
            start = StudyJob(name=name, stage="pretrain", recipe=first)
            for fraction in sorted(self.fractions):
                found += self._at(fraction, seeded(recipe, seed), start)
            if "supervised" in self.methods and 1.0 not in self.fractions:
                found += replace(self, methods=("supervised",))._at(1.0, seeded(recipe, seed), start)
        return found

    def _at(self, fraction: float, recipe: Recipe, start: StudyJob) -> list[Cell]:
        tuned, scratch = self._epochs(recipe, fraction)
        data = replace(recipe.data, label_fraction=fraction, labels_per_class=None, label_list=None)
        layer = 0 if fraction == 1 else min(recipe.finetune.head_layer, recipe.model.head_layers)
        recipe = replace(
            recipe,
            data=data,
            trainer=replace(recipe.trainer, log_every_steps=max(1, round(fraction * recipe.trainer.log_every_steps))),
            linear=replace(recipe.linear, labels="subset"),
            finetune=replace(
                recipe.finetune,
                labels="subset",
                head_layer=layer,  # of the whole head at few labels, of the encoder at all (SimCLRv2, Sec. 2)
                **self._for(recipe.finetune, tuned),
            ),
            supervised=replace(recipe.supervised, labels="subset", **self._for(recipe.supervised, scratch)),
        )
        folder = f"fraction-{fraction:g}/seed-{recipe.seed}"
        finetuned = StudyJob(name=f"{folder}/finetune", stage="finetune", recipe=recipe, after=start)
        jobs = {
            "linear": StudyJob(name=f"{folder}/linear", stage="linear", recipe=recipe, after=start),
            "fine-tuned": finetuned,
            "distilled": StudyJob(name=f"{folder}/distill", stage="distill", recipe=recipe, after=finetuned),
            "supervised": StudyJob(name=f"{folder}/supervised", stage="supervised", recipe=recipe),
        }
        return [
            Cell(point={_AXIS: fraction}, method=method, seed=recipe.seed, job=jobs[method]) for method in self.methods
        ]

    def _epochs(self, recipe: Recipe, fraction: float) -> tuple[int, int]:
        """Of fine-tuning, and of supervised training."""
        place = self.fractions.index(fraction) if fraction in self.fractions else -1
        usual = recipe.finetune.epochs if fraction < 0.1 else max(1, recipe.finetune.epochs // 2)
        tuned = self.finetune_epochs[place] if self.finetune_epochs else usual
        return tuned, self.supervised_epochs[place] if self.supervised_epochs else recipe.supervised.epochs

    def _for(self, config: FinetuneConfig | SupervisedConfig, epochs: int) -> dict[str, Any]:
        """What a training of so many epochs has otherwise; its warm-up keeps its share of them."""
        warmup = config.optim.warmup_epochs * epochs / config.epochs
        return {
            "epochs": epochs,
            "optim": replace(config.optim, warmup_epochs=warmup),
            "validate_every_epochs": max(1, epochs // self.validations) if self.validations else None,
        }

    def remarks(self, rows: Sequence[Row], out: Path) -> list[str]:
        """Where supervised training overtakes; writes curves.csv and curves.png."""
        curves = read_curves([row for row in rows if row.method in ("fine-tuned", "supervised")], out)
        if curves:
            write_curves(curves, out / "curves.csv", axis=_AXIS)
            shown: dict[str, dict[str, list[dict[str, list[float]]]]] = {}
            for curve in curves:
                point = f"{100 * float(curve.row.point[_AXIS]):g} % of the labels"
                shown.setdefault(point, {}).setdefault(curve.row.method, []).append(curve.columns)
            panels(shown, out / "curves.png", measures=_CURVES)
        said = [self._apart(rows)] if {"fine-tuned", "supervised"} <= set(self.methods) else []
        said += [line for method in ("fine-tuned", "distilled") if (line := self._overtakes(rows, method))]
        for fraction in sorted(self.fractions):
            said += _passes(fraction, [curve for curve in curves if curve.row.point[_AXIS] == fraction])
        return said

    def _apart(self, rows: Sequence[Row]) -> str:
        least = min(self.fractions)
        tuned, scratch = (
            [row.top1 for row in rows if row.method == method and row.point[_AXIS] == least]
            for method in ("fine-tuned", "supervised")
        )
        if not tuned or not scratch:
            return f"At {100 * least:g} % of the labels nothing can be compared: a training failed."
        clear = min(tuned) > max(scratch)
        return (
            f"At {100 * least:g} % of the labels the lowest fine-tuned of {len(tuned)} draws has {min(tuned):.3f}, the"
            f" highest supervised {max(scratch):.3f}: {'apart' if clear else 'not apart'}."
        )

    def _overtakes(self, rows: Sequence[Row], method: str) -> str | None:
        found = means(rows)
        both = [f for f in sorted(self.fractions) if all(((f,), m) in found for m in (method, "supervised"))]
        if len(both) < 2:
            return None
        ours, theirs = ([found[(fraction,), m].mean for fraction in both] for m in (method, "supervised"))
        where = crossing(both, ours, theirs)
        if where is None:
            return f"Supervised training does not overtake {method} SimCLR up to {100 * both[-1]:g} % of the labels."
        reached = "already at" if where == both[0] else "by interpolation at"
        return f"Supervised training overtakes {method} SimCLR {reached} {100 * where:.2g} % of the labels."


def _passes(fraction: float, curves: Sequence[Any]) -> list[str]:
    """When along its training the supervised network passes what the fine-tuned one of the same draw ends with."""
    ends = {curve.row.seed: curve.row.top1 for curve in curves if curve.row.method == "fine-tuned"}
    races = [curve for curve in curves if curve.row.method == "supervised" and curve.row.seed in ends]
    if not races:
        return []
    passed = [moment for curve in races if (moment := curve.passes(ends[curve.row.seed])) is not None]
    text = f"At {100 * fraction:g} % of the labels supervised training passes the fine-tuned network's end in"
    text += f" {len(passed)} of {len(races)} draws"
    if passed:
        epochs, seconds = (sum(values) / len(passed) for values in zip(*passed, strict=True))
        text += f", on average at epoch {epochs:.1f}, after {seconds:,.0f} s"
    return [text + "."]
