"""`make gpu-check`: the tests marked gpu, then the benches at GPU size, with the Python and torch that are there."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
# What fastsimclr and its tests import beyond torch; module and the package that has it.
NEEDED = {
    "torchvision": "torchvision",
    "numpy": "numpy",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "simplejpeg": "simplejpeg",
    "tqdm": "tqdm",
    "yaml": "pyyaml",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when tests pass and all reports are written, 2 where something needed is missing."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="Folder for the reports.")
    out: Path = parser.parse_args(arguments).out
    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no CUDA device; run it on a GPU machine", file=sys.stderr)
        return 2
    if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
        print(
            f"gpu-check: missing {', '.join(missing)}; carry them unpacked and name their folder in PYTHONPATH,"
            " as docs/benchmarks.md says",
            file=sys.stderr,
        )
        return 2
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO)
    start = time.perf_counter()
    # Only the files that hold such tests: others import what a GPU machine may lack.
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", *marked], cwd=ROOT)
    if tests.returncode:
        print("gpu-check: the GPU tests failed; no speed is measured on red tests", file=sys.stderr)
        return 1
    _benches(out)
    print(f"gpu-check: done in {time.perf_counter() - start:.0f} s, reports in {out}")
    return 0


def _benches(out: Path) -> None:
    # Here, not above: without simplejpeg these imports fail before the message that says so.
    from fastsimclr.bench.configs import E2eBench, LoaderBench, StepBench
    from fastsimclr.bench.e2e import bench_e2e
    from fastsimclr.bench.loader import bench_loader
    from fastsimclr.bench.record import Report, table, write
    from fastsimclr.bench.step import bench_step

    jobs: dict[str, Callable[[], Report]] = {
        "step-r18": lambda: bench_step(StepBench(device="cuda", batch=512, steps=30)),
        "step-r50": lambda: bench_step(StepBench(device="cuda", arch="resnet50", size=224, batch=128, steps=12)),
        "loader": lambda: bench_loader(LoaderBench(device="cuda")),
        "e2e-r18": lambda: bench_e2e(E2eBench(device="cuda", batch=512, steps=20, images=10240, workers=(4, 16))),
    }
    for name, job in jobs.items():
        result = job()
        write(out / f"{name}.json", result)
        print(f"\n{table(result)}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
