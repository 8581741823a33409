"""`make gpu-check`: the tests marked gpu and of the fused kernels, then the benches at GPU size, on what is there."""

from __future__ import annotations

import argparse
import gc
import logging
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
# What fastsimclr and its tests import beyond torch; module and the package that has it.
NEEDED = {
    "torchvision": "torchvision",
    "numpy": "numpy",
    "PIL": "pillow",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "simplejpeg": "simplejpeg",
    "tqdm": "tqdm",
    "yaml": "pyyaml",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
    "lightly": "lightly",
}

JOBS = (
    "tests", "loss", "views-224", "views-cifar", "lars", "norm", "step-r18", "step-r18-1024", "step-r50",
    "step-r50-finetune", "step-r50-distill", "loader", "e2e-r18", "e2e-r50",
)  # fmt: skip
KERNEL_TESTS = (
    "test_*_fused.py", "test_batch_norm.py", "test_nt_xent_extras.py", "test_gather_views.py", "test_views_extras.py",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when tests pass and all reports are written, 1 where not, 2 where something needed is missing."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="Folder for the reports.")
    parser.add_argument("--only", nargs="+", choices=JOBS, default=JOBS, help="Parts to run; all where not given.")
    parser.add_argument("--images", help="Folder of JPEG files for loader and e2e-r50; made where not given.")
    options = parser.parse_args(arguments)
    out: Path = options.out
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
    for selected in (["-m", "gpu", *_marked()], _of_kernels()) if "tests" in options.only else ():
        if subprocess.run([sys.executable, "-m", "pytest", "-q", *selected], cwd=ROOT).returncode:
            print("gpu-check: the GPU tests failed; no speed is measured on red tests", file=sys.stderr)
            return 1
    failed = _benches(out, options.only, options.images)
    print(f"gpu-check: done in {time.perf_counter() - start:.0f} s, reports in {out}")
    if failed:
        print(f"gpu-check: failed: {', '.join(failed)}; the errors are above", file=sys.stderr)
    return 1 if failed else 0


def _marked() -> list[str]:
    """The files that hold tests marked gpu, alone: others import what a GPU machine may lack."""
    return [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]


def _of_kernels() -> list[str]:
    """The tests of the fused kernels: interpreted elsewhere, they run for real where there is a GPU."""
    found = {path for pattern in KERNEL_TESTS for path in (ROOT / "tests" / "kernels").glob(pattern)}
    return [str(path) for path in sorted(found)]


def _benches(out: Path, only: Sequence[str], images: str | None) -> list[str]:
    """Run and report the benches; the names of those that failed, which cost the others nothing."""
    # Here, not above: without simplejpeg these imports fail before the message that says so.
    from fastsimclr.bench.calls_table import table_of_calls
    from fastsimclr.bench.configs import LarsBench, LoaderBench, LossBench, NormBench, ViewsBench
    from fastsimclr.bench.e2e import bench_e2e
    from fastsimclr.bench.lars import bench_lars
    from fastsimclr.bench.loader import bench_loader
    from fastsimclr.bench.loss import bench_loss
    from fastsimclr.bench.norm import bench_norm
    from fastsimclr.bench.record import Report, write
    from fastsimclr.bench.step import bench_step
    from fastsimclr.bench.table import table
    from fastsimclr.bench.training_configs import E2eBench, StepBench
    from fastsimclr.bench.views import bench_views
    from fastsimclr.loaders.data import LoaderName

    loaders: tuple[LoaderName, ...] = ("resident", "native")
    if find_spec("nvidia") and find_spec("nvidia.dali"):
        loaders += ("dali_gpu",)
    step = partial(StepBench, device="cuda", modes=("eager", "compile", "graph"))
    r50 = partial(step, arch="resnet50", size=224, steps=12)
    cifar = {"policy": "cifar", "size": 32, "side": 32, "images": 8192, "dataset": 50_000}
    jobs: dict[str, Callable[[], Report]] = {
        "loss": lambda: bench_loss(LossBench(device="cuda", rows=(8192, 16384, 65536))),
        "views-224": lambda: bench_views(ViewsBench(device="cuda", images=512)),
        "views-cifar": lambda: bench_views(ViewsBench(device="cuda", **cifar)),  # type: ignore[arg-type]
        "lars": lambda: bench_lars(LarsBench(device="cuda")),
        "norm": lambda: bench_norm(NormBench(device="cuda")),
        "step-r18": lambda: bench_step(step(batch=512, steps=30)),
        "step-r18-1024": lambda: bench_step(step(batch=1024, steps=16)),
        # The encoder sees 256 views a step in all three, so that what torch.compile made for one serves the others.
        "step-r50": lambda: bench_step(r50(batch=128)),
        "step-r50-finetune": lambda: bench_step(r50(batch=256, stage="finetune")),
        "step-r50-distill": lambda: bench_step(r50(batch=256, stage="distill", teacher="resnet50")),
        "loader": lambda: bench_loader(
            LoaderBench(device="cuda", root=images, rounds=3, sets=("packed", "raw"), whole=False)
        ),
        "e2e-r18": lambda: bench_e2e(E2eBench(device="cuda", batch=512, steps=20, images=10240, workers=(4, 16))),
        "e2e-r50": lambda: bench_e2e(
            E2eBench(
                device="cuda",
                arch="resnet50",
                size=224,
                root=images,
                side=256,
                batch=256,
                images=384,
                steps=12,
                loaders=loaders,
                workers=(16,),
            )
        ),
    }
    assert ("tests", *jobs) == JOBS
    failed = []
    for name in (name for name in jobs if name in only):
        start = time.perf_counter()
        try:
            result = jobs[name]()
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        finally:
            gc.collect()  # networks and graphs of one bench, before the next takes the memory
            torch.cuda.empty_cache()
            torch.compiler.reset()  # or batches of another size would be compiled for any size
        write(out / f"{name}.json", result)
        print(f"\n{table_of_calls(result) if 'works' in result else table(result)}")
        print(f"gpu-check: {name} took {time.perf_counter() - start:.0f} s\n", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
