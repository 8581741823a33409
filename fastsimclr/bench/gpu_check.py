"""`make gpu-check`: kernels against references, speed against rooflines, and a training; three calls of 8 minutes."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from fastsimclr.bench.gpu.record import Entry, Job, Sheet, Size

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("kernels", "speed", "training")
BUDGET_S = 450.0
"""Seconds of one part: with the start of Python a call takes less than 8 minutes."""
# What fastsimclr imports beyond torch for parts 2 and 3, and its views in part 1; module and the package that has it.
NEEDED = {
    "torchvision": "torchvision",
    "numpy": "numpy",
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "sklearn": "scikit-learn",
    "simplejpeg": "simplejpeg",
    "tqdm": "tqdm",
    "yaml": "pyyaml",
}
TESTS_NEED = {"pytest": "pytest", "hypothesis": "hypothesis", "lightly": "lightly", "scipy": "scipy"}
KERNEL_TESTS = (
    "test_*_fused.py", "test_batch_norm.py", "test_nt_xent_extras.py", "test_gather_views.py", "test_views_extras.py",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when all went well, 1 when a check or a bench failed, 2 when a device or a package is missing."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--part", choices=("all", *PARTS), default="all", help="One part, or all in a row.")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="Folder for the reports.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal at tiny sizes.")
    parser.add_argument("--images", help="Images for loader, e2e-r50 and training: a folder, or of .beton files.")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="Seconds for each part.")
    parser.add_argument("--only", nargs="+", help="Names of the jobs to run, as in the JSON file; by default all.")
    parser.add_argument("--keep", action="store_true", help="Keep the entries that the JSON file has.")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".whl", help="Wheels to use when a package is missing.")
    options = parser.parse_args(arguments)
    begin, tiny = time.monotonic(), options.device == "cpu"
    if not tiny and not torch.cuda.is_available():
        print(
            f"gpu-check: torch {torch.__version__} sees no CUDA device; run it on a GPU machine, or rehearse it with"
            " --device cpu",
            file=sys.stderr,
        )
        return 2
    if options.part == "all":
        command = [sys.executable, "-m", "fastsimclr.bench.gpu_check", *arguments, "--part"]
        return max(subprocess.run([*command, part]).returncode for part in PARTS)
    missing = _missing(NEEDED | TESTS_NEED)
    if missing and options.wheels.is_dir():
        _unpack(options.wheels)
        missing = _missing(NEEDED | TESTS_NEED)
    if options.part != "kernels" and (absent := [name for name in missing if name in NEEDED.values()]):
        print(
            f"gpu-check: missing {', '.join(absent)}; put wheels into {options.wheels}; see docs/benchmarks.md",
            file=sys.stderr,
        )
        return 2
    if tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO)
    return _part(options, missing, tiny, begin)


def _part(options: argparse.Namespace, missing: list[str], tiny: bool, begin: float) -> int:
    """Run one part; see main."""
    from fastsimclr.runtime.device import Runtime
    from fastsimclr.runtime.environment import environment

    device, out, part = torch.device(options.device), options.out, options.part
    head: Entry = {"part": part, "kind": device.type, "budget_s": options.budget}
    if tiny:
        head["rehearsal"] = "on a CPU, at tiny sizes: no figure here is one of a GPU"
    head |= {"missing": missing, "environment": environment(Runtime(device=device, precision="fp32"))}
    path = out / f"{'rehearsal-' * tiny}{part}.json"
    left_s = options.budget - (time.monotonic() - begin)
    sheet = Sheet(path, head, left_s, keep=options.keep or part == "training")
    watchdog = threading.Timer(left_s, _cut_off, (sheet,))
    watchdog.daemon = True
    watchdog.start()
    try:
        jobs = _jobs(sheet, options, missing, device, tiny)
        rest = sheet.run([job for job in jobs if options.only is None or job.name in options.only])
    finally:
        watchdog.cancel()
    if rest and sheet.left_s > 30:  # the device needs a new process
        command = [sys.executable, "-m", "fastsimclr.bench.gpu_check", "--part", part, "--out", str(out), "--keep"]
        command += ["--device", options.device, "--budget", f"{sheet.left_s:.0f}", "--wheels", str(options.wheels)]
        command += (["--images", options.images] if options.images else []) + ["--only", *rest]
        return subprocess.run(command).returncode
    print(f"gpu-check: {part} done in {time.monotonic() - begin:.0f} s, record in {path}", flush=True)
    if sheet.failed:
        print(f"gpu-check: failed: {', '.join(sheet.failed)}; the errors are in {path}", file=sys.stderr)
    return 1 if sheet.failed else 0


def _jobs(sheet: Sheet, options: argparse.Namespace, missing: list[str], device: torch.device, tiny: bool) -> list[Job]:
    """The jobs of a part. Its module is imported here, after the environment of triton is set."""
    if options.part == "speed":
        from fastsimclr.bench.gpu.speed import jobs as speed

        return speed(device, tiny, options.out, options.images)
    if options.part == "training":
        from fastsimclr.bench.gpu.training import jobs as training

        return training(sheet, device, tiny, options.out, options.images)
    from fastsimclr.bench.gpu.kernels import jobs as kernels

    why = f"missing {', '.join(missing)}" if missing else "a rehearsal: `make test` runs them" if tiny else None
    tests = {"tests of the kernels": _of_kernels(), "tests marked gpu": ["-m", "gpu", *_marked()]}
    found = kernels(device, tiny)
    for name, selected in tests.items():
        if why is not None:
            sheet.put(name, status="dropped", passed_over={"all": why})
            continue
        run = partial(_pytest, selected, sheet, options.out / f"{name.replace(' ', '-')}.log")
        found.append(Job(name=name, sizes=[Size(name="all", expected_s=60.0, run=run)]))
    return found


def _pytest(selected: list[str], sheet: Sheet, log: Path) -> Entry:
    """Run pytest until the time is used up. Tests that did not run then are no failure, and the entry says so."""
    parallel = ["-n", "8"] if find_spec("xdist") else []
    with log.open("w") as file:
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", *parallel, *selected]
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=sheet.left_s - 10, stdout=file, stderr=file).returncode
        except subprocess.TimeoutExpired:
            code = None
    text = log.read_text()
    bad = sorted(
        {"".join(pair) for pair in re.findall(r"(?:FAILED|ERROR) +(tests/\S+)|(tests/\S+) (?:FAILED|ERROR)", text)}
    )
    return {"ok": not bad and code in (0, None), "cut off by the budget": code is None, "log": log.name, "bad": bad}


def _marked() -> list[str]:
    """The files that hold tests marked gpu, alone: others import what a GPU machine may lack."""
    return [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]


def _of_kernels() -> list[str]:
    """The tests of the fused kernels: interpreted elsewhere, they run for real where there is a GPU."""
    found = {path for pattern in KERNEL_TESTS for path in (ROOT / "tests" / "kernels").glob(pattern)}
    return [str(path) for path in sorted(found)]


def _missing(packages: dict[str, str]) -> list[str]:
    return [package for module, package in packages.items() if find_spec(module) is None]


def _unpack(wheels: Path) -> None:
    """Make the packages of a folder of wheels importable, after those that are installed."""
    site = tempfile.mkdtemp(prefix="gpu-check-")
    atexit.register(shutil.rmtree, site, ignore_errors=True)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    sys.path.append(site)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), site)))


def _cut_off(sheet: Sheet) -> None:
    """End the process when the budget is used up, with what the record has."""
    for name, entry in sheet.entries.items():
        if entry["status"] == "running":
            entry |= {"status": "error", "error": "it was cut off at the end of the budget"}
            print(f"gpu-check: {name}: cut off at the end of the budget", flush=True)
    sheet.write()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
