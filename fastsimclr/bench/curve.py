"""The curve bench: does training in the automatic precision go as in float32, nearer than with another seed?"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastsimclr.bench import ours
from fastsimclr.bench.configs import CurveBench
from fastsimclr.bench.files import open_files
from fastsimclr.bench.record import Report, frame, logger
from fastsimclr.loaders import DataConfig, Source, TrainLoader
from fastsimclr.methods import Contrastive
from fastsimclr.models import ModelConfig, build_simclr
from fastsimclr.optim import OptimConfig, Schedule, build_optimizer
from fastsimclr.runs.text import aligned
from fastsimclr.runtime.device import Runtime, choose_runtime
from fastsimclr.training.config import TrainerConfig
from fastsimclr.training.trainer import Trainer

WINDOW = 20  # steps whose mean is one point of a curve


def bench_curve(config: CurveBench) -> Report:
    """Train and return the report: the same weights and views in float32 and in the precision under test, then others.

    The noise is what curves in float32 with other weights, order and views differ by from the first. A curve is within
    it where its mean distance from the first is at most theirs.
    """
    config = config.at_smoke_size()
    plain, tested = choose_runtime(config.device, "fp32", True), choose_runtime(config.device, config.precision, True)
    if tested.precision == plain.precision:
        raise ValueError(
            f"precision={config.precision} is {plain.precision} here, which is compared with itself; use bf16"
        )
    with tempfile.TemporaryDirectory() as scratch:
        source, what = open_files(config.root, config.images, config.side, config.seed, Path(scratch))
        runs = [
            ("float32", plain, config.seed),
            (f"{tested.precision}, the same weights and views", tested, config.seed),
        ]
        runs += [
            (f"float32, seed {seed}", plain, seed) for seed in range(config.seed + 1, config.seed + 1 + config.others)
        ]
        curves = {}
        for name, runtime, seed in runs:
            curves[name] = losses_of(config, runtime, source, seed)
            logger.info("%s: loss %.4f to %.4f", name, curves[name][0], statistics.mean(curves[name][-WINDOW:]))
    first, near, *others = curves.values()
    distance, noise = _distance(near, first), [_distance(other, first) for other in others]
    checks = {
        "images": what,
        "mean distance of the smoothed curves from float32's": distance,
        f"its mean loss less float32's, last {WINDOW} steps": statistics.mean(near[-WINDOW:])
        - statistics.mean(first[-WINDOW:]),
        "the mean distance of other weights, order and views in float32 (noise)": noise,
        "verdict": "within noise" if distance <= min(noise) else "OUTSIDE noise",
    }
    report = frame("curve", asdict(config), tested, [], [], checks=checks, notes=())
    return report | {"curves": curves}


def losses_of(config: CurveBench, runtime: Runtime, source: Source, seed: int) -> list[float]:
    """The loss of each step of a pretraining, its weights, order and views drawn by `seed`."""
    torch.manual_seed(seed)
    model = ModelConfig(arch=config.arch, width=config.width, head_layers=ours.HEAD_LAYERS, head_dim=ours.HEAD_DIM)
    objective = Contrastive(build_simclr(model, config.size), temperature=ours.TEMPERATURE, scaling="paper")
    runtime.to_device(objective)
    optim = OptimConfig(lr=config.lr, lr_scaling="none", warmup_epochs=0)
    losses: list[torch.Tensor] = []
    objective.register_forward_hook(lambda _module, _inputs, outcome: losses.append(outcome.loss.detach()))
    data = DataConfig(threads=config.threads, loader="native")
    with tempfile.TemporaryDirectory() as folder:
        job = ours.job_of(
            objective,
            build_optimizer(optim, objective, global_batch=config.batch),
            lambda start, stop, crops: TrainLoader(
                source,
                data,
                batch=config.batch,
                seed=seed,
                start=start,
                stop=stop,
                crops=crops,
                cut=runtime.cuts,
                pin=runtime.pins,
            ),
            Schedule(peak=config.lr, warmup_steps=min(20, config.steps // 2), total_steps=config.steps),
            policy=ours.policy_for(config.size),
            batch=config.batch,
            seed=seed,
            run=Path(folder),
        )
        trainer = TrainerConfig(log_every_steps=config.steps, checkpoint_every_steps=config.steps, keep_checkpoints=1)
        Trainer(trainer, runtime, job).fit()
    found: list[float] = torch.stack(losses).tolist()
    return found


def _distance(curve: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference of two curves smoothed over WINDOW steps."""
    points = range(0, max(1, len(curve) - WINDOW + 1))
    return statistics.mean(
        abs(statistics.mean(curve[k : k + WINDOW]) - statistics.mean(other[k : k + WINDOW])) for k in points
    )


def table_of_curves(result: Report) -> str:
    """The curves for people: their means over a tenth of the steps each, and the checks."""
    curves: dict[str, list[float]] = result["curves"]
    steps = len(next(iter(curves.values())))
    ends = [round(k * steps / 10) for k in range(11)]
    spans = [(a, b) for a, b in itertools.pairwise(ends) if b > a]
    rows = [("mean loss of steps", *(f"{a}-{b - 1}" for a, b in spans))]
    rows += [(name, *(f"{statistics.mean(losses[a:b]):.4f}" for a, b in spans)) for name, losses in curves.items()]
    facts = result["environment"]
    head = f"bench curve on {facts['device']}, torch {facts['torch']}, commit {facts['commit']}, {steps} steps"
    return "\n".join([head, "", *aligned(rows), "", *(_told(*pair) for pair in result["checks"].items())])


def _told(key: str, value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return f"check: {key}: " + ", ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values)
