"""The end-to-end bench: from image files to the optimizer step, ours beside lightly's documented way."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from fastsimclr.bench import baseline, ours
from fastsimclr.bench.configs import E2eBench
from fastsimclr.bench.files import Files, data_loader, open_files
from fastsimclr.bench.record import LOG, Contestant, Report, measure, report
from fastsimclr.loaders import DataConfig, Source, hold
from fastsimclr.runtime import Runtime, choose_runtime

NOTES = ("resident: its set-up, the decoding of all images once in a run, is in the facts and not in images/s",)


def bench_e2e(config: E2eBench) -> Report:
    """Measure and return the report. DataError for a folder with too few images."""
    config = config.at_smoke_size()
    plain = choose_runtime(config.device, "fp32", False)
    auto = choose_runtime(config.device, "auto", True)
    with tempfile.TemporaryDirectory() as scratch:
        source, what = open_files(config.root, config.images, config.side, config.seed, Path(scratch))
        start = time.perf_counter()
        data = DataConfig(threads=config.threads, loader="resident")
        resident = hold(source, data, auto.device) if "resident" in config.loaders else None
        setup_s = time.perf_counter() - start
        checks = {"images": what} | baseline.same_work(
            ours.network(config.arch, config.size, config.seed), config.size, config.arch
        )
        rates = {workers: _rate(_theirs(config, source, plain, workers, "")) for workers in config.workers}
        workers = max(rates, key=lambda key: rates[key])
        LOG.info("%s takes %d workers: images/s by number of workers %s", baseline.title(), workers, rates)
        checks["baseline's images/s by workers, one round"] = rates
        size = {"arch": config.arch, "size": config.size, "batch": config.batch, "seed": config.seed}
        full = choose_runtime(config.device, "fp32", True)
        entries = [
            ours.trained(
                f"ours {runtime.precision} {loader}",
                runtime,
                source,
                resident if loader == "resident" else None,
                steps=config.steps,
                threads=config.threads,
                loader=loader,
                setup_s=setup_s if loader == "resident" else 0.0,
                **size,  # type: ignore[arg-type]
            )
            for runtime, loader in [*((auto, loader) for loader in config.loaders), (full, "native")]
        ]
        best = choose_runtime(config.device, "bf16", True)
        entries += [
            _theirs(config, source, plain, workers, "fp32 contiguous (default)"),
            _theirs(config, source, best, workers, "bf16 channels-last (best)"),
        ]
        rows = measure(entries, config.rounds, plain.device)
    return report("e2e", asdict(config), plain, rows, checks=checks, notes=[*NOTES, *baseline.notes()])


def _theirs(config: E2eBench, source: Source, runtime: Runtime, workers: int, words: str) -> Contestant:
    dataset = Files(source, baseline.transform(config.size))
    loader = data_loader(dataset, config.batch, config.steps, workers, runtime)
    return baseline.trained(
        f"{baseline.title()} {words}",
        runtime,
        lambda: loader,
        arch=config.arch,
        size=config.size,
        batch=config.batch,
        seed=config.seed,
        facts={"workers": workers},
    )


def _rate(contestant: Contestant) -> float:
    done = contestant.run()
    return round(done.images / done.seconds, 2)
