"""Fine-tune a task with the Trainer, by SGD in one process, in fp32, and write its result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
import yaml

from fastsimclr.dense.task import FitConfig, Reader, Task
from fastsimclr.optim import Schedule
from fastsimclr.runs import checkpoint
from fastsimclr.runs.text import write_text
from fastsimclr.runtime.device import choose_runtime
from fastsimclr.runtime.environment import environment
from fastsimclr.training.config import TrainerConfig
from fastsimclr.training.trainer import Trainer, TrainingJob

_FREE = ("out", "device", "workers", "checkpoint_steps", "resume")  # may differ between a run and its resumption


@dataclass(frozen=True, kw_only=True)
class _Rates(Schedule):
    """The learning rate of each step: `share_of_peak`(step, total_steps) of the peak."""

    share_of_peak: Callable[[int, int], float]
    warmup_steps: int = 0

    def __call__(self, step: int) -> float:
        return self.peak * self.share_of_peak(step, self.total_steps)


def fit(name: str, task: Task, config: FitConfig) -> dict[str, Any]:
    """Train `task`, write out/result.json and return it. Stopped after a signal, with a checkpoint of that step.

    Raises FileExistsError for a checkpoint without --resume auto and for a folder of another command, CheckpointError
    for a checkpoint of other settings or of an earlier version, FloatingPointError for a NaN or infinite loss.
    """
    out, settings = Path(config.out), asdict(config)
    _claim(name, out)
    if config.batch > len(task.examples):
        raise ValueError(f"--batch={config.batch}, but there are {len(task.examples)} training images; use fewer")
    runtime = choose_runtime(config.device, "fp32", False)
    runtime.to_device(task)
    weights = [value for value in task.parameters() if value.requires_grad]
    peak, total = config.lr * config.batch / 16, config.epochs * (len(task.examples) // config.batch)
    job = TrainingJob(
        stage=name,
        run=out,
        objective=task,
        optimizer=torch.optim.SGD(weights, lr=peak, momentum=config.momentum, weight_decay=config.weight_decay),
        schedule=_Rates(peak=peak, total_steps=total, share_of_peak=task.rate),
        batches=lambda start, stop, crops: range(start, stop),  # the reader reads the images of these steps
        policy=None,
        feed=partial(Reader, task, config),
        batch=config.batch,
        seed=config.seed,
        fingerprint=hashlib.sha256(repr(task.examples).encode()).hexdigest(),
        recipe=yaml.safe_dump({name: {key: settings[key] for key in settings if key not in ("out", "resume")}}),
        metadata={key: value for key, value in settings.items() if key not in _FREE},
        resume=config.resume == "auto",
    )
    trainer = Trainer(TrainerConfig(checkpoint_every_steps=config.checkpoint_steps), runtime, job)
    trainer.fit()
    started = time.monotonic()
    metrics = task.evaluate(runtime.device, out)
    result = {
        "stage": name,
        "metrics": metrics,
        "training": {"steps": total, "loss": task.last_loss.item()},
        "seconds": round(trainer.trained_s + time.monotonic() - started, 2),
        "data": task.data_summary(),
        "settings": settings,
        "environment": environment(runtime) | {"torchvision": str(torchvision.__version__)},
    }
    write_text(out / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _claim(name: str, out: Path) -> None:
    """Refuse a folder of another command, and a checkpoint in the format of the earlier training loop."""
    if (old := out / "checkpoint.pt").exists():
        raise checkpoint.CheckpointError(
            f"{old} is of an earlier version of fastsimclr {name} and cannot be resumed;"
            " finish that run with the earlier version, or give another --out"
        )
    recipe = out / "recipe.yaml"
    started = recipe.is_file() and recipe.read_text().startswith(f"{name}:")  # but has no checkpoint yet
    theirs = ["result.json"] if started else ["recipe.yaml", "checkpoints", "result.json"]
    if not checkpoint.saved(out) and (held := [other for other in theirs if (out / other).exists()]):
        raise FileExistsError(f"{out} holds {held[0]}, but no checkpoint of {name} to resume; give another --out")
