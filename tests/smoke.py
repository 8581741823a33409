"""Runs of smoke size that many tests start from, each trained once a session, whichever process needs it first.

A pytest plugin, loaded by conftest.py. A test that changes a run copies it first.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

PLAIN = ("--config", "digits.yaml", "--device", "cpu", "--smoke", "--trainer.precision", "fp32")
SMOKE = (*PLAIN, "--distill.temperature", "null")
SmokeRun = Callable[[str], Path]

# The words of each command; {NAME}: the folder of another of these runs.
_COMMANDS: dict[str, tuple[str, ...]] = {
    "pretrain": ("pretrain", *SMOKE, "--pretrain.probe_every_epochs", "1"),
    "linear": ("linear", "--from", "{pretrain}"),
    "sgd": ("linear", "--from", "{pretrain}", "--linear.method", "sgd"),
    "knn": ("knn", "--from", "{pretrain}"),
    "finetune": ("finetune", "--from", "{pretrain}"),
    "distill": ("distill", "--teacher", "{finetune}", "--student", "resnet34"),
    "supervised": ("supervised", *SMOKE),
}


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """smoke_run(name): the folder of a finished run, one of pretrain, linear, sgd, knn, finetune, distill, supervised.

    The processes of pytest-xdist share the runs; a lock has the others wait for the one that trains.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke-runs"
    root.mkdir(exist_ok=True)

    def run(name: str) -> Path:
        from fastsimclr.cli.main import main  # not for the ranks, which load test files

        needs = [word.strip("{}") for word in _COMMANDS[name] if word.startswith("{")]
        folders = {f"{{{need}}}": str(run(need)) for need in needs}
        folder = root / name
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go of when the file is closed
            if not (folder / "result.json").is_file():
                words = [folders.get(word, word) for word in _COMMANDS[name]]
                assert main([*words, "--out", str(folder)]) == 0, words
        return folder

    return run
