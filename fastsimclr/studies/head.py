"""`study head`: depth of the head by the layer to fine-tune from. Chen et al. 2020b (SimCLRv2), Fig. 5, 6."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fastsimclr.recipe import Recipe
from fastsimclr.studies.base import Study, seeded, several
from fastsimclr.studies.cells import Cell
from fastsimclr.studies.jobs import StudyJob


@dataclass(frozen=True, kw_only=True)
class HeadStudy(Study):
    """A pretraining with each number of head layers, and fine-tuning on the few labels from each layer of it, 0 being
    the encoder's output."""

    name: ClassVar[str] = "head"
    x: ClassVar[str] = "finetune_layer"
    unit: ClassVar[str] = "layer of the head that fine-tuning starts from"

    layers: tuple[int, ...] = (2, 3, 4)
    """Layers of the projection head, at most 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        several("layers", self.layers)
        if not all(1 <= layers <= 4 for layers in self.layers):
            raise ValueError(f"--layers {list(self.layers)} must be 1 to 4")

    def cells(self, recipe: Recipe) -> list[Cell]:
        """Of each depth, layer of it, and seed."""
        found = []
        for seed in self.seeds_of(recipe):
            for layers in self.layers:
                each = replace(seeded(recipe, seed), model=replace(recipe.model, head_layers=layers))
                folder = f"layers-{layers}/seed-{seed}"
                start = StudyJob(name=f"{folder}/pretrain", stage="pretrain", recipe=each)
                for layer in range(layers + 1):
                    tuned = replace(each, finetune=replace(recipe.finetune, head_layer=layer))
                    job = StudyJob(name=f"{folder}/finetune-from-{layer}", stage="finetune", recipe=tuned, after=start)
                    point = {"head_layers": layers, "finetune_layer": layer}
                    found.append(Cell(point=dict(point), method="fine-tuned", seed=seed, job=job))
        return found
