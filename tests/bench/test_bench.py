"""The loader bench at smoke size; how benches measure and compare, what they check, and when they refuse."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from fastsimclr.bench import baseline, gpu_check, ours, rivals
from fastsimclr.bench.compare import compare
from fastsimclr.bench.configs import LoaderBench
from fastsimclr.bench.files import open_files
from fastsimclr.bench.loader import _decoded, bench_loader
from fastsimclr.bench.record import LAST, Contestant, Round, Stopwatch, measure, report, write
from fastsimclr.bench.table import table
from fastsimclr.bench.training_configs import E2eBench, StepBench
from fastsimclr.cli.main import main
from fastsimclr.loaders import DataError
from fastsimclr.runtime.device import choose_runtime

CPU = torch.device("cpu")


@pytest.fixture
def without_lightly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "find_spec", lambda name: None)


@pytest.mark.slow
def test_loader_on_real_files(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for index in range(20):
        pixels = np.kron(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8), np.ones((8, 8, 1), dtype=np.uint8))
        Image.fromarray(pixels).save(tmp_path / f"{index}.jpg")
    result = bench_loader(LoaderBench(device="cpu", smoke=True, root=str(tmp_path)))
    assert result["bench"] == "loader" and result["kind"] == "cpu" and result["config"]["smoke"] is True
    for row in result["rows"]:
        (only,) = row["rounds"]
        assert only["seconds"] == pytest.approx(sum(only["step_s"])) == pytest.approx(sum(only["phase_s"].values()))
        assert only["images"] == 16 and len(only["step_s"]) == 2
    views = {row["name"]: row["views_per_image"] for row in result["rows"]}
    others = {"FFCV, 2 crops": "ffcv", "DALI CPU, 2 crops": "nvidia"}
    packed = ["ours native, ship once", "ours native, 2 crops", "simplejpeg, decoding only"]
    packed += [name for name, package in others.items() if find_spec(package)]
    packed += ["DataLoader, 2 crops", "DataLoader, torchvision's whole views", "ours resident, 2 crops"]
    raw = ["ours native, ship once", "ours native, 2 crops", *(["FFCV, 2 crops"] if find_spec("ffcv") else [])]
    files = packed[: packed.index("DataLoader, 2 crops")]
    assert list(views) == packed + [f"{name}, raw" for name in raw] + [f"{name}, originals" for name in files]
    assert all(count == (0 if "ship" in name or "only" in name else 2) for name, count in views.items())
    pairs = {(r["ours"], r["baseline"]) for r in result["ratios"]}
    assert {b for a, b in pairs if a == "ours native, ship once"} == {
        "simplejpeg, decoding only",
        "DataLoader, torchvision's whole views",
    }
    # Each ratio is of two that read the same images.
    assert all(a.endswith(kind) == b.endswith(kind) for a, b in pairs for kind in (", raw", ", originals"))
    assert {b for _, b in pairs} == {row["name"] for row in result["rows"] if not row["ours"]}
    rate = {row["name"]: row["images_per_s"]["median"] for row in result["rows"]}
    for pair in result["ratios"]:
        assert pair["median"] == pytest.approx(rate[pair["ours"]] / rate[pair["baseline"]])
    assert "16 files" in result["checks"]["images"]


def test_a_stream_ends_before_the_next_begins() -> None:
    """What a stream still reads ahead must not run in the time of the next one."""
    busy = threading.Event()

    def stream() -> Iterator[int]:
        def read_ahead() -> None:
            start = time.thread_time()
            while time.thread_time() - start < 0.5:
                sum(range(1000))
            busy.set()

        threading.Thread(target=read_ahead, daemon=True).start()
        yield from range(10)

    running = stream()
    assert next(running) == 0 and not busy.is_set()
    rivals.end(running)
    assert busy.is_set() and next(running, None) is None


def test_all_give_crops_in_bytes(tmp_path: Path) -> None:
    source, _ = open_files(None, 8, 40, 0, tmp_path)
    path, picture = source.describe(0), Image.open(source.describe(0))
    for given in (rivals.crop_twice(16, v2.PILToTensor())(picture), rivals.crop_twice(16)(_decoded(path))):
        assert [(view.dtype, view.shape) for view in given] == [(torch.uint8, (3, 16, 16))] * 2


def test_files_are_spread_and_too_few_are_refused(tmp_path: Path) -> None:
    source, _ = open_files(None, 10, 8, 0, tmp_path)
    some, _ = open_files(str(tmp_path / "images"), 4, 8, 0, tmp_path)
    assert [Path(some.describe(i)).name for i in range(4)] == [f"{k:06d}.jpg" for k in (0, 3, 6, 9)]
    assert len(source) == 10
    with pytest.raises(DataError, match="has 10 training images, images=11"):
        open_files(str(tmp_path / "images"), 11, 8, 0, tmp_path)


def entry(name: str, is_ours: bool, seconds: list[float], loss: float, order: list[str]) -> Contestant:
    turns = iter(seconds)

    def run() -> Round:
        order.append(name)
        taken = next(turns)
        return Round(
            images=10, seconds=taken, step_s=[taken / 2] * 2, phase_s={LAST: taken}, loss=loss, first_loss=loss
        )

    return Contestant(name=name, ours=is_ours, views=2, run=run, details={})


def fake(a_s: list[float], b_s: list[float], losses: tuple[float, float] = (2.0, 2.1)) -> dict[str, Any]:
    order: list[str] = []
    rows = measure([entry("a", True, a_s, losses[0], order), entry("b", False, b_s, losses[1], order)], 2, CPU)
    assert order == ["a", "b"] * 3
    return report("step", {"seed": 3, "batch": 5}, choose_runtime("cpu", "fp32", False), rows, checks={})


def test_rounds_take_turns_and_warm_up_is_left_out() -> None:
    result = fake([9.0, 1.0, 2.0], [8.0, 4.0, 4.0])
    a, b = result["rows"]
    assert a["images_per_s"] == {"median": 7.5, "min": 5.0, "max": 10.0}
    assert a["warmup"]["seconds"] == 9.0 and a["step_ms"]["p50"] == 750.0
    assert b["images_per_s"]["median"] == 2.5
    (ratio,) = result["ratios"]
    assert (ratio["min"], ratio["median"], ratio["max"]) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize("losses", [(2.0, float("nan")), (2.0, 4.0)])
def test_no_ratio_where_losses_are_not_comparable(losses: tuple[float, float]) -> None:
    result = fake([1.0] * 3, [1.0] * 3, losses)
    assert result["ratios"] == [] and "FAILED" in result["checks"]["losses"]
    assert "FAILED" in table(result)


def test_stopwatch_splits_steps_into_phases() -> None:
    watch = Stopwatch(CPU)
    for moment in (1.0, 1.5, 4.0, 4.25):
        watch._moments.append(moment)
    watch._moments[0] = 0.0
    watch._phases = ["forward", LAST, "forward", LAST]
    done = watch.round(batch=3)
    assert (done.images, done.seconds, done.step_s) == (6, 4.25, [1.5, 2.75])
    assert done.phase_s == {"forward": 3.5, LAST: 0.75}


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = tmp_path / "slow.json", tmp_path / "fast.json"
    write(slow, fake([9.0, 2.0, 2.0], [8.0, 4.0, 4.0]))
    write(fast, fake([9.0, 1.0, 1.0], [8.0, 4.0, 4.0]))
    assert main(["bench", "compare", str(slow), str(fast)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["a", "5.0", "10.0", "2.000"]
    assert lines[3].split() == ["b", "2.5", "2.5", "1.000", "(ranges", "overlap)"]
    assert lines[5].split() == ["first", "->", "second", "step", "p50", "ms", "p99", "ms"]
    assert lines[6].split() == ["a", "1,000.0", "->", "500.0", "1,000.0", "->", "500.0"]


def test_compare_shows_what_both_reports_have(tmp_path: Path) -> None:
    paths = tmp_path / "one.json", tmp_path / "other.json"
    for path, mfu in zip(paths, (20.0, 25.0), strict=True):
        result = fake([1.0] * 3, [1.0] * 3)
        result["rows"][0] |= {"mfu_pct": mfu, "peak_memory_mib": 1000.0}
        result["rows"][1] |= {"peak_memory_mib": None}
        write(path, result)
    _, title, a, b = compare(*paths).splitlines()[-4:]
    assert title.split()[-4:] == ["peak", "MiB", "MFU", "%"]
    assert a.split()[-6:] == ["1,000", "->", "1,000", "20.0", "->", "25.0"] and b.split()[-2:] == ["-", "-"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bench": "e2e"}, "bench"),
        ({"config": {"seed": 3, "batch": 6}}, r"config.batch \(5 and 6\)"),
        ({"environment": {"device": "another", "threads": 1}}, "device"),
        ({"format": 0}, "no bench report"),
    ],
)
def test_compare_refuses_what_was_not_measured_alike(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    write(one, fake([1.0] * 3, [1.0] * 3))
    write(other, fake([1.0] * 3, [1.0] * 3) | change)
    with pytest.raises(ValueError, match=named):
        compare(one, other)


@pytest.mark.slow
def test_same_work_refuses_another_network(monkeypatch: pytest.MonkeyPatch, without_lightly: None) -> None:
    baseline.same_work(ours.network("resnet18", 16, 0), 16, "resnet18")
    with pytest.raises(ArithmeticError, match="other shapes"):
        baseline.same_work(ours.network("resnet34", 16, 0), 16, "resnet18")
    init = baseline.Net.__init__

    def pooled(net: Any, arch: str, size: int) -> None:
        init(net, arch, size)
        net.encoder.avgpool = nn.AdaptiveMaxPool2d(1)

    monkeypatch.setattr(baseline.Net, "__init__", pooled)
    with pytest.raises(ArithmeticError, match="same weights and views"):
        baseline.same_work(ours.network("resnet18", 16, 0), 16, "resnet18")


def test_plain_baseline_loss_is_algorithm_1(without_lightly: None) -> None:
    z = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit = z / z.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(6):
        similar = [math.exp(float(unit[i] @ unit[k]) / ours.TEMPERATURE) for k in range(6)]
        total -= math.log(similar[(i + 3) % 6] / (sum(similar) - similar[i])) / 6
    assert float(baseline.loss_function()(z[:3], z[3:])) == pytest.approx(total, rel=1e-6)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="rounds=0 must be 1 or more"):
        StepBench(rounds=0)
    with pytest.raises(ValueError, match="images=64 is fewer than batch=128; raise --images"):
        E2eBench(images=64)


def test_gpu_check_without_a_gpu_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gpu_check_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name == "simplejpeg" else object())
    assert gpu_check.main(["--part", "speed", "--wheels", "none"]) == 2
    assert "missing simplejpeg" in capsys.readouterr().err


@pytest.mark.slow
def test_gpu_check_and_benches_need_no_command_line_library() -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('jsonargparse', 'lightly')))\n"
        "import fastsimclr.bench.gpu_check, fastsimclr.bench.e2e, fastsimclr.bench.step, fastsimclr.bench.loader\n"
        "import fastsimclr.bench.loss, fastsimclr.bench.views, fastsimclr.bench.lars\n"
        "import fastsimclr.bench.gpu.kernels, fastsimclr.bench.gpu.speed, fastsimclr.bench.gpu.training\n"
        "import fastsimclr.bench.scaling, fastsimclr.bench.scaling_rank\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=gpu_check.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
