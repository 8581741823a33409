"""`study augment`: one augmentation and pairs of them, on one view alone. Chen et al. 2020, Sec. 3.1, Fig. 5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, ClassVar, Literal

from fastsimclr.loaders import Policy
from fastsimclr.recipe import Recipe
from fastsimclr.studies.base import Study, seeded, several
from fastsimclr.studies.cells import Cell, Row
from fastsimclr.studies.jobs import StudyJob
from fastsimclr.studies.plot import grid
from fastsimclr.studies.table import means

Op = Literal["crop", "cutout", "colour", "sobel", "noise", "blur", "rotation"]
# Each always changes the view, but the flip, and colour with its chances in SimCLR; a turn by 0 is as likely as others.
_CHANGES: dict[Op, dict[str, Any]] = {
    "crop": {"crop": "random", "flip": 0.5},
    "cutout": {"cutout": 1.0},
    "colour": {"jitter": 0.8, "grey": 0.2},
    "sobel": {"sobel": 1.0},
    "noise": {"noise": 1.0},
    "blur": {"blur": 1.0},
    "rotation": {"rotate90": 0.75},
}
_SMALLEST_BLURRED = 20


@dataclass(frozen=True, kw_only=True)
class AugmentStudy(Study):
    """Each augmentation alone and each pair, applied to one view only while the other stays the image's central square:
    pretraining and linear evaluation. Ranges (crop scale, jitter strength, …) are those of views."""

    name: ClassVar[str] = "augment"
    x: ClassVar[str] = "first"

    seeds: int = 1
    """Repeats, with seeds from the recipe's on."""
    ops: tuple[Op, ...] = ("crop", "cutout", "colour", "sobel", "noise", "blur", "rotation")
    """The augmentations of the grid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        several("ops", self.ops)

    def cells(self, recipe: Recipe) -> list[Cell]:
        """Of each pair once: the order in which two are applied is the views' own."""
        if "blur" in self.ops and recipe.views.size < _SMALLEST_BLURRED:
            raise ValueError(
                f"--ops names blur, but views.size={recipe.views.size} is below {_SMALLEST_BLURRED}, where nothing is"
                " blurred; leave blur out"
            )
        found = []
        for seed in self.seeds_of(recipe):
            for first, second in combinations_with_replacement(self.ops, 2):
                whole = seeded(recipe, seed)
                each = replace(whole, views=views_of(recipe.views, first, second))
                folder = f"{first}-{second}/seed-{seed}" if first != second else f"{first}/seed-{seed}"
                start = StudyJob(name=f"{folder}/pretrain", stage="pretrain", recipe=each)
                job = StudyJob(
                    name=f"{folder}/linear", stage="linear", recipe=whole, after=start
                )  # with the recipe's views
                found.append(Cell(point={"first": first, "second": second}, method="linear", seed=seed, job=job))
        return found

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """The grid, a pair on both sides of the diagonal."""
        values = {(str(a), str(b)): mean.mean for ((a, b), _), mean in means(rows).items()}
        values |= {(b, a): value for (a, b), value in values.items()}
        title = "linear top-1 (%) with one view augmented; the diagonal: one augmentation alone"
        grid(self.ops, values, path, title=title, axes=("one augmentation", "the other"))


def views_of(views: Policy, *ops: Op) -> Policy:
    """The policy with these augmentations alone, on one view."""
    off = dict.fromkeys(("rotate", "rotate90", "flip", "jitter", "grey", "blur", "sobel", "noise", "solarise"), 0.0)
    changes: dict[str, Any] = {"crop": "centre", "centre_fraction": 1.0, "cutout": 0.0, "one_branch": True, **off}
    for op in ops:
        changes |= _CHANGES[op]
    return replace(views, **changes)
