"""`study batch`: batch size by length of pretraining. Chen et al. 2020, Sec. 5.2 and Fig. 9."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fastsimclr.recipe import Recipe
from fastsimclr.studies.base import Study, seeded, several
from fastsimclr.studies.cells import Cell
from fastsimclr.studies.jobs import StudyJob


@dataclass(frozen=True, kw_only=True)
class BatchStudy(Study):
    """Pretraining with each batch for each number of epochs, and linear evaluation. The learning rate follows the batch
    as pretrain.optim.lr_scaling says."""

    name: ClassVar[str] = "batch"
    x: ClassVar[str] = "batch"
    unit: ClassVar[str] = "images a step"
    logarithmic: ClassVar[bool] = True

    batches: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """Images a step."""
    epochs: tuple[int, ...] = (100, 200, 400, 800)
    """Passes over all images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        several("batches", self.batches)
        several("epochs", self.epochs)

    def cells(self, recipe: Recipe) -> list[Cell]:
        """Of each batch, length and seed."""
        found = []
        for seed in self.seeds_of(recipe):
            for batch in self.batches:
                for epochs in self.epochs:
                    pretraining = replace(recipe.pretrain, batch=batch, epochs=epochs)
                    each = replace(seeded(recipe, seed), pretrain=pretraining)
                    folder = f"batch-{batch}/epochs-{epochs}/seed-{seed}"
                    start = StudyJob(name=f"{folder}/pretrain", stage="pretrain", recipe=each)
                    job = StudyJob(name=f"{folder}/linear", stage="linear", recipe=each, after=start)
                    found.append(Cell(point={"batch": batch, "epochs": epochs}, method="linear", seed=seed, job=job))
        return found
