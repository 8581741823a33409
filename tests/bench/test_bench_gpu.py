"""On a CUDA device: the step bench in its three modes. Imports no command line, which a GPU machine may lack."""

from __future__ import annotations

import pytest

from fastsimclr.bench.record import LAST
from fastsimclr.bench.step import bench_step
from fastsimclr.bench.training_configs import StepBench, TrainingStage

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_step_in_every_mode(stage: TrainingStage) -> None:
    result = bench_step(StepBench(device="cuda", smoke=True, stage=stage, modes=("eager", "compile", "graph")))
    rows = {row["name"]: row for row in result["rows"]}
    assert "comparable" in result["checks"]["losses"]
    graph = rows["ours bf16 graph"]
    assert set(graph["phase_ms"]) == {"wait", "views", "graph", "optimizer", LAST}
    assert graph["facts"]["prepared_s"] > 0 and graph["peak_memory_mib"] > 0
    assert rows["ours bf16 compile"]["facts"]["prepared_s"] > 0
    assert result["environment"]["cudnn"] and result["environment"]["capability"]
