"""Ten steps of SimCLR in float64 give the losses on record, on every supported version of torch.

tests/golden/simclr-fp64.json was written by this command at fastsimclr 0.1.0, before the modules were regrouped. The
weights are drawn by numpy, as torch draws other normal numbers from a seed in 2.11 than in 2.15.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastsimclr.cli.main import main
from fastsimclr.runs.log import read_records

GOLDEN = Path(__file__).parents[1] / "golden" / "simclr-fp64.json"


def test_ten_steps_of_simclr_in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["fastsimclr.stages.pretrain"]
    build = module.build_simclr

    def drawn(*args: Any) -> nn.Module:
        network: nn.Module = build(*args)
        rng = np.random.default_rng(0)
        with torch.no_grad():
            for weight in network.parameters():
                if weight.dim() > 1:
                    scale = math.sqrt(2 / (weight.numel() / len(weight)))
                    weight.copy_(torch.from_numpy(rng.standard_normal(weight.shape) * scale))
        return network

    monkeypatch.setattr(module, "build_simclr", drawn)
    golden = json.loads(GOLDEN.read_text())
    assert main([*golden["command"], "--out", str(tmp_path / "run")]) == 0
    records = [record for record in read_records(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "train"]
    assert [record["loss"] for record in records[:10]] == pytest.approx(golden["losses"], rel=1e-9, abs=0)
    assert [record["learning_rate"] for record in records[:10]] == pytest.approx(golden["learning_rates"], rel=1e-12)
