"""`study transfer`: a pretrained network on other labelled images. Chen et al. 2020, Sec. 6 and Table 8."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from fastsimclr.recipe import Recipe
from fastsimclr.studies.base import Study, seeded, several
from fastsimclr.studies.cells import Cell
from fastsimclr.studies.jobs import StudyJob


@dataclass(frozen=True, kw_only=True)
class TransferStudy(Study):
    """The network of a pretraining run on other labelled folders, all of whose labels are used: kNN, linear and
    fine-tuned, beside the same network supervised from scratch."""

    name: ClassVar[str] = "transfer"
    x: ClassVar[str] = "data"

    to: tuple[str, ...] = ()
    """Folders of labelled images, root/CLASS or root/train/CLASS and root/test/CLASS, or .beton files."""
    start: str = ""
    """The pretraining run: given by --from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        several("to", self.to)
        several("to", [Path(folder).name for folder in self.to])

    def cells(self, recipe: Recipe) -> list[Cell]:
        """Of each folder and seed, four."""
        found = []
        for seed in self.seeds_of(recipe):
            for root in self.to:
                packed = root.endswith(".beton")
                data = replace(
                    seeded(recipe, seed).data,
                    source="beton" if packed else "folder",
                    root=root,
                    labels=None,
                    val=None,
                    val_labels=None,
                    label_fraction=None,
                    labels_per_class=None,
                    label_list=None,
                    label_key=None,
                    index=None,
                )
                each = replace(
                    recipe,
                    seed=seed,
                    data=data,
                    knn=replace(recipe.knn, baselines=False, labels="all"),
                    linear=replace(recipe.linear, labels="all"),
                    finetune=replace(recipe.finetune, labels="all"),
                    supervised=replace(recipe.supervised, labels="all"),
                )
                folder = f"{Path(root).name}/seed-{seed}"
                jobs = {
                    "kNN": StudyJob(name=f"{folder}/knn", stage="knn", recipe=each, start=self.start),
                    "linear": StudyJob(name=f"{folder}/linear", stage="linear", recipe=each, start=self.start),
                    "fine-tuned": StudyJob(name=f"{folder}/finetune", stage="finetune", recipe=each, start=self.start),
                    "supervised": StudyJob(name=f"{folder}/supervised", stage="supervised", recipe=each),
                }
                found += [
                    Cell(point={"data": Path(root).name}, method=method, seed=seed, job=job)
                    for method, job in jobs.items()
                ]
        return found
