"""Ten steps of SimCLR in float64 give the losses on record, on every supported version of torch.

tests/golden/simclr-fp64.json was written by this command at fastsimclr 0.1.0, before the modules were regrouped.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastsimclr.cli.main import main
from fastsimclr.runs.log import read_records

GOLDEN = Path(__file__).parents[1] / "golden" / "simclr-fp64.json"


def test_ten_steps_of_simclr_in_float64(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert main([*golden["command"], "--out", str(tmp_path / "run")]) == 0
    records = [record for record in read_records(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "train"]
    assert [record["loss"] for record in records[:10]] == pytest.approx(golden["losses"], rel=1e-9, abs=0)
    assert [record["learning_rate"] for record in records[:10]] == pytest.approx(golden["learning_rates"], rel=1e-12)
