"""The benches of single calls: what they report and check, how memory is measured, and when no ratio is given."""

from __future__ import annotations

import ast
import json
import math
import signal
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsimclr.bench import calls, gpu_check, lars, loss, memory, norm, views
from fastsimclr.bench.calls import Candidate, OpCase, measure_case, ratios_of
from fastsimclr.bench.calls_table import table_of_calls
from fastsimclr.bench.ceilings import Ceilings, measure_ceilings
from fastsimclr.bench.compare import compare
from fastsimclr.bench.configs import LarsBench, LossBench, NormBench, ViewsBench
from fastsimclr.bench.files import open_files
from fastsimclr.bench.record import write
from fastsimclr.cli.main import main
from fastsimclr.runtime.device import choose_runtime

CPU = torch.device("cpu")
MIB = 2**20
LIGHTLY = find_spec("lightly") is not None


RATES: dict[str, Any] = {"copy_bytes": 1e9, "matmul_flops": 1e6, "matmul": "product"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test is about neither: peak memory is 1 MiB, and the ceilings of the device are known."""
    monkeypatch.setattr(calls, "peak_in_child", lambda make_small, make: MIB)
    monkeypatch.setattr(calls, "measure_ceilings", lambda device: Ceilings(**RATES, exps=4e5, overlap=False))


def check_report(result: dict[str, Any], bench: str, families: list[str]) -> None:
    """Rows with times and memory, ratios that follow from them, no faults, and the environment."""
    assert result["bench"] == bench and result["kind"] == "cpu" and result["seed"] == 0
    assert {"device", "torch", "commit", "threads", "versions"} <= result["environment"].keys()
    assert result["checks"] and result["ceilings"]["copy_bytes"] > 0
    by_name = {(row["group"], row["name"]): row for row in result["rows"]}
    assert len(by_name) == len(result["rows"])
    assert [row["family"] for row in result["rows"]] == families
    for work in result["works"]:
        assert work["bound_s"] > 0
        for row in (row for row in result["rows"] if row["group"] == work["name"]):
            (only,) = row["rounds"]
            assert row["fault"] is None
            ms = 1e3 * only["seconds"] / only["images"] * work["items"]
            assert row["ms"]["median"] == pytest.approx(ms) and ms > 0
            assert row["per_s"]["median"] == pytest.approx(1e3 * work["items"] / ms)
            assert row["roofline_pct"] == pytest.approx(1e5 * work["bound_s"] / ms)
            assert 0 <= row["peak_memory_mib"] < 2000
    rivals = [row for row in result["rows"] if row["rival"] and not row["ours"]]
    assert len(result["ratios"]) == len(rivals)
    for ratio in result["ratios"]:
        mine, other = (by_name[ratio["group"], ratio[key]] for key in ("ours", "baseline"))
        assert ratio["median"] == pytest.approx(other["ms"]["median"] / mine["ms"]["median"])


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.full)])
def test_loss_on_the_command_line(
    whole: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """Memory and ceilings are measured where slow."""
    if not whole:
        request.getfixturevalue("quick")
    path = tmp_path / "loss.json"
    assert main(["bench", "loss", "--smoke", "--device", "cpu", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    check_report(result, "loss", ["ours", "plain torch", "plain torch", *["lightly"] * (2 * LIGHTLY)])
    assert sum(row["best_setting"] for row in result["rows"]) == 1 + LIGHTLY
    printed = capsys.readouterr().out
    assert "CPU figures" in printed and "time / ours" in printed and "peak MiB" in printed
    assert "plain torch at its best setting: plain torch" in printed and "GB/s" in printed


def test_lars_beside_what_is_there(quick: None) -> None:
    result = lars.bench_lars(LarsBench(device="cpu", smoke=True))
    check_report(result, "lars", ["ours", *["lightly"] * LIGHTLY, "plain torch", "torch's SGD", "torch's SGD"])
    assert {r["baseline"] for r in result["ratios"]} <= {"lightly", "plain torch, tensor after tensor"}
    (work,) = result["works"]
    whole = sum(p.numel() for p in lars.tensors("resnet50", 0.125, "cpu", 0).params)
    assert work["bound_s"] == pytest.approx(28 * whole / result["ceilings"]["copy_bytes"])


def test_norm_on_a_cpu_runs_torch_alone_and_says_so(quick: None) -> None:
    result = norm.bench_norm(NormBench(device="cpu", smoke=True))
    assert len(result["works"]) == 9 and not result["ratios"]
    assert {row["name"] for row in result["rows"] if row["rounds"]} == {"torch"}
    assert all(row["fault"] is None for row in result["rows"])
    # 8 views of 8 x 8 in 64 channels of bf16, 3 maps forward and 5 backward; a block's end reads and writes two more.
    stem, _, end, *_ = (work["bound_s"] * result["ceilings"]["copy_bytes"] for work in result["works"])
    assert stem == pytest.approx(8 * 2 * 8 * 64 * 8 * 8) and end == pytest.approx(10 * 2 * 8 * 256 * 4 * 4)
    printed = table_of_calls(result)
    assert "ours: its Triton kernels run on CUDA only" in printed
    assert "no CUDA device: only torch's operations ran, none of our kernels" in printed


def test_a_wrong_norm_gets_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    def unbiased(x: Tensor, *rest: Any) -> Tensor:
        return norm.eager(x, *rest) * (1 - 1 / x[:, 0].numel()) ** 0.5

    monkeypatch.setitem(norm.FORMS, "torch", norm.NormForm(family="torch", build=lambda: unbiased))
    words, fault = norm._verdict("torch", "fp32", "cpu", 0)
    assert fault == words and "bound 1e-04" in words


def test_views_with_a_gather(quick: None) -> None:
    threads = torch.get_num_threads()
    result = views.bench_views(ViewsBench(device="cpu", smoke=True, dataset=32))
    assert torch.get_num_threads() == threads
    families = ["ours", "torchvision", "torchvision", *["lightly"] * LIGHTLY, "ours", "plain torch"]
    check_report(result, "views", families)
    first, gathered = result["works"]
    # 16 images of 24 x 24 pixels read, two views of 16 x 16 of each written as float32.
    moved = 16 * 3 * (24 * 24 + 2 * 16 * 16 * 4)
    assert first["bound_s"] == gathered["bound_s"] == pytest.approx(moved / result["ceilings"]["copy_bytes"])
    assert len(result["op_errors"]) > 10
    assert "SimCLR's chain" in table_of_calls(result)


def test_views_of_a_folder(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "view_errors", lambda images, size: [])
    open_files(None, 20, 24, 0, tmp_path)
    config = ViewsBench(device="cpu", smoke=True, root=str(tmp_path / "images"), policy="cifar")
    result = views.bench_views(config)
    assert "16 images" in result["works"][0]["name"] and "cifar" in result["works"][0]["name"]


def test_gathered_views_are_those_of_the_copied_images() -> None:
    config = ViewsBench(size=16, side=24, images=8, dataset=32)
    assert torch.equal(views.one_gather(config, 8, "cpu")(), views.copied(config, 8, "cpu")())  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1, 2])
def test_exact_loss_is_algorithm_1(scale: int) -> None:
    x = scale * loss.projections(6, 5, 0).double()
    z = x / x.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(6):
        similar = [math.exp(float(z[i] @ z[k]) / 0.3) for k in range(6)]
        total -= math.log(similar[(i + 3) % 6] / (sum(similar) - similar[i])) / 6
    value, gradient = loss.exact(x, 0.3)
    assert float(value) == pytest.approx(total, rel=1e-12)
    step = 1e-6 * torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ahead, behind = (loss.exact(x + sign * step, 0.3)[0] for sign in (1, -1))
    assert float(ahead - behind) / 2 == pytest.approx(float((gradient * step).sum()), rel=1e-5)


def with_diagonal(x: Tensor, temperature: float) -> Tensor:
    """A common mistake: the row itself stays among the negatives."""
    z = torch.nn.functional.normalize(x, dim=1)
    m = len(x)
    return torch.nn.functional.cross_entropy(z @ z.T / temperature, torch.arange(m).roll(m // 2))


def test_a_wrong_loss_gets_no_ratio(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    wrong = loss.LossForm(family="plain torch", build=lambda: with_diagonal, bound=loss.FULL)
    raising = loss.LossForm(family="lightly", build=lambda: 1 / 0, bound=loss.FULL)  # type: ignore[arg-type, return-value]
    forms = {"ours": loss.FORMS["ours"], "wrong": wrong, "raising": raising, "right": loss.FORMS["plain torch float32"]}
    monkeypatch.setattr(loss, "FORMS", forms)
    monkeypatch.setattr(loss, "find_spec", lambda name: object())
    result = loss.bench_loss(LossBench(device="cpu", smoke=True))
    assert [r["baseline"] for r in result["ratios"]] == ["right"]
    printed = table_of_calls(result)
    assert "wrong: FAILED, no ratio is given: loss" in printed
    assert "raising: failed: division by zero" in printed


def test_a_wrong_step_and_wrong_views_get_no_ratio(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    def twice(t: lars.Tensors, variant: lars.Formula, lr: float) -> Callable[[], object]:
        step = lars.plain(t, variant, lr)
        return lambda: (step(), step())

    monkeypatch.setitem(
        lars.FORMS, "plain torch, tensor after tensor", lars.LarsForm(family="plain torch", build=twice)
    )
    stepped = lars.bench_lars(LarsBench(device="cpu", smoke=True, variant="lightly"))
    assert {r["baseline"] for r in stepped["ratios"]} == ({"lightly"} if LIGHTLY else set())
    black = views.ViewsForm(
        family="torchvision", build=lambda config, count, device: lambda: torch.zeros(2 * count, 3, 16, 16)
    )
    monkeypatch.setitem(views.FORMS, "torchvision on tensors", black)
    monkeypatch.setattr(views, "view_errors", lambda images, size: [])
    seen = views.bench_views(ViewsBench(device="cpu", smoke=True))
    assert "torchvision on tensors" not in {r["baseline"] for r in seen["ratios"]}


def candidate(name: str, family: str, **changes: Any) -> Candidate:
    make = partial(partial, str, name)
    settings: dict[str, Any] = {"name": name, "family": family, "make": make, "make_small": make, "items": 4}
    return Candidate(**settings | changes)


def work(*candidates: Candidate) -> OpCase:
    return OpCase(name="w", unit="images", items=8, bound=lambda _: (0.5, "some"), candidates=candidates)


def laps_of(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, list[float]]) -> list[tuple[str, int]]:
    """Calls take the seconds given for each of their turns; returns the order of turns with their counts."""
    order: list[tuple[str, int]] = []
    left = {name: iter(values) for name, values in seconds.items()}

    def turn(call: Callable[[], str], timed: str, count: int, device: torch.device) -> list[float]:
        assert timed == "clock"
        order.append((call(), count))
        return [next(left[call()])] * count

    monkeypatch.setattr(calls, "_turn", turn)
    return order


def test_turns_ratios_and_the_best_setting(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    seconds = {"a": [9.0, 0.1, 0.2], "b": [0.01, 0.4, 0.4], "c": [0.02, 0.3, 0.3], "d": [0.02, 0.01, 0.01]}
    order = laps_of(monkeypatch, seconds)
    entries = (
        candidate("a", "ours"),
        candidate("b", "x"),
        candidate("c", "x", items=2),
        candidate("d", "y", rival=False),
    )
    rows = measure_case(work(*entries), 2, 100.0, CPU)
    # The warm-up tells how often a call fits into a round.
    assert order == [(name, 1) for name in "abcd"] + 2 * [("a", 1), ("b", 10), ("c", 5), ("d", 5)]
    a, b, c, d = rows
    assert a["ms"] == {"median": pytest.approx(300), "min": pytest.approx(200), "max": pytest.approx(400)}
    assert c["ms"]["median"] == pytest.approx(1200)  # its calls do a quarter of the work: 8 images take 4 of them
    assert [row["best_setting"] for row in (a, b, c, d)] == [False, True, False, False]
    found = {r["baseline"]: r for r in ratios_of(rows)}
    assert found.keys() == {"b", "c"}
    assert (found["b"]["min"], found["b"]["median"], found["b"]["max"]) == pytest.approx((2, 3, 4))
    assert found["c"]["median"] == pytest.approx(4.5) and found["c"]["memory"] == 1


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    def broken() -> Any:
        raise ValueError("no such option\nsecond line")

    huge, absent = candidate("huge", "x", needs=2**60), candidate("absent", "x", absent="makes two views only")
    entries = candidate("a", "ours"), huge, absent, candidate("broken", "x", make=broken), candidate("b", "x")
    rows = measure_case(work(*entries), 1, 1e-6, CPU)
    reasons = {row["name"]: row["reason"] for row in rows if not row["rounds"]}
    assert reasons["absent"] == "makes two views only" and reasons["broken"] == "failed: no such option"
    assert reasons["huge"].startswith("needs about 1073741824.0 GiB, ") and len(reasons) == 3
    assert [r["baseline"] for r in ratios_of(rows)] == ["b"]
    with pytest.raises(ValueError, match="no such option"):
        measure_case(work(candidate("ours", "ours", make=broken)), 1, 1e-6, CPU)

    def out_of_memory(make_small: Any, make: Any) -> int:
        raise MemoryError("the process ran out of memory")

    monkeypatch.setattr(calls, "peak_in_child", out_of_memory)
    (row,) = measure_case(work(candidate("b", "x")), 1, 1e-6, CPU)
    assert row["reason"] == "the process ran out of memory"


def ones(count: int) -> Callable[[], Callable[[], object]]:
    """A picklable () -> call that makes that many float32."""
    return partial(partial, torch.ones, count)


@pytest.mark.slow
@pytest.mark.xdist_group("peak memory")  # the server of the fresh processes starts once
def test_peak_memory_of_a_call() -> None:
    peak = memory.peak_in_child(ones(16), ones(16 * MIB))
    assert 64 * MIB <= peak < 70 * MIB
    # What the small call and the inputs took is not in it.
    assert memory.peak_in_child(ones(16 * MIB), ones(16)) < 8 * MIB
    assert memory.peak_in_child(ones(16), add_to_ones) < 8 * MIB


def add_to_ones() -> Callable[[], object]:
    """A call that works in place on 64 MiB which are there already."""
    return partial(torch.ones(16 * MIB).add_, 1)


@pytest.mark.slow
@pytest.mark.xdist_group("peak memory")
def test_peak_memory_where_there_is_too_little() -> None:
    with pytest.raises(MemoryError):
        memory.peak_in_child(ones(16), ones(2**56))
    with pytest.raises(MemoryError):  # as the system ends a process that took too much
        memory.peak_in_child(ones(16), partial(partial, signal.raise_signal, signal.SIGKILL))
    with pytest.raises(RuntimeError, match="negative dimension"):
        memory.peak_in_child(ones(16), ones(-1))
    free = memory.free_memory()
    assert free is None or MIB < free < 2**50


def test_ceilings_and_the_roofline_of_the_loss() -> None:
    found = measure_ceilings(CPU)
    assert found.exps is not None and not found.overlap
    # Nothing that runs this is slower or faster than that.
    assert 1e8 < found.copy_bytes < 1e13 and 1e8 < found.matmul_flops < 1e15 and 1e6 < found.exps < 1e13
    gpu, cpu = (Ceilings(**RATES, exps=4e5, overlap=overlap) for overlap in (True, False))
    # M 100, D 10: forward .2 s of products, backward .4 s, exponentials .025 s a pass.
    assert gpu.loss_s(100, 10)[0] == pytest.approx(0.6)
    assert cpu.loss_s(100, 10)[0] == pytest.approx(0.1 + 0.3 + 0.025)
    slow = Ceilings(**RATES, exps=4e4, overlap=True)
    assert slow.loss_s(100, 10)[0] == pytest.approx(0.25 + 0.4)
    better = gpu.best(Ceilings(copy_bytes=5.0, matmul_flops=1e9, matmul="product", exps=9e9, overlap=True))
    assert (better.copy_bytes, better.matmul_flops, better.exps) == (1e9, 1e9, 9e9)
    assert gpu.bytes_s(3e9) == pytest.approx(3.0)


def test_the_kernel_of_exponentials() -> None:
    from fastsimclr.bench.exp_rate import BLOCK, TIMES, exponentials

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.rand(2 * BLOCK, generator=torch.Generator().manual_seed(0)).to(device)
    y = torch.full_like(x, math.nan)
    assert exponentials(x, y) == 2 * BLOCK * TIMES
    for _ in range(TIMES):
        x = torch.exp2(-x)
    torch.testing.assert_close(y, x, rtol=1e-5, atol=0)  # approximate exponentials of a contraction: errors die out


def test_compare_reports_of_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    runtime = choose_runtime("cpu", "fp32", False)
    for path, each, absent in zip(paths, (0.4, 0.2), (None, "no"), strict=True):
        laps_of(monkeypatch, {"a": [each] * 2, "b": [1.0] * 2})
        jobs = [work(candidate("a", "ours"), candidate("b", "x", absent=absent))]
        config = {"seed": 0, "rounds": 1}
        result = calls.report_of_calls("loss", config, runtime, jobs, round_ms=1.0, checks={}, notes=[])
        assert result["rows"][0]["roofline_pct"] == pytest.approx(50 / 2 / each)
        write(path, result)
    lines = compare(*paths).splitlines()
    assert lines[2].split() == ["a", "10.0", "20.0", "2.000"]
    assert "only in one: b" in lines


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (LossBench, {"rows": (64, 7)}, "rows=7 is not an even number"),
        (LossBench, {"temperature": 0.0}, r"temperature=0.0 must be above 0"),
        (LossBench, {"dim": 0}, "dim=0 must be 1 or more"),
        (LarsBench, {"round_ms": 0.0}, "round_ms=0.0 must be above 0"),
        (ViewsBench, {"threads": 0}, "threads=0 must be 1 or more"),
        (ViewsBench, {"root": "x", "dataset": 5}, "exclude each other"),
    ],
)
def test_settings_are_checked(config: Callable[..., object], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_gpu_check_takes_what_the_kernel_tests_import() -> None:
    kernels = gpu_check._of_kernels()
    assert kernels and len(gpu_check._marked()) >= 2
    known = {
        *sys.stdlib_module_names,
        *gpu_check.NEEDED,
        *gpu_check.TESTS_NEED,
        "torch",
        "triton",
        "fastsimclr",
        "tests",
    }
    for path in (*kernels, *gpu_check._marked()):
        for node in ast.walk(ast.parse(Path(path).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= known, path


def test_gpu_check_runs_the_jobs_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    smoke = loss.bench_loss(LossBench(device="cpu", smoke=True))
    asked: list[LossBench] = []

    def bench(config: LossBench) -> dict[str, Any]:
        asked.append(config)
        return smoke

    monkeypatch.setattr(loss, "bench_loss", bench)
    rehearse = ["--device", "cpu", "--part", "speed", "--out", str(tmp_path)]
    assert gpu_check.main([*rehearse, "--only", "loss"]) == 0
    assert [(config.all_rows, config.smoke) for config in asked] == [((8192, 16384, 65536), True)]
    assert {path.name for path in tmp_path.iterdir()} == {"rehearsal-loss.json", "rehearsal-speed.json"}
    entries = json.loads((tmp_path / "rehearsal-speed.json").read_text())["entries"]
    assert entries.keys() == {"loss"} and entries["loss"]["status"] == "ok"
    monkeypatch.setattr(loss, "bench_loss", lambda config: 1 / 0)
    assert gpu_check.main([*rehearse, "--only", "loss"]) == 1
    entries = json.loads((tmp_path / "rehearsal-speed.json").read_text())["entries"]
    assert entries["loss"]["error"] == "ZeroDivisionError: division by zero"


@pytest.mark.gpu
def test_on_a_gpu_ours_is_timed_by_graph_replay() -> None:
    peak = memory.peak_on_gpu(lambda: torch.ones(4 * MIB, device="cuda"), torch.device("cuda"))
    assert peak == 16 * MIB
    found = [
        loss.bench_loss(LossBench(device="cuda", smoke=True, rows=256)),
        lars.bench_lars(LarsBench(device="cuda", smoke=True)),
        norm.bench_norm(NormBench(device="cuda", smoke=True)),
        views.bench_views(ViewsBench(device="cuda", smoke=True, dataset=32)),
    ]
    for result in found:
        for row in result["rows"]:
            assert row["rounds"], row
            assert row["fault"] is None, row
        timed = {row["name"]: row["timed_by"] for row in result["rows"]}
        assert timed["ours"] == calls.HOW["graph"]
        assert timed["ours, launched one by one"] == calls.HOW["events"]
