"""Training with the fused batch norm: as without it, refused where it cannot be had, named in result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsimclr.kernels.batch_norm import fused
from fastsimclr.models import BatchNorm
from fastsimclr.optim import Schedule
from fastsimclr.runtime.device import Runtime
from fastsimclr.stages.training import bn_name
from tests.training.test_trainer import final, fit, job


@pytest.mark.slow
def test_fused_bn_trains_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    apply = fused.apply

    def counted(*given: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return apply(*given)

    monkeypatch.setattr(fused, "apply", counted)
    monkeypatch.setattr(fused, "TILE", 2**16)  # the interpreter takes as long for large tiles as for small ones
    runtime = Runtime(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"), precision="fp32")
    done = []
    for on in (False, True):
        given = job(tmp_path / str(on), schedule=Schedule(peak=0.1, warmup_steps=0, total_steps=1))
        runtime.to_device(given.objective)
        done.append(fit(given, runtime, fused_bn=on))
        assert bool(calls) is on
    plain, quick = done
    norms = [module for module in quick.job.objective.modules() if isinstance(module, BatchNorm)]
    assert len(calls) == len(norms)
    assert quick.last["loss"] == pytest.approx(plain.last["loss"], rel=1e-4)
    for key, value in final(tmp_path / "False")["objective"].items():
        torch.testing.assert_close(final(tmp_path / "True")["objective"][key], value, rtol=1e-3, atol=1e-4)


def test_fused_bn_where_it_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"trainer.fused_bn=True needs channels-last .*precision=fp64.*leave it out"):
        fit(job(tmp_path), Runtime(device=torch.device("cpu"), precision="fp64"), fused_bn=True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"trainer.fused_bn=True cannot be had, leave it out: .* on CUDA"):
        fit(job(tmp_path), fused_bn=True)


@pytest.mark.parametrize(
    ("groups", "world", "on", "name"),
    [
        (1, 1, False, "torch, 1 part of the batch"),
        (1, 1, True, "batch_norm.fused, 1 part of the batch"),
        (2, 4, True, "batch_norm.fused, 2 parts of the batch"),
        (2, 4, False, "fastsimclr, 2 parts of the batch"),
        (4, 2, True, "fastsimclr, 4 parts of the batch"),
    ],
)
def test_result_files_say_which_bn_ran(groups: int, world: int, on: bool, name: str) -> None:
    assert bn_name(groups, world, on) == name
