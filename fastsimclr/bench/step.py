"""The step bench: views, forward, loss, backward and optimizer on resident synthetic images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastsimclr.bench import loop, watched
from fastsimclr.bench.flops import HOW, measure_training
from fastsimclr.bench.record import Contestant, Report, report, seconds_an_image, spread
from fastsimclr.bench.trace import trace
from fastsimclr.bench.training_configs import Mode, StepBench
from fastsimclr.loaders import DataConfig, choose_placement, open_data
from fastsimclr.runtime.device import Precision, Runtime, choose_runtime
from fastsimclr.training.feed import Shipment

NOTES = ("the baseline's views are ready-made on the device and cost it nothing; ours are made in the step",)
SMALL, LARGE = 2048, 512  # images held: of up to 32 px, and larger
_STUDENT, _TEACHER = "student step", "teacher forward"


def bench_step(config: StepBench) -> Report:
    """Measure and return the report. ValueError for a CUDA graph on a CPU."""
    config = config.at_smoke_size()
    plain, best = (choose_runtime(config.device, p, c) for p, c in ((_FULL, False), (_BEST, True)))
    for mode in config.modes:
        check_mode(mode, plain, "modes")
    data = synthetic(config, config.batch)
    source = open_data(data).unlabelled
    resident = choose_placement(source, data, plain.device).fill()
    batches = watched.loading(source, resident, plain, config, data)
    shipments = watched.shipped(batches, plain, config, 2 if config.stage == "pretrain" else 1)
    full = choose_runtime(config.device, _FULL, True)
    entries = [watched.trained("ours fp32", full, config, batches)] if "eager" in config.modes else []
    entries += [watched.trained(named(_BEST, mode), best, config, batches, mode=mode) for mode in config.modes]
    entries += _theirs(config, shipments, plain, best)
    if config.stage == "distill" and "eager" in config.modes:
        student = replace(config, stage="finetune")
        entries += [
            watched.trained(f"ours {_BEST}, {_STUDENT}", best, student, batches, rival=False),
            watched.teacher_forward(f"ours {_BEST}, {_TEACHER}", best, config, shipments),
        ]
    checks = loop.same_work(config)
    rows, reference = measure_training(entries, config.rounds, plain.device)
    notes = [*NOTES, HOW, *loop.notes(config.stage)]
    if config.profile is not None:
        notes.append(trace(entries[0], Path(config.profile), plain.device))
    found = report("step", asdict(config), plain, rows, checks=checks, notes=notes)
    return found | {"derived": _parts_of_distillation(rows), "reference": reference}


_FULL: Precision = "fp32"
_BEST: Precision = "bf16"


def check_mode(mode: Mode, runtime: Runtime, key: str) -> None:
    """ValueError where `mode`, of the option `key`, cannot run on the device."""
    if mode == "graph" and runtime.device.type != "cuda":
        raise ValueError(f"{key}=graph needs a CUDA device, not {runtime.device}; leave graph out")


def named(precision: str, mode: Mode, *words: str) -> str:
    """The name of one of our rows; eager goes without saying."""
    return " ".join(["ours", precision, *words, *([mode] if mode != "eager" else [])])


def synthetic(config: Any, global_batch: int) -> DataConfig:
    """Labelled noise for the training of `config`, held on the device: enough for batches that differ."""
    small = config.size <= 32
    return DataConfig(
        source="synthetic",
        synthetic_images=max(global_batch * watched.READY, SMALL if small else LARGE),
        synthetic_size=config.size if small else config.size * 8 // 7,
        synthetic_classes=config.classes,
        loader="resident",
    )


def _theirs(config: StepBench, shipments: list[Shipment], plain: Runtime, best: Runtime) -> list[Contestant]:
    ready: list[loop.Tensors] = []
    for shipment in shipments:
        views = shipment.render(torch.float32).contiguous()
        ready.append(views.chunk(2) if config.stage == "pretrain" else (views, shipment.labels))

    def batches() -> Iterator[loop.Tensors]:
        return itertools.islice(itertools.cycle(ready), config.steps)

    settings = [
        ("fp32 contiguous (default)", plain, False),
        ("bf16 channels-last (best)", best, False),
        ("bf16 channels-last, compiled (best)", best, True),
    ]
    title, details = loop.title(config.stage), {"views": "ready-made"}
    return [
        loop.trained(f"{title} {words}", runtime, config, batches, compiled=compiled, details=details)
        for words, runtime, compiled in settings
        if config.compiled_baseline or not compiled
    ]


def _parts_of_distillation(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The time of a distillation over that of its student's step and its teacher's forward pass, in the same rounds."""
    of = {row["name"].removeprefix(f"ours {_BEST}").removeprefix(", "): seconds_an_image(row) for row in rows}
    if _TEACHER not in of:
        return []
    times = zip(of[""], of[_STUDENT], of[_TEACHER], strict=True)
    values = [whole / (student + teacher) for whole, student, teacher in times]
    return [{"name": f"time of a distillation / ({_STUDENT} + {_TEACHER})", **spread(values)}]
