"""The GPU check: its record, its budget and its cases, and on a CUDA device the step bench in its three modes.

Imports no command line, which a GPU machine may lack.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsimclr.bench import gpu_check
from fastsimclr.bench.gpu import kernels
from fastsimclr.bench.gpu.record import Entry, Job, Sheet, Size
from fastsimclr.bench.gpu.speed import LEFT_OUT
from fastsimclr.bench.record import LAST
from fastsimclr.bench.step import bench_step
from fastsimclr.bench.training_configs import StepBench, TrainingStage

CPU = torch.device("cpu")


class Clock:
    """Time that passes only when a job says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def job(self, name: str, expected_s: float, takes_s: float, **entry: Any) -> Job:
        """A job of one size that takes `takes_s` and returns `entry`."""

        def run() -> Entry:
            self.now += takes_s
            return entry

        return Job(name=name, sizes=[Size(name="full", expected_s=expected_s, run=run)])


def raising(error: Exception) -> Callable[[], Entry]:
    def run() -> Entry:
        raise error

    return run


def statuses(path: Path) -> dict[str, str]:
    return {name: entry["status"] for name, entry in json.loads(path.read_text())["entries"].items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out" / "part.json"


def test_what_does_not_fit_the_budget_is_dropped_by_name(path: Path) -> None:
    clock = Clock()
    sheet = Sheet(path, {"part": "speed"}, 30.0, clock=clock)
    jobs = [clock.job("first", 10, 10, ms=1.0), clock.job("large", 25, 25), clock.job("small", 15, 15)]
    assert sheet.run(jobs) == [] and sheet.failed == []
    written = json.loads(path.read_text())
    assert written["dropped"] == ["large"] and written["counts"] == {"dropped": 1, "ok": 2}
    assert written["entries"]["large"]["passed_over"] == {"full": "it needs about 25 s and 20 s are left"}
    assert written["entries"]["first"] == {
        "status": "ok", "size": "full", "seconds": 10.0, "passed_over": {}, "ms": 1.0
    }  # fmt: skip


def test_a_slow_machine_is_expected_to_stay_slow(path: Path) -> None:
    clock = Clock()
    sheet = Sheet(path, {}, 30.0, clock=clock)
    sheet.run([clock.job("twice as slow", 5, 10), clock.job("would take 22", 11, 22), clock.job("takes 20", 10, 20)])
    assert statuses(path) == {"twice as slow": "ok", "would take 22": "dropped", "takes 20": "ok"}


def test_a_smaller_size_replaces_what_has_no_time_or_memory(path: Path) -> None:
    clock = Clock()
    sheet = Sheet(path, {}, 30.0, clock=clock)
    sizes = [
        Size(name="65536", expected_s=99.0, run=lambda: {}),
        Size(name="16384", expected_s=1.0, run=raising(torch.OutOfMemoryError("Tried to allocate 9 GiB. More"))),
        Size(name="8192", expected_s=1.0, run=lambda: {"ms": 2.0}),
    ]
    sheet.run([Job(name="loss", sizes=sizes), Job(name="too large", sizes=sizes[1:2])])
    entry = json.loads(path.read_text())["entries"]["loss"]
    assert (entry["status"], entry["size"], entry["ms"]) == ("ok", "8192", 2.0)
    assert list(entry["passed_over"]) == ["65536", "16384"]
    assert entry["passed_over"]["16384"] == "out of memory: Tried to allocate 9 GiB"
    assert sheet.failed == ["too large"]


def test_an_exception_or_a_failed_check_does_not_stop_the_rest(path: Path) -> None:
    clock = Clock()
    sheet = Sheet(path, {}, 30.0, clock=clock)
    broken = Job(name="raises", sizes=[Size(name="full", expected_s=1, run=raising(ZeroDivisionError("by zero")))])
    sheet.run([broken, clock.job("wrong", 1, 1, ok=False, error_found=float("nan")), clock.job("right", 1, 1, ok=True)])
    assert statuses(path) == {"raises": "error", "wrong": "failed", "right": "ok"}
    assert sheet.failed == ["raises", "wrong"]
    written = json.loads(path.read_text())["entries"]
    assert written["raises"]["error"] == "ZeroDivisionError: by zero"
    assert written["wrong"]["error_found"] == "nan"


def test_the_file_is_complete_at_every_moment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def look() -> Entry:
        seen.append(statuses(path))
        return {}

    sheet = Sheet(path, {}, 30.0, clock=Clock())
    sheet.run([Job(name=name, sizes=[Size(name="full", expected_s=1, run=look)]) for name in ("a", "b")])
    assert seen == [{"a": "running"}, {"a": "ok", "b": "running"}]
    assert [file.name for file in path.parent.iterdir()] == ["part.json"]

    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    sheet.put("c", status="running")
    gpu_check._cut_off(sheet)
    assert codes == [1] and statuses(path) == {"a": "ok", "b": "ok", "c": "error"}


def test_after_a_broken_device_the_rest_is_for_a_new_process(path: Path) -> None:
    clock = Clock()
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    broken = Job(name="breaks", sizes=[Size(name="full", expected_s=1, run=raising(error))])
    rest = Sheet(path, {}, 30.0, clock=clock).run([broken, clock.job("b", 1, 1), clock.job("c", 1, 1)])
    assert rest == ["b", "c"] and statuses(path) == {"breaks": "error"}
    sheet = Sheet(path, {}, 30.0, keep=True, clock=clock)
    later = Job(name="instead of b", sizes=[Size(name="full", expected_s=1, run=lambda: {})], unless=["b"])
    sheet.run([clock.job("b", 1, 1), later])
    assert statuses(path) == {"breaks": "error", "b": "ok"} and sheet.failed == ["breaks"]


def test_cases_see_an_error_and_an_element_that_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, normal = (6, 13, 3, 7), kernels.batch_norm
    unwritten = torch.zeros(shape)
    unwritten[3, 5, 1, 2] = float("nan")
    changes: list[Callable[[Tensor], Tensor]] = [lambda y: y, lambda y: y * 1.0001, lambda y: y + unwritten]
    for expected, change in zip((True, False, False), changes, strict=True):

        def other(*given: Any, backend: str, change: Callable[[Tensor], Tensor] = change, **options: Any) -> Tensor:
            y = normal(*given, backend="reference", **options)
            return change(y) if backend == "fused" else y

        monkeypatch.setattr(kernels, "batch_norm", other)
        entry = kernels.batch_norm_case(CPU, shape, torch.float32)
        assert entry["ok"] == entry["checks"]["y"]["ok"] == expected
    bad, ones = torch.tensor([1.0, float("nan")]), torch.ones(2, dtype=torch.float64)
    errors = [kernels.largest(bad, ones), kernels.frobenius(bad, ones, 1.0), kernels.worst([1.0, float("nan"), 2.0])]
    assert all(error != error and not kernels.check(error, 1e9, "")["ok"] for error in errors)
    with kernels.poisoned():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_packages_come_from_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "carried-1-py3-none-any.whl", "w") as archive:
        archive.writestr("carried_for_the_check.py", "ANSWER = 42\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    gpu_check._unpack(tmp_path)
    assert os.environ["PYTHONPATH"].split(os.pathsep) == ["before", sys.path[-1]]
    assert gpu_check._missing({"carried_for_the_check": "carried", "not_there_at_all": "absent"}) == ["absent"]


@pytest.mark.parametrize(
    ("text", "code", "ok", "bad"),
    [
        ("tests/a.py::test_b PASSED [ 9%]\n", 0, True, []),
        ("tests/a.py::test_b PASSED [ 9%]\n", None, True, []),
        ("[gw1] [ 9%] FAILED tests/a.py::test_b\n", 1, False, ["tests/a.py::test_b"]),
        ("tests/a.py::test_b FAILED [ 9%]\n", None, False, ["tests/a.py::test_b"]),
        ("no such option", 4, False, []),
    ],
)
def test_pytest_is_read(
    text: str, code: int | None, ok: bool, bad: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], stdout: Any, timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
        stdout.write(text)
        stdout.flush()
        assert timeout == 20.0
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", run)
    entry = gpu_check._pytest(["tests"], Sheet(tmp_path / "x.json", {}, 30.0, clock=Clock()), tmp_path / "log")
    assert entry == {"ok": ok, "cut off by the budget": code is None, "log": "log", "bad": bad}


@pytest.mark.full
def test_rehearsal_of_all_parts(tmp_path: Path) -> None:
    """On a CPU, kernels in Triton's interpreter; a second call of the training continues the first."""
    command = [sys.executable, "-m", "fastsimclr.bench.gpu_check", "--device", "cpu", "--out", str(tmp_path)]

    def run(*options: str) -> None:
        done = subprocess.run([*command, *options], cwd=gpu_check.ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr

    run()
    reports = {part: json.loads((tmp_path / f"rehearsal-{part}.json").read_text()) for part in gpu_check.PARTS}
    for report in reports.values():
        assert report["kind"] == "cpu" and "no figure here is one of a GPU" in report["rehearsal"]
        assert {entry["status"] for entry in report["entries"].values()} <= {"ok", "dropped"}
    assert reports["kernels"]["dropped"] == ["tests of the kernels", "tests marked gpu"]
    for entry in reports["kernels"]["entries"].values():
        assert all(check["ok"] and check["reason"] for check in entry.get("checks", {}).values())
    speed = reports["speed"]["entries"]
    assert speed["roofline nt_xent M 64"]["flops"] == 6 * 64 * 64 * 128
    assert all(entry["share_pct"] > 0 for name, entry in speed.items() if name[:8] == "roofline" and "ms" in entry)
    assert reports["speed"]["dropped"] == list(LEFT_OUT) and (tmp_path / "rehearsal-loss.json").exists()
    first = reports["training"]["entries"]["training eager"]
    assert 0 <= first["knn_top1"] <= 1 and first["step"] == first["steps in all"] and first["continued from"] is None
    run("--part", "training")
    second = json.loads((tmp_path / "rehearsal-training.json").read_text())["entries"]
    assert second["training eager"]["continued from"] == f"step-{first['step']:08d}.pt"
    assert second["earlier calls"]["calls"] == [first]


@pytest.mark.gpu
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
