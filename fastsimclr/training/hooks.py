"""What runs between the steps of a training: probes, validation, observers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar


class Hook(ABC):
    """Called on every rank after each multiple of `every_steps`, outside the step; returns numbers to record, or None.

    Between these steps BatchNorm statistics may differ between the ranks; a hook that is due finds them averaged.
    """

    kind: ClassVar[str] = "probe"
    """The kind of its records in metrics.jsonl."""

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps

    def due(self, step: int) -> bool:
        """Whether it is called after `step`."""
        return step % self.every_steps == 0

    @abstractmethod
    def __call__(self, step: int) -> dict[str, float] | None:
        """Measure; the networks may be left in evaluation mode."""


def steps_of(epochs: int, images: int, batch: int) -> int:
    """Steps in that many epochs, at least 1."""
    return max(1, epochs * images // batch)
