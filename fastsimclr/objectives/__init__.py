"""What is minimised: each objective holds its networks and turns a batch of views into a loss and metrics."""

from fastsimclr.objectives.base import Objective, Outcome
from fastsimclr.objectives.contrastive import Contrastive
from fastsimclr.objectives.cross_entropy import CrossEntropy
from fastsimclr.objectives.distillation import Distillation, Ensemble, RecordedDistillation
from fastsimclr.objectives.linear_sweep import LinearSweep
from fastsimclr.objectives.momentum import MomentumContrast

__all__ = [
    "Contrastive",
    "CrossEntropy",
    "Distillation",
    "Ensemble",
    "LinearSweep",
    "MomentumContrast",
    "Objective",
    "Outcome",
    "RecordedDistillation",
]
