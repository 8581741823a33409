"""The run that a network comes from: its weights, its classes and how it sees an image."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import fastsimclr
from fastsimclr.deploy.card import Card, Part, preprocessing
from fastsimclr.loaders import Policy
from fastsimclr.models import ClassifierNet, ModelConfig, ResNet, SimCLRNet
from fastsimclr.recipe import parse_recipe
from fastsimclr.runs import checkpoint
from fastsimclr.runtime.device import Runtime
from fastsimclr.stages import Setting, recipe_path
from fastsimclr.stages.networks import load_trained

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A finished run of any stage that trains, opened. policy: its evaluation view. runtime: where it is to run."""

    path: Path
    stage: str
    network_metadata: dict[str, Any]
    network: SimCLRNet | ClassifierNet
    policy: Policy
    runtime: Runtime
    max_bad_fraction: float
    max_pixels: int
    metrics: dict[str, float]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits; () after pretraining."""
        return tuple(self.network_metadata["classes"])

    def classifier(self) -> ClassifierNet:
        """The classifier. ValueError after pretraining."""
        if not isinstance(self.network, ClassifierNet):
            raise ValueError(
                f"{self.path} is of stage {self.stage}, which has no classifier; give the folder of a linear (sgd),"
                " finetune, supervised or distill run"
            )
        return self.network

    def network_and_card(self, chosen: Part | None) -> tuple[ClassifierNet | ResNet, Card]:
        """The part to be exported, and its card; None: the classifier where there is one."""
        named = chosen or ("classifier" if self.classes else "encoder")
        network = self.classifier() if named == "classifier" else self.network.encoder
        card = Card(
            part=named,
            stage=self.stage,
            config=ModelConfig(**self.network_metadata["model"]),
            size=self.network_metadata["size"],
            head_layer=self.network_metadata["head_layer"] if named == "classifier" else 0,
            classes=self.classes if named == "classifier" else (),
            preprocessing=preprocessing(self.policy),
            metrics=self.metrics,
            version=fastsimclr.__version__,
        )
        return network.eval(), card


def open_run(run: Path, device: str, precision: Precision | None) -> Origin:
    """The network of a run folder, or of a checkpoint in one, on the CPU. precision None: that of the run's recipe.

    Raises CheckpointError where `run` is no such thing, ValueError for a device that is not there.
    """
    recipe = parse_recipe(recipe_path(run).read_text())
    network, stage, facts = load_trained(run)
    trainer = replace(recipe.trainer, precision=precision or recipe.trainer.precision)
    setting = Setting(replace(recipe, device=device, trainer=trainer))
    return Origin(
        path=run,
        stage=stage,
        network_metadata=facts,
        network=network.eval(),
        policy=setting.evaluation_policy,
        runtime=setting.runtime,
        max_bad_fraction=recipe.data.max_bad_fraction,
        max_pixels=recipe.data.max_pixels,
        metrics=result_of(run).get("metrics", {}),
    )


def result_of(run: Path) -> dict[str, Any]:
    """The result.json of a run folder or its newest checkpoint; {} where there is none, as of earlier ones."""
    folder = run.resolve().parent.parent if run.is_file() else run
    path = folder / "result.json"
    if not path.is_file() or (run.is_file() and checkpoint.saved(folder)[-1:] != [run.resolve()]):
        return {}
    result: dict[str, Any] = json.loads(path.read_text())
    return result
