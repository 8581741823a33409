"""What many tests ask of the loaders: the usual policies, and a source held decoded."""

from collections.abc import Callable

import torch

from fastsimclr.loaders.backends.resident import ALONE, Resident, choose_placement
from fastsimclr.loaders.backends.sharded import Peers
from fastsimclr.loaders.crops import Semantics
from fastsimclr.loaders.data import DataConfig
from fastsimclr.loaders.draw import Policy
from fastsimclr.loaders.source import Source


def simclr(size: int, semantics: Semantics = "torchvision", strength: float = 1.0, blur: float = 0.5) -> Policy:
    """SimCLR's pretraining views. For CIFAR-10: simclr(32, strength=0.5, blur=0.0)."""
    return Policy(size=size, semantics=semantics, strength=strength, blur=blur)


def crop_flip(size: int, semantics: Semantics = "torchvision") -> Policy:
    """Random crop and flip only: fine-tuning, linear evaluation, distillation."""
    return Policy(size=size, semantics=semantics, jitter=0.0, grey=0.0, blur=0.0)


def evaluation(size: int, semantics: Semantics = "torchvision") -> Policy:
    """One fixed view: the centre crop, or the whole image where size is at most 32."""
    return Policy(size=size, semantics=semantics, crop="centre", flip=0.0, jitter=0.0, grey=0.0, blur=0.0)


def hold(
    source: Source,
    config: DataConfig,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    peers: Peers = ALONE,
) -> Resident | None:
    """`source` decoded on `device`, or None where `choose_placement` does not hold it."""
    return choose_placement(source, config, device, peers).fill(progress)
