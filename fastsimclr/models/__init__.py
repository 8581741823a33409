"""Encoders, projection heads, classifiers, and weights from elsewhere."""

from fastsimclr.models.batch_groups import BatchGroups, batch_groups
from fastsimclr.models.convert import load_torchvision, load_weights, read_state
from fastsimclr.models.heads import Classifier, ProjectionHead
from fastsimclr.models.network import (
    ClassifierNet,
    ModelConfig,
    SimCLRNet,
    build_classifier,
    build_encoder,
    build_simclr,
    classifier_from,
    count_parameters,
)
from fastsimclr.models.norm import BatchNorm, average_running_statistics, set_fused, set_groups, statistics_of
from fastsimclr.models.resnet import ResNet

__all__ = [
    "BatchGroups",
    "BatchNorm",
    "Classifier",
    "ClassifierNet",
    "ModelConfig",
    "ProjectionHead",
    "ResNet",
    "SimCLRNet",
    "average_running_statistics",
    "batch_groups",
    "build_classifier",
    "build_encoder",
    "build_simclr",
    "classifier_from",
    "count_parameters",
    "load_torchvision",
    "load_weights",
    "read_state",
    "set_fused",
    "set_groups",
    "statistics_of",
]
