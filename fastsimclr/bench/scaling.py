"""The scaling bench: the training step of several ranks of this machine, started by torchrun, beside that of one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import fastsimclr
from fastsimclr.bench.flops import HOW
from fastsimclr.bench.record import Report, frame, logger, seconds_an_image, spread
from fastsimclr.bench.scaling_rank import ALL, ERROR
from fastsimclr.bench.step import check_mode
from fastsimclr.bench.training_configs import ScalingBench
from fastsimclr.loaders import thread_count
from fastsimclr.runtime.device import choose_runtime

NOTES = (
    "images/s: of all ranks, over the seconds of the slowest; step times and phases are those of the slowest, too",
    "efficiency: images/s of W ranks over W times those of 1; its range takes the farthest rounds of both",
    "a difference of two rows that is below 0 is noise, as is any of its size",
)
_CPU = (
    "ranks on a CPU share the cores of one machine and its memory: this shows that they work, not how a cluster scales"
)


def bench_scaling(config: ScalingBench) -> Report:
    """Measure each number of ranks in processes of its own. ValueError for more ranks than CUDA devices.

    RuntimeError where torchrun fails, with the end of what it said.
    """
    config = config.at_smoke_size()
    runtime = choose_runtime(config.device, config.precision, True)
    check_mode(config.mode, runtime, "mode")
    cuda = runtime.device.type == "cuda"
    if cuda and max(config.ranks) > torch.cuda.device_count():
        raise ValueError(
            f"ranks={list(config.ranks)}: this machine has {torch.cuda.device_count()} CUDA devices, each rank takes"
            " one; give fewer ranks"
        )
    cores = thread_count(0)
    threads = config.threads or max(1, cores // max(config.ranks))
    config = replace(config, threads=threads, device=runtime.device.type)
    worlds = {world: _measured(config, world) for world in config.ranks}
    rows = [row for world in config.ranks for row in worlds[world]["rows"]]
    checks: dict[str, Any] = {"ranks": list(config.ranks), "backend": "nccl" if cuda else "gloo"}
    if not cuda:
        checks["threads a rank, of cores"] = [threads, cores]
    finite = all(math.isfinite(row["loss"]) for row in rows)
    checks["losses"] = "all finite" if finite else "FAILED, not finite: do not believe these rates"
    notes = [*NOTES, HOW, *([] if cuda else [_CPU])]
    found = frame("scaling", asdict(config), runtime, rows, [], checks=checks, notes=notes)
    reference = {str(world): worlds[world]["reference"] for world in config.ranks}
    return found | {"derived": _derived(worlds), "reference": reference}


def _measured(config: ScalingBench, world: int) -> dict[str, Any]:
    """What fastsimclr.bench.scaling_rank writes, run by `world` ranks."""
    logger.info("ranks=%d", world)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    root = str(Path(fastsimclr.__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": str(config.threads), "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, *launcher, "-m", "fastsimclr.bench.scaling_rank", str(out)]
        process = subprocess.Popen(
            [*command, json.dumps(asdict(config))],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            said = process.communicate()[1]
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its ranks
                process.wait()
        if process.returncode:
            errors = [line.removeprefix(ERROR) for line in said.splitlines() if line.startswith(ERROR)]
            raise RuntimeError(f"ranks={world} failed: {' '.join(errors or said.splitlines()[-20:])}")
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def _derived(worlds: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Efficiencies, and what the exchanges add to a step of each number of ranks, in ms."""
    found = []
    for world, measured in sorted(worlds.items()):
        of = {row["facts"]["exchanges"]: row for row in measured["rows"]}
        if world > 1 and 1 in worlds:
            (alone,) = worlds[1]["rows"]
            many, one = of[ALL]["images_per_s"], alone["images_per_s"]
            efficiency = {
                "median": many["median"] / (world * one["median"]),
                "min": many["min"] / (world * one["max"]),
                "max": many["max"] / (world * one["min"]),
            }
            found.append({"name": f"{world} ranks: efficiency", **efficiency})
        if world > 1:
            whole, unaveraged, none = of.values()
            gradients, rest = _more(whole, unaveraged), _more(unaveraged, none)
            found.append({"name": f"{world} ranks: ms a step to average gradients, where not hidden", **gradients})
            found.append({"name": f"{world} ranks: ms a step for what BN and the loss exchange", **rest})
    return found


def _more(slow: dict[str, Any], fast: dict[str, Any]) -> dict[str, float]:
    """ms a step that one takes longer than the other, round by round."""
    images = slow["warmup"]["images"] / len(slow["warmup"]["step_s"])
    pairs: Sequence[tuple[float, float]] = list(zip(seconds_an_image(slow), seconds_an_image(fast), strict=True))
    return spread([1e3 * images * (a - b) for a, b in pairs])
