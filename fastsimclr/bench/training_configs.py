"""The settings of the benches that train, each an option of `fastsimclr bench step`, `e2e` or `scaling`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from fastsimclr.bench.configs import TorchvisionArch, TrainingBench
from fastsimclr.loaders.data import LoaderName

TrainingStage = Literal["pretrain", "linear", "finetune", "distill"]
Mode = Literal["eager", "compile", "graph"]


@dataclass(frozen=True, kw_only=True)
class StageBench(TrainingBench):
    """What a training is set by. Raises ValueError for a plot that cannot be drawn."""

    stage: TrainingStage = "pretrain"
    """pretrain: NT-Xent of two views. linear, finetune: cross-entropy of one view, with and without a frozen encoder.
    distill: a teacher's class probabilities, of one view."""
    arch: TorchvisionArch = "resnet18"
    """The encoder, of the student in distill; at full width."""
    teacher: TorchvisionArch = "resnet50"
    """The teacher's encoder in distill, at full width."""
    plot: str | None = None
    """File for bars of images/s with their ranges and the distributions of step times (.png, .pdf or .svg)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plot is not None and Path(self.plot).suffix not in (".png", ".pdf", ".svg"):
            raise ValueError(f"plot={self.plot!r} is not a picture; give a file that ends in .png, .pdf or .svg")
        if self.plot is not None and find_spec("matplotlib") is None:
            raise ValueError(
                f'plot={self.plot!r} needs matplotlib, which is not installed; run: pip install "fastsimclr[bench]"'
            )

    @property
    def classes(self) -> int:
        """How many the classifiers tell apart: CIFAR's 10, ImageNet's 1000."""
        return 10 if self.size <= 32 else 1000


@dataclass(frozen=True, kw_only=True)
class StepBench(StageBench):
    """One training step on resident synthetic images, with its phases; the baseline's views are ready-made."""

    modes: tuple[Mode, ...] = ("eager",)
    """How ours runs in bf16: eager, compile (encoders by torch.compile), graph (a CUDA graph of forward and backward).
    Compiling and capturing come before the rounds, as prepared_s. float32 is eager, and left out without eager."""
    compiled_baseline: bool = False
    """Also the baseline's best setting under torch.compile, as a further candidate for its best."""
    profile: str | None = None
    """File for a Chrome trace by torch.profiler of one more round of the first row, which does not count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.modes:
            raise ValueError("modes=[] leaves nothing of ours to measure; name eager, compile or graph")


@dataclass(frozen=True, kw_only=True)
class E2eBench(StageBench):
    """Training from image files to the optimizer step: ours, and the usual way as documented and at its best."""

    root: str | None = None
    """Folder of images (root/train/CLASS, root/CLASS or flat). Default: JPEG files made for the bench."""
    images: int = 5000
    """How many of its images to use, spread over all."""
    side: int = 32
    """Side in pixels of the JPEG files made where no root is given."""
    threads: int = 0
    """Our decoding threads; 0: one for each core."""
    loaders: tuple[LoaderName, ...] = ("resident", "native")
    """Loaders that ours trains with, in the automatic precision; float32 trains with native."""
    workers: tuple[int, ...] = (0, 2)
    """Numbers of worker processes that the baseline tries once, over a whole round; it then keeps the fastest."""
    mode: Mode = "eager"
    """How ours runs in the automatic precision: as in `bench step --modes`."""
    profile: str | None = None
    """File for a Chrome trace by torch.profiler of one more round of the first row, which does not count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < self.batch:
            raise ValueError(f"images={self.images} is fewer than batch={self.batch}; raise --images")


@dataclass(frozen=True, kw_only=True)
class ScalingBench(StageBench):
    """The training step of several ranks on this machine beside that of one, and what their exchanges take."""

    batch: int = 128
    """Images a step of each rank: the global batch grows with the ranks."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of ranks to measure, one after the other. The efficiency is in terms of 1, so include it."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision."""
    mode: Mode = "eager"
    """As in `bench step --modes`."""
    bn_groups: Literal["global", "node", "rank"] = "node"
    """Which images share BN statistics, as trainer.bn_groups."""
    threads: int = 0
    """Threads of each rank on a CPU, the same for any number of ranks; 0: the cores over the most ranks, at least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ranks or min(self.ranks) < 1 or len(set(self.ranks)) < len(self.ranks):
            raise ValueError(f"ranks={list(self.ranks)} must be different numbers of 1 or more, as in [1,2,4]")
        if self.threads < 0:
            raise ValueError(f"threads={self.threads} must be 0 or more; 0 shares the cores")
