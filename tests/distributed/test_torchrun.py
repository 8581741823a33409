"""Real torchrun runs on one machine: any number of ranks gives the same network, and a rank's end ends them all."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastsimclr.cli.main import main
from fastsimclr.runs import checkpoint
from fastsimclr.runs.log import read_records

ROOT = Path(__file__).parents[2]
BATCH, TOTAL = 48, 900 // 48 + 1
# Of 1,000 images 900 are for training; noise, for scikit-learn's digits take every process a second to import.
PRETRAIN = (
    "pretrain --config digits.yaml --data.source synthetic --data.synthetic_images 1000 --data.synthetic_size 8"
    f" --device cpu --trainer.precision fp64 --model.width 0.125 --pretrain.batch {BATCH}"
    " --pretrain.epochs 1 --pretrain.optim.lr 0.1 --pretrain.optim.warmup_epochs 0.2 --trainer.log_every_steps 1"
    " --trainer.checkpoint_every_steps 5 --trainer.bn_groups 4"
).split()


class Run:
    """One torchrun."""

    def __init__(self, ranks: int, *words: str) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "fastsimclr", *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def children(self) -> list[int]:
        file = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(child) for child in file.read_text().split()] if file.is_file() else []

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        for child in self.children():
            if f"RANK={number}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
                return child
        raise AssertionError(f"no rank {number} among {self.children()}")

    def kill(self) -> None:
        """End torchrun and its ranks, which have sessions of their own."""
        for pid in [*self.children(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_for(self, run: Path, step: int) -> None:
        """Until metrics.jsonl has the record of `step`."""
        file = run / "metrics.jsonl"
        while f'"step": {step},' not in (file.read_text() if file.is_file() else ""):
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.002)

    def end(self, timeout_s: float = 120) -> tuple[int, str]:
        """(exit code, everything said)."""
        try:
            said = self.process.communicate(timeout=timeout_s)[0]
        finally:
            if self.process.poll() is None:
                self.kill()
        return self.process.returncode, said


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error:")]


def distance(left: Path, right: Path) -> float:
    """The largest difference between two ends, weights, momentum and BN statistics, relative to each tensor's size."""
    ends = [checkpoint.load(checkpoint.newest(run)) for run in (left, right)]
    assert [end["step"] for end in ends] == [TOTAL, TOTAL]
    assert ends[0]["facts"] == ends[1]["facts"]
    pairs = [(value, ends[1]["objective"][key]) for key, value in ends[0]["objective"].items()]
    states = [end["optimizer"]["state"] for end in ends]
    pairs += [(state["momentum"], states[1][key]["momentum"]) for key, state in states[0].items()]
    assert len(pairs) > 100
    far = [float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)) for a, b in pairs]
    assert all(map(math.isfinite, far))  # max overlooks NaN
    return max(far)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, with the same four parts of the batch for BN."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert main([*PRETRAIN, "--out", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four ranks of which one was killed after step 12."""
    run = tmp_path_factory.mktemp("killed") / "run"
    four = Run(4, *PRETRAIN, "--out", str(run))
    four.wait_for(run, 12)
    os.kill(four.rank(2), signal.SIGKILL)
    code, said = four.end(timeout_s=60)
    assert code != 0
    assert re.search(r"rank\s+: 2 \(local_rank: 2\)\n\s+exitcode\s+: -9", said), said
    assert not (run / "result.json").exists()
    assert checkpoint.newest(run).name == "step-00000010.pt"
    return run


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 3])
def test_killed_at_four_ranks_and_resumed_at_fewer(alone: Path, killed: Path, tmp_path: Path, ranks: int) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    code, said = Run(ranks, *PRETRAIN, "--out", str(run), "--resume", "auto").end()
    assert code == 0, said
    assert said.count("resumed from") == 1
    print(f"distance at {ranks} ranks: {distance(run, alone):.1e}")
    assert distance(run, alone) < 1e-8  # float64; 4e-10 was reached
    records = [r for r in read_records(run / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in records] == list(range(1, TOTAL + 1))
    expected = [r["loss"] for r in read_records(alone / "metrics.jsonl") if r["kind"] == "train"]
    np.testing.assert_allclose([r["loss"] for r in records], expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [False, pytest.param(True, marks=pytest.mark.full)])
def test_sigterm_saves_once_at_one_step(tmp_path: Path, everyone: bool) -> None:
    run = tmp_path / "stopped"
    all_of_them = Run(2, *PRETRAIN, "--trainer.checkpoint_every_steps", "1000", "--out", str(run))
    all_of_them.wait_for(run, 3)
    os.kill(all_of_them.process.pid if everyone else all_of_them.rank(1), signal.SIGTERM)
    code, said = all_of_them.end(timeout_s=60)
    assert code != 0
    (saved,) = checkpoint.saved(run)
    (stopped,) = re.findall(rf"pretrain: stopped at step (\d+) of {TOTAL}, state saved in (\S+);", said)
    assert stopped == (str(checkpoint.load(saved)["step"]), str(saved))
    assert 3 < int(stopped[0]) < TOTAL
    assert errors(said) == []


@pytest.mark.slow
def test_the_failing_rank_is_named_and_the_others_end(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(64):
        path = tmp_path / "images" / f"{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images" / "1" / "33.png").write_bytes(b"not an image")
    options = (
        f"pretrain --config folder.yaml --data.root {tmp_path}/images --data.loader native --data.max_bad_fraction 0"
        f" --device cpu --views.size 16 --model.width 0.125 --model.arch resnet18 --pretrain.batch 8"
        f" --pretrain.epochs 12 --out {tmp_path}/run"
    )
    started = time.monotonic()
    code, said = Run(2, *options.split()).end(timeout_s=90)
    assert code != 0
    (line,) = errors(said)
    assert re.match(r"error: rank [01] of 2, \S+: images.*33\.png is not an image", line), said
    assert time.monotonic() - started < 80


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    run = tmp_path / "hung"
    two = Run(2, *PRETRAIN, "--trainer.timeout_s", "5", "--out", str(run))
    two.wait_for(run, 3)
    hung = two.rank(1)
    os.kill(hung, signal.SIGSTOP)
    while Path(f"/proc/{hung}/stat").read_text().split()[2] != "T":
        time.sleep(0.01)
    started = time.monotonic()
    process, said = two.process, ""
    assert process.stdout is not None
    while "error: " not in said and time.monotonic() - started < 60:
        said += process.stdout.readline()
    two.kill()
    said += process.communicate()[0]
    (line,) = errors(said)
    assert "rank 1 on" in line
    assert "shows no sign of life" in line


@pytest.mark.full
def test_the_whole_chain_on_two_ranks(tmp_path: Path) -> None:
    code, said = Run(2, "run", "--config", "digits.yaml", "--smoke", "--device", "cpu", "--out", str(tmp_path)).end()
    assert code == 0, said
    assert said.count("results: ") == 1
    again, said = Run(2, "run", "--config", "digits.yaml", "--smoke", "--device", "cpu", "--out", str(tmp_path)).end()
    assert again == 0, said
    assert said.count("done before") == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.bn_groups", "5"], "do not divide pretrain.batch=48"),
        pytest.param(["--out", "{alone}"], "already holds step-000000", marks=pytest.mark.full),
    ],
)
def test_an_error_of_all_ranks_is_said_once(alone: Path, tmp_path: Path, words: list[str], message: str) -> None:
    words = [word.format(alone=alone) for word in words]
    out = [] if "--out" in words else ["--out", str(tmp_path)]
    code, said = Run(2, *PRETRAIN, *out, *words).end()
    assert code != 0
    (line,) = errors(said)
    assert message in line, said
