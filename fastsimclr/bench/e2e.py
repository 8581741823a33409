"""The end-to-end bench: from image files to the optimizer step, ours beside the usual way, and its two parts alone."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastsimclr.bench import baseline, loop, watched
from fastsimclr.bench.files import Files, LabelledFiles, data_loader, open_files
from fastsimclr.bench.flops import HOW, measure_training
from fastsimclr.bench.ours import Batches, policy_of
from fastsimclr.bench.record import Contestant, Report, logger, report, seconds_an_image, spread
from fastsimclr.bench.step import check_mode, named
from fastsimclr.bench.trace import trace
from fastsimclr.bench.training_configs import E2eBench
from fastsimclr.loaders import DataConfig, Relabelled, Resident, Source, choose_placement
from fastsimclr.loaders.data import LoaderName
from fastsimclr.runtime.device import Runtime, choose_runtime

NOTES = (
    "resident: its set-up, the decoding of all images once in a run, is in the facts and not in images/s",
    "loader alone: from a standing start as in training, so that its first batch counts; step alone: its own first"
    f" {watched.READY} batches, loaded before",
)
_SERIAL = "e2e / (1 / (1 / loader + 1 / step)), as they share the cores"
_BESIDE = "e2e / min(loader, step), as one runs beside the other"


def bench_e2e(config: E2eBench) -> Report:
    """Measure and return the report. DataError for a folder with too few images, ValueError for a graph on a CPU."""
    config = config.at_smoke_size()
    plain = choose_runtime(config.device, "fp32", False)
    auto = choose_runtime(config.device, "auto", True)
    check_mode(config.mode, plain, "mode")
    with tempfile.TemporaryDirectory() as scratch:
        source, what = open_files(config.root, config.images, config.side, config.seed, Path(scratch))
        if config.stage != "pretrain":  # whatever labels there are: they cost nothing and change no arithmetic
            source = Relabelled(source, np.arange(len(source)) % config.classes)
        start = time.perf_counter()
        held = None
        if "resident" in config.loaders:
            held = choose_placement(source, DataConfig(threads=config.threads, loader="resident"), auto.device).fill()
        setup_s = time.perf_counter() - start
        checks = {"images": what} | loop.same_work(config)
        rates = {workers: _rate(_theirs(config, source, plain, workers, "")) for workers in config.workers}
        workers = max(rates, key=lambda key: rates[key])
        logger.info("%s takes %d workers: images/s by number of workers %s", loop.title(config.stage), workers, rates)
        checks["baseline's images/s by workers, one round"] = rates
        ours = _Ours(config, source, held, round(setup_s, 3))
        entries = [ours.trained(auto, loader) for loader in config.loaders]
        if named("fp32", "eager", "native") not in [entry.name for entry in entries]:
            entries.append(ours.trained(choose_runtime(config.device, "fp32", True), "native", eager=True))
        entries += [
            _theirs(config, source, plain, workers, "fp32 contiguous (default)"),
            _theirs(config, source, choose_runtime(config.device, "bf16", True), workers, "bf16 channels-last (best)"),
        ]
        entries += [component for loader in config.loaders for component in ours.components(auto, loader)]
        rows, reference = measure_training(entries, config.rounds, plain.device)
        notes = [*NOTES, HOW, *loop.notes(config.stage)]
        if config.profile is not None:
            notes.append(trace(entries[0], Path(config.profile), plain.device))
    found = report("e2e", asdict(config), plain, rows, checks=checks, notes=notes)
    derived = _derived(rows, config, len(config.loaders), plain.device.type == "cuda")
    return found | {"derived": derived, "reference": reference}


class _Ours:
    """Our contestants on `source`; held: the same decoded, which took setup_s seconds."""

    def __init__(self, config: E2eBench, source: Source, held: Resident | None, setup_s: float) -> None:
        self.config, self.source, self.held, self.setup_s = config, source, held, setup_s

    def trained(self, runtime: Runtime, loader: LoaderName, *, eager: bool = False) -> Contestant:
        mode = "eager" if eager else self.config.mode
        details = {"loader": loader, "setup_s": self.setup_s if loader == "resident" else 0.0}
        name = named(runtime.precision, mode, loader)
        return watched.trained(name, runtime, self.config, self._batches(runtime, loader), mode=mode, details=details)

    def components(self, runtime: Runtime, loader: LoaderName) -> list[Contestant]:
        """The loader alone and the step alone."""
        config, batches = self.config, self._batches(runtime, loader)
        views = 2 if config.stage == "pretrain" else 1
        ready = watched.again_and_again(watched.shipped(batches, runtime, config, views))
        name = f"{named(runtime.precision, config.mode, loader)}, step alone"
        return [
            watched.loaded(f"ours {loader}, loader alone", runtime, config, batches, views),
            watched.trained(name, runtime, config, ready, mode=config.mode, rival=False, details={"loader": "none"}),
        ]

    def _batches(self, runtime: Runtime, loader: LoaderName) -> Batches:
        data = DataConfig(threads=self.config.threads, loader=loader)
        held = self.held if loader == "resident" else None
        return watched.loading(self.source, held, runtime, self.config, data)


def _theirs(config: E2eBench, source: Source, runtime: Runtime, workers: int, words: str) -> Contestant:
    policy = policy_of(config.stage, config.size)
    if config.stage == "pretrain":
        dataset = Files(source, baseline.transform(config.size))
    else:
        dataset = LabelledFiles(source, baseline.plain_transform(policy))
    loader = data_loader(dataset, config.batch, config.steps, workers, runtime)
    name = f"{loop.title(config.stage)} {words}"
    return loop.trained(name, runtime, config, lambda: loader, details={"workers": workers})


def _rate(contestant: Contestant) -> float:
    done = contestant.run()
    return round(done.images / done.seconds, 2)


def _derived(rows: list[dict[str, Any]], config: E2eBench, loaders: int, overlapped: bool) -> list[dict[str, Any]]:
    """e2e over what its two parts alone allow, round by round, of each loader. Rows in the order of bench_e2e."""
    combined: Callable[[float, float], float] = max if overlapped else lambda loader, step: loader + step
    found = []
    for index, loader in enumerate(config.loaders):
        part = len(rows) - 2 * (loaders - index)
        times = zip(*(seconds_an_image(rows[k]) for k in (index, part, part + 1)), strict=True)
        values = [combined(alone, step) / whole for whole, alone, step in times]
        found.append({"name": f"{loader}: {_BESIDE if overlapped else _SERIAL}", **spread(values)})
    return found
