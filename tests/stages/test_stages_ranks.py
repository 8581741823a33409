"""Stages begun by some ranks and gone on with by others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsimclr import stages
from fastsimclr.distributed.ranks import Ranks
from fastsimclr.loaders import DataConfig, Policy
from fastsimclr.methods.config import SupervisedConfig
from fastsimclr.models import ModelConfig
from fastsimclr.optim import OptimConfig
from fastsimclr.recipe import Recipe
from fastsimclr.runtime.device import Runtime

Pool = Callable[..., list[Any]]
TEN_LABELS = Recipe(
    device="cpu",
    data=DataConfig(labels_per_class=1),
    views=Policy(size=8),
    model=ModelConfig(arch="resnet18", width=0.125),
    supervised=SupervisedConfig(epochs=2, optim=OptimConfig(name="sgd", lr=0.01, warmup_epochs=0)),
)


def supervised(ranks: Ranks, run: Path, resume: bool) -> dict[str, Any] | str:
    """The result of the stage on these ranks, or its error."""
    runtime = Runtime(device=torch.device("cpu"), precision="fp32", ranks=ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastsimclr.stages.setting.choose_runtime", lambda *_: runtime)
        try:
            return stages.supervised(stages.Setting(replace(TEN_LABELS)), run, resume)
        except ValueError as error:
            return str(error)


@pytest.mark.slow
def test_a_batch_of_null_stays_what_it_was_at_the_first_ranks(ranks_pool: Pool, tmp_path: Path) -> None:
    begun = ranks_pool(4, supervised, tmp_path, False)  # ten images: four ranks take eight a step
    assert [result["training"]["steps"] for result in begun] == [10 * 2 // 8 + 1] * 4
    resumed = ranks_pool(2, supervised, tmp_path, True)  # two would take ten
    for result in resumed:  # sums over the images of two ranks, not four: the last digits of a double
        assert result["metrics"] == pytest.approx(begun[0]["metrics"], rel=1e-12)
    for said in ranks_pool(3, supervised, tmp_path, True):
        assert said == "supervised.batch=8 is not divisible by 3 ranks; use 6, or another number of ranks"
