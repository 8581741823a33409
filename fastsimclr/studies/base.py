"""What a study is: settings, and the trainings whose accuracies are its cells."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from fastsimclr.recipe import Recipe
from fastsimclr.studies.cells import Cell, Row, Value
from fastsimclr.studies.plot import lines


@dataclass(frozen=True, kw_only=True)
class Study(ABC):
    """What all studies have in common."""

    name: ClassVar[str]
    x: ClassVar[str]
    """The axis of the picture; the others, with the method, make its lines."""
    unit: ClassVar[str] = ""
    """What the values of that axis are, in words for its label."""
    logarithmic: ClassVar[bool] = False

    seeds: int = 3
    """Repeats, with seeds from the recipe's on: each with its own order, views and draw of labels, and its own weights
    where it trains from scratch."""
    side_by_side: int = 0
    """Trainings at a time, each in a process and on a GPU of its own; 0: as many as there are GPUs, one on a CPU."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"--seeds {self.seeds} must be at least 1")
        if self.side_by_side < 0:
            raise ValueError(f"--side_by_side {self.side_by_side} must be 0 (as many as there are GPUs) or more")

    @abstractmethod
    def cells(self, recipe: Recipe) -> list[Cell]:
        """Every cell with the trainings that it takes. ValueError for a setting that cannot be."""

    def remarks(self, rows: Sequence[Row], out: Path) -> list[str]:
        """What the rows say, in sentences below the table; more files may be written to `out`."""
        return []

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """The picture."""
        lines(rows, path, x=self.x, unit=self.unit, logarithmic=self.logarithmic, title=f"study {self.name}")

    def seeds_of(self, recipe: Recipe) -> range:
        """The seeds of the repeats."""
        return range(recipe.seed, recipe.seed + self.seeds)


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with that seed, and the draw of the few labels moved with it."""
    shift = seed - recipe.seed
    return replace(recipe, seed=seed, data=replace(recipe.data, label_seed=recipe.data.label_seed + shift))


def several(option: str, values: Sequence[Value]) -> None:
    """ValueError where there is no value, or one twice."""
    if not values or len(set(values)) < len(values):
        raise ValueError(f"--{option} {list(values)} must name one value or more, each once")
