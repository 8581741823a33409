"""The settings of the benches, each an option of `fastsimclr bench`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What every bench is set by. Raises ValueError where a number is not positive."""

    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""
    batch: int = 128
    """Images a step."""
    steps: int = 8
    """Steps a round."""
    rounds: int = 3
    """Rounds that count; all variants take turns in each. One more before them is warm-up, reported apart."""
    size: int = 32
    """Side of the views in pixels. Up to 32: CIFAR stem, half colour strength and no blur."""
    seed: int = 0
    """Of weights, images, order and views."""
    smoke: bool = False
    """One round of two steps of 8 images at 16 px, to see that everything runs."""
    json: str | None = None
    """File for the whole report, every raw time included."""

    def __post_init__(self) -> None:
        for key in ("batch", "steps", "rounds", "size", "images", "side"):
            if getattr(self, key, 1) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be 1 or more")
        if self.batch < 2:
            raise ValueError(f"batch={self.batch} leaves no negatives; give 2 or more")
        if getattr(self, "images", self.batch) < self.batch:
            raise ValueError(f"images={getattr(self, 'images', 0)} is fewer than batch={self.batch}; raise --images")

    def at_smoke_size(self) -> Self:
        """The same settings at the size of --smoke."""
        if not self.smoke:
            return self
        tiny = {"batch": 8, "steps": 2, "rounds": 1, "size": 16, "images": 16, "side": 24, "workers": (0,)}
        return replace(self, **{key: value for key, value in tiny.items() if hasattr(self, key)})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class LoaderBench(BenchConfig):
    """Images a second from files to memory: ours, and torch's DataLoader with torchvision."""

    steps: int = 16
    """Batches a round."""
    size: int = 224
    """Side of the two crops in pixels, where crops are made."""
    root: str | None = None
    """Folder of images (root/train/CLASS, root/CLASS or flat). Default: JPEG files made for the bench."""
    images: int = 2048
    """How many of its images to use, spread over all."""
    side: int = 256
    """Side in pixels of the JPEG files made where no root is given."""
    threads: int = 0
    """Our decoding threads, and the baseline's worker processes; 0: one for each core."""


@dataclass(frozen=True, kw_only=True)
class StepBench(BenchConfig):
    """One pretraining step on resident synthetic images, with its phases; the baseline's views are ready-made."""

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet18"
    """The encoder, at full width."""


@dataclass(frozen=True, kw_only=True)
class E2eBench(BenchConfig):
    """Training from image files to the optimizer step: ours, and lightly as documented and at its best."""

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet18"
    """The encoder, at full width."""
    root: str | None = None
    """Folder of images (root/train/CLASS, root/CLASS or flat). Default: JPEG files made for the bench."""
    images: int = 5000
    """How many of its images to use, spread over all."""
    side: int = 32
    """Side in pixels of the JPEG files made where no root is given."""
    threads: int = 0
    """Our decoding threads; 0: one for each core."""
    workers: tuple[int, ...] = (0, 2)
    """Numbers of worker processes that the baseline tries once, over a whole round; it then keeps the fastest."""
