"""What is minimised: each objective holds its networks and turns a batch of views into a loss and metrics."""

from fastsimclr.methods.base import Objective, Outcome
from fastsimclr.methods.contrastive import Contrastive
from fastsimclr.methods.cross_entropy import CrossEntropy
from fastsimclr.methods.distillation import Distillation, Ensemble, RecordedDistillation
from fastsimclr.methods.linear_sweep import LinearSweep
from fastsimclr.methods.momentum import MomentumContrast

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
