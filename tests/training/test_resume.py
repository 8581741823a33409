"""Real processes killed, terminated and interrupted, then resumed: the end is that of a run left alone, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsimclr.runs import checkpoint
from fastsimclr.runs.log import read_records

pytestmark = pytest.mark.slow  # the same in one process: tests/training/test_trainer.py
ROOT = Path(__file__).parents[2]
TOTAL = 900 // 64 + 1
# Of 1,000 images 900 are for training; noise, for scikit-learn's digits take every process a second to import.
PRETRAIN = (
    "--config digits.yaml --data.source synthetic --data.synthetic_images 1000 --data.synthetic_size 8"
    " --device cpu --trainer.precision fp32 --model.width 0.125 --pretrain.batch 64"
    " --pretrain.epochs 1 --pretrain.optim.warmup_epochs 0.2 --trainer.log_every_steps 1"
    " --trainer.checkpoint_every_steps 3"
)


def start(run: Path, *options: str) -> subprocess.Popen[str]:
    """A pretraining in its own process, on one thread so that the order of every sum is given."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastsimclr", "pretrain", *PRETRAIN.split(), "--out", str(run), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until metrics.jsonl has the record of `step`."""
    while f'"step": {step},' not in (metrics.read_text() if (metrics := run / "metrics.jsonl").is_file() else ""):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, standard error)."""
    _, error = process.communicate(timeout=120)
    return process.returncode, error


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(item, f"{name}/{key}")
    else:
        yield name, value


def assert_same_end(left: Path, right: Path) -> None:
    """Networks, momentum, torch's generator and the record of every step are equal in every bit."""
    ends = [checkpoint.load(checkpoint.newest(run)) for run in (left, right)]
    a, b = (
        dict(flat({key: end[key] for key in ("step", "objective", "optimizer", "facts", "fingerprint")}))
        | {"rng": end["rng"]["torch"]}
        for end in ends
    )
    assert a.keys() == b.keys()
    tensors = [key for key in a if isinstance(a[key], torch.Tensor)]
    assert sum("momentum" in key for key in tensors) > 30
    assert [key for key in tensors if not torch.equal(a[key], b[key])] == []
    assert [key for key in a if key not in tensors and a[key] != b[key]] == []
    losses = [[(r["kind"], r["step"], r["loss"]) for r in read_records(run / "metrics.jsonl")] for run in (left, right)]
    assert [step for _, step, _ in losses[0]] == list(range(1, TOTAL + 1))
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    code, error = finish(start(run))
    assert code == 0, error
    return run


def test_killed_three_times_and_resumed(alone: Path, tmp_path: Path) -> None:
    rng = random.Random(2002_05709)
    run = tmp_path / "killed"
    for step in sorted(rng.sample(range(2, TOTAL - 1), 3)):
        process = start(run, "--resume", "auto")
        wait_for(process, run, step)
        time.sleep(rng.uniform(0, 0.03))  # so that the kill may fall into a checkpoint's writing, too
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
        assert not (run / "result.json").exists()
    code, error = finish(start(run, "--resume", "auto"))
    assert code == 0, error
    assert "resumed from" in error
    assert_same_end(alone, run)
    assert {path.name for path in checkpoint.folder(run).iterdir()} == {
        path.name for path in checkpoint.folder(alone).iterdir()
    }


@pytest.mark.parametrize(
    ("signum", "code"), [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full), (signal.SIGINT, 130)]
)
def test_stopped_and_resumed(alone: Path, tmp_path: Path, signum: int, code: int) -> None:
    run = tmp_path / "stopped"
    process = start(run, "--trainer.checkpoint_every_steps", "1000")
    wait_for(process, run, 4)
    process.send_signal(signum)
    found, error = finish(process)
    assert found == code, error
    (saved,) = checkpoint.saved(run)
    step = checkpoint.load(saved)["step"]
    assert saved.name == f"step-{step:08d}.pt"
    assert 4 <= step < TOTAL
    message = f"pretrain: stopped at step {step} of {TOTAL}, state saved in {saved}; give the same command"
    assert f"{message} with --resume auto to go on" in error
    assert "Traceback" not in error
    if signum == signal.SIGTERM:  # SIGINT takes the same way
        code, error = finish(start(run, "--resume", "auto"))
        assert code == 0, error
        assert_same_end(alone, run)
