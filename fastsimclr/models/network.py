"""The networks that the stages train: an encoder with a projection head, or with a classifier."""

# N images, C encoder channels, D projection dimension, K classes, H height, W width

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastsimclr.models.heads import Classifier, ProjectionHead
from fastsimclr.models.resnet import Arch, ResNet

CIFAR_STEM_UP_TO_PX = 32


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Encoder and projection head. Raises ValueError where a value breaks its rule."""

    arch: Arch = "resnet50"
    """Depth of the ResNet; 18 and 34 have basic blocks, the others bottlenecks."""
    width: float = 1.0
    """Multiplies every channel count, the stem's too (1, 2, 3 and 4 in the papers); 64 * width is rounded to a
    multiple of 8."""
    selective_kernels: bool = False
    """SimCLRv2's SK networks: selective kernels in the bottlenecks, ResNet-D stem and shortcuts. As in Google's code,
    the basic blocks of depths 18 and 34 get the ResNet-D parts alone."""
    stem: Literal["auto", "imagenet", "cifar"] = "auto"
    """imagenet: 7x7 stride 2 and max-pool; cifar: 3x3 stride 1; auto: cifar for views of up to 32 px."""
    maxpool: Literal["torch", "tf_same"] = "torch"
    """Padding of the imagenet stem's max-pool. torch: one pixel on each side. tf_same: at even sizes below and to the
    right only, as in Google's networks."""
    project_first: bool = False
    """Depths 18 and 34: give the first block of the first group a projection shortcut, too, as in Google's networks.
    The others, and selective kernels, have one anyway."""
    zero_gamma: bool = True
    """Start the last BN of each block at 0, so that each block starts as its shortcut."""
    head_layers: int = 3
    """Layers of the projection head: 2 in SimCLR v1, 3 in v2, at most 4; 0 for none."""
    head_dim: int = 128
    """Output features of the projection head."""

    def __post_init__(self) -> None:
        if self.arch not in get_args(Arch):
            raise ValueError(f"model.arch={self.arch!r} is unknown; use one of {', '.join(get_args(Arch))}")
        if not (math.isfinite(self.width) and self.width > 0):
            raise ValueError(f"model.width={self.width} must be a positive number; use 1 for the plain network")
        if self.stem not in ("auto", "imagenet", "cifar"):
            raise ValueError(f"model.stem={self.stem!r} is unknown; use auto, imagenet or cifar")
        if self.maxpool not in ("torch", "tf_same"):
            raise ValueError(f"model.maxpool={self.maxpool!r} is unknown; use torch, or tf_same for Google's networks")
        if not 0 <= self.head_layers <= 4:
            raise ValueError(f"model.head_layers={self.head_layers} must be 0 to 4; use 2 (SimCLR v1) or 3 (v2)")
        if self.head_dim < 1:
            raise ValueError(f"model.head_dim={self.head_dim} must be at least 1; use 128")


class SimCLRNet(nn.Module):
    """f and g of SimCLR (arXiv 2002.05709, section 2.1): images [N, 3, H, W] -> h [N, C] and z [N, D].

    Neither output is normalised to unit length.
    """

    def __init__(self, encoder: ResNet, head: ProjectionHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's features h [N, C] and their projections z [N, D]."""
        h_NC: Tensor = self.encoder(images_NCHW)
        return h_NC, self.head(h_NC)


class ClassifierNet(nn.Module):
    """Encoder, the first layers of a projection head (none for linear evaluation and students), and a classifier.

    Images [N, 3, H, W] -> logits [N, K].
    """

    def __init__(self, encoder: ResNet, head: ProjectionHead, classifier: Classifier) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.classifier = classifier

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, K]."""
        logits_NK: Tensor = self.classifier(self.features(images_NCHW))
        return logits_NK

    def features(self, images_NCHW: Tensor) -> Tensor:
        """What the classifier sees, [N, classifier.in_features]."""
        y: Tensor = self.head(self.encoder(images_NCHW))
        return y


def build_encoder(config: ModelConfig, image_size: int) -> ResNet:
    """The encoder for views of `image_size` px, its weights channels-last, drawn from torch's global generator."""
    cifar = config.stem == "cifar" or (config.stem == "auto" and image_size <= CIFAR_STEM_UP_TO_PX)
    encoder = ResNet(
        config.arch,
        width=config.width,
        selective_kernels=config.selective_kernels,
        cifar_stem=cifar,
        zero_gamma=config.zero_gamma,
        maxpool=config.maxpool,
        project_first=config.project_first,
    )
    return encoder.to(memory_format=torch.channels_last)


def build_simclr(config: ModelConfig, image_size: int) -> SimCLRNet:
    """Encoder and projection head for pretraining."""
    encoder = build_encoder(config, image_size)
    return SimCLRNet(encoder, ProjectionHead(encoder.out_channels, config.head_layers, config.head_dim))


def build_classifier(
    config: ModelConfig,
    image_size: int,
    classes: int,
    layer: int = 0,
    init: Literal["zero", "normal"] = "zero",
) -> ClassifierNet:
    """A fresh classifier on head layer `layer` (0: the encoder): supervised networks (init "normal") and students."""
    net = build_simclr(config, image_size)
    head = net.head.truncated(layer)
    return ClassifierNet(net.encoder, head, Classifier(head.out_features, classes, init))


def classifier_from(pretrained: SimCLRNet, layer: int, classes: int) -> ClassifierNet:
    """Copies of `pretrained`'s encoder and first `layer` head layers, with a zero classifier, on the same device.

    layer: SimCLRv2's ft_proj_selector: 0 = encoder output, 1 = after the ReLU of the head's first layer.
    Raises ValueError where the head has fewer layers.
    """
    head = copy.deepcopy(pretrained.head.truncated(layer))
    classifier = Classifier(head.out_features, classes).to(next(pretrained.parameters()).device)
    return ClassifierNet(copy.deepcopy(pretrained.encoder), head, classifier)


def count_parameters(module: nn.Module) -> int:
    """Numbers in the module's parameters; buffers are not counted."""
    return sum(parameter.numel() for parameter in module.parameters())
