"""Linear warm-up, then cosine decay to 0, one value a step, as google-research/simclr's WarmUpAndCosineDecay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0; step 0 of a warm-up has 0.

    step < warmup_steps: peak * step / warmup_steps. After: peak * (1 + cos(pi * (step - warmup_steps) / rest)) / 2 with
    rest = total_steps - warmup_steps, and 0 from total_steps on. Computed in float32, as Google's graph does.
    Raises ValueError where step < 0 or not 0 <= warmup_steps < total_steps.
    """
    if step < 0:
        raise ValueError(f"step={step} is negative; the first optimizer step is 0")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps={warmup_steps} is not in [0, total_steps={total_steps}); warm up for less")
    f32 = np.float32
    if step < warmup_steps:
        return float(f32(step) / f32(warmup_steps) * f32(peak))
    rest = total_steps - warmup_steps
    angle = f32(math.pi) * (f32(min(step - warmup_steps, rest)) / f32(rest))
    return float(f32(peak) * (f32(0.5) * (f32(1) + f32(math.cos(angle)))))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate of a whole run, called with the optimizer step."""

    peak: float
    """Learning rate at the end of the warm-up."""
    warmup_steps: int
    """Steps of linear growth from 0."""
    total_steps: int
    """Optimizer steps of the run."""

    def __post_init__(self) -> None:
        self(0)

    @classmethod
    def from_epochs(cls, n: int, epochs: float, batch: int, warmup_epochs: float, peak: float) -> Schedule:
        """Google's step counts for n samples at a global batch: n * epochs // batch + 1, of them warm-up rounded.

        Raises ValueError where n, epochs or batch is not positive or the warm-up is not shorter than the run.
        """
        if n < 1 or batch < 1 or epochs <= 0:
            raise ValueError(f"n={n}, batch={batch} and epochs={epochs} must be positive")
        if not 0 <= warmup_epochs <= epochs:
            raise ValueError(f"warmup_epochs={warmup_epochs} is not in [0, epochs={epochs}]; lower it or train longer")
        total_steps = int(n * epochs // batch) + 1
        return cls(peak=peak, warmup_steps=round(warmup_epochs * n // batch), total_steps=total_steps)

    def __call__(self, step: int) -> float:
        """The learning rate of optimizer step `step`."""
        return learning_rate(step, peak=self.peak, warmup_steps=self.warmup_steps, total_steps=self.total_steps)
