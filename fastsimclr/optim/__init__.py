"""Optimizers and learning-rate schedule."""

from fastsimclr.optim.lars import LARS, HeadSetting, OptimConfig, build_optimizer, parameter_groups, set_lr
from fastsimclr.optim.schedule import Schedule, learning_rate

__all__ = [
    "LARS",
    "HeadSetting",
    "OptimConfig",
    "Schedule",
    "build_optimizer",
    "learning_rate",
    "parameter_groups",
    "set_lr",
]
