"""The step bench: views, forward, loss, backward and LARS on resident synthetic images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict

import torch

from fastsimclr.bench import baseline, ours
from fastsimclr.bench.configs import StepBench
from fastsimclr.bench.record import Report, measure, report
from fastsimclr.feed import ship
from fastsimclr.loaders import DataConfig, TrainLoader, hold, open_data
from fastsimclr.runtime import Precision, choose_runtime

_READY = 4  # batches of ready-made views that the baseline goes around
NOTES = ("the baseline's views are ready-made on the device and cost it nothing; ours are made in the step",)


def bench_step(config: StepBench) -> Report:
    """Measure and return the report."""
    config = config.at_smoke_size()
    images = max(config.batch * _READY, 2048 if config.size <= 32 else 512)
    side = config.size if config.size <= 32 else config.size * 8 // 7
    data = DataConfig(source="synthetic", synthetic_images=images, synthetic_size=side, loader="resident")
    source = open_data(data).unlabelled
    plain = choose_runtime(config.device, "fp32", False)
    device = plain.device
    resident = hold(source, data, device)
    policy = ours.policy_for(config.size)
    loader = TrainLoader(source, data, batch=config.batch, seed=config.seed, stop=_READY, resident=resident)
    shipments = [ship(batch, policy, config.seed, 2, device) for batch in loader]
    ready = [shipment.views(policy, torch.float32).contiguous().chunk(2) for shipment in shipments]

    def batches() -> Iterator[baseline.Pair]:
        return ((a, b) for a, b in itertools.islice(itertools.cycle(ready), config.steps))

    size = {"arch": config.arch, "size": config.size, "batch": config.batch, "seed": config.seed}
    settings: tuple[tuple[Precision, bool, str], ...] = (
        ("fp32", False, "fp32 contiguous (default)"),
        ("bf16", True, "bf16 channels-last (best)"),
    )
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    entries = [
        *(
            ours.trained(
                f"ours {precision}",
                choose_runtime(config.device, precision, True),
                source,
                resident,
                steps=config.steps,
                **size,  # type: ignore[arg-type]
            )
            for precision in precisions
        ),
        *(
            baseline.trained(
                f"{baseline.title()} {words}",
                choose_runtime(config.device, precision, channels_last),
                batches,
                facts={"views": "ready-made"},
                **size,  # type: ignore[arg-type]
            )
            for precision, channels_last, words in settings
        ),
    ]
    checks = baseline.same_work(ours.network(config.arch, config.size, config.seed), config.size, config.arch)
    rows = measure(entries, config.rounds, device)
    return report("step", asdict(config), plain, rows, checks=checks, notes=[*NOTES, *baseline.notes()])
