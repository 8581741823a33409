"""Runs of any stage for the tests of exports, streams and detectors: random networks in checkpoints, untrained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastsimclr.loaders import DataConfig, Policy
from fastsimclr.models import ModelConfig, build_classifier, build_simclr
from fastsimclr.recipe import Recipe, dump_recipe
from fastsimclr.runs import checkpoint
from fastsimclr.stages.networks import network_facts
from fastsimclr.training.config import TrainerConfig

MakeRun = Callable[..., Path]


def _randomise(network: nn.Module, seed: int) -> nn.Module:
    """Give every parameter and BN statistic a value of its own, so that nothing passes unseen: no zero gamma."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.dtype == torch.int64:
            value.fill_(1)
        elif name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        else:
            value.normal_(0, 0.1 if value.dim() == 1 else value[0].numel() ** -0.5, generator=generator)
    return network


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module, int], nn.Module]:
    """randomise(network, seed): the same network, with a value of its own for every number."""
    return _randomise


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """make_run(stage, model, size, classes, head_layer, normalise): a run folder with one finished checkpoint."""

    def make(
        stage: str = "supervised",
        model: ModelConfig | None = None,
        size: int = 32,
        classes: tuple[str, ...] = (),
        head_layer: int = 0,
        normalise: str = "auto",
    ) -> Path:
        run = tmp_path_factory.mktemp(stage)
        model = model or ModelConfig(arch="resnet18", width=0.125, head_dim=16)
        network = build_classifier(model, size, len(classes), head_layer) if classes else build_simclr(model, size)
        prefix = "student." if stage == "distill" else "network."
        views = replace(Policy(size=size), normalise=normalise)  # type: ignore[arg-type]
        recipe = Recipe(
            device="cpu",
            data=DataConfig(max_bad_fraction=0.25),
            views=views,
            model=model,
            trainer=TrainerConfig(precision="fp32"),
        )
        state = dict.fromkeys(checkpoint._REQUIRED, None) | {
            "stage": stage,
            "step": 3,
            "total_steps": 3,
            "facts": network_facts(model, size, classes, head_layer),
            "objective": {prefix + name: value for name, value in _randomise(network, 1).state_dict().items()},
        }
        checkpoint.save(run, state, keep=1)
        (run / "recipe.yaml").write_text(dump_recipe(recipe))
        (run / "result.json").write_text(json.dumps({"stage": stage, "metrics": {"top1": 0.5}}))
        return run

    return make
