"""`study size`: depth by width by selective kernels. Chen et al. 2020b (SimCLRv2), Table 1 and Fig. 1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fastsimclr.models.resnet import Arch
from fastsimclr.recipe import Recipe
from fastsimclr.studies.base import Study, seeded, several
from fastsimclr.studies.cells import Cell
from fastsimclr.studies.jobs import StudyJob


@dataclass(frozen=True, kw_only=True)
class SizeStudy(Study):
    """Each depth at each width, with and without selective kernels: pretraining, linear evaluation, fine-tuning on the
    few labels, and the same network supervised on them."""

    name: ClassVar[str] = "size"
    x: ClassVar[str] = "network"

    archs: tuple[Arch, ...] = ("resnet18", "resnet34", "resnet50")
    """Depths."""
    widths: tuple[float, ...] = (1.0, 2.0)
    """Width multipliers."""
    selective_kernels: tuple[bool, ...] = (False,)
    """Without, with or both; depths 18 and 34 get the ResNet-D parts alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("archs", "widths", "selective_kernels"):
            several(option, getattr(self, option))

    def cells(self, recipe: Recipe) -> list[Cell]:
        """Of each network and seed, three."""
        found = []
        for seed in self.seeds_of(recipe):
            for arch in self.archs:
                for width in self.widths:
                    for kernels in self.selective_kernels:
                        model = replace(recipe.model, arch=arch, width=width, selective_kernels=kernels)
                        each = replace(seeded(recipe, seed), model=model)
                        network = f"R{arch.removeprefix('resnet')}-{width:g}x{'-SK' if kernels else ''}"
                        folder = f"{network}/seed-{seed}"
                        start = StudyJob(name=f"{folder}/pretrain", stage="pretrain", recipe=each)
                        jobs = {
                            "linear": StudyJob(name=f"{folder}/linear", stage="linear", recipe=each, after=start),
                            "fine-tuned": StudyJob(
                                name=f"{folder}/finetune", stage="finetune", recipe=each, after=start
                            ),
                            "supervised": StudyJob(name=f"{folder}/supervised", stage="supervised", recipe=each),
                        }
                        found += [
                            Cell(point={"network": network}, method=method, seed=seed, job=job)
                            for method, job in jobs.items()
                        ]
        return found
