"""The one list of the stages: what each does, what it starts from, and in which order the chain runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastsimclr.recipe import StageName
from fastsimclr.stages.classifiers import finetune, supervised
from fastsimclr.stages.distillation import distill
from fastsimclr.stages.evaluation import evaluate_knn, evaluate_linear
from fastsimclr.stages.pretrain import pretrain
from fastsimclr.stages.setting import Setting

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    summary: its line of help. start: what it starts from. function: what runs it, called as `run` calls it.
    """

    summary: str
    start: Literal["nothing", "run", "teachers"]
    function: Callable[..., Result]

    def run(self, setting: Setting, starts: Sequence[str], out: Path, resume: bool) -> Result:
        """Run the stage into the folder `out` and return its result, which is also in out/result.json.

        starts: the run folder that it starts from, the teachers (run folders or names of library networks), or nothing.
        resume: continue from the newest checkpoint in `out`, if there is one.
        """
        if self.start == "nothing":
            return self.function(setting, out, resume)
        if self.start == "run":
            (start,) = starts
            return self.function(setting, Path(start), out, resume)
        return self.function(setting, starts, out, resume)


STAGES: dict[str, Stage] = {
    "pretrain": Stage(summary="Contrastive pretraining on all images.", start="nothing", function=pretrain),
    "linear": Stage(summary="Linear evaluation of a pretrained network.", start="run", function=evaluate_linear),
    "knn": Stage(summary="Nearest-neighbour evaluation of a pretrained network.", start="run", function=evaluate_knn),
    "finetune": Stage(summary="Fine-tune a pretrained network on the labels.", start="run", function=finetune),
    "supervised": Stage(
        summary="The baseline: the same network from scratch on the same labels.",
        start="nothing",
        function=supervised,
    ),
    "distill": Stage(summary="Distill a fine-tuned network into a student.", start="teachers", function=distill),
}


@dataclass(frozen=True, kw_only=True)
class ChainStep:
    """One stage of `fastsimclr run`.

    folder: its run folder below the chain's. after: the folder of the step it starts from. into_itself: distill into a
    network of the teacher's own architecture.
    """

    folder: str
    stage: StageName
    after: str | None = None
    into_itself: bool = False


def chain_steps(self_first: bool) -> tuple[ChainStep, ...]:
    """The steps of `fastsimclr run` in their order; self_first: distill.self_first."""
    self_distill = ChainStep(folder="self-distill", stage="distill", after="finetune", into_itself=True)
    return (
        ChainStep(folder="pretrain", stage="pretrain"),
        ChainStep(folder="knn", stage="knn", after="pretrain"),
        ChainStep(folder="linear", stage="linear", after="pretrain"),
        ChainStep(folder="supervised", stage="supervised"),
        ChainStep(folder="finetune", stage="finetune", after="pretrain"),
        *([self_distill] if self_first else []),
        ChainStep(folder="distill", stage="distill", after="self-distill" if self_first else "finetune"),
    )
