"""The settings of the benches, each an option of `fastsimclr bench`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

TorchvisionArch = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
Dtype = Literal["fp32", "fp16", "bf16"]
LoaderSet = Literal["packed", "raw", "original"]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What every bench is set by. Raises ValueError where a number is not positive."""

    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""
    rounds: int = 3
    """Rounds that count; all variants take turns in each. One more before them is warm-up, reported apart."""
    seed: int = 0
    """Of weights, images, order and views."""
    smoke: bool = False
    """One short round at a tiny size, to see that everything runs."""
    json: str | None = None
    """File for the whole report, every raw time included."""

    def __post_init__(self) -> None:
        for key in ("batch", "steps", "rounds", "size", "images", "side", "dim", "views"):
            if getattr(self, key, 1) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be 1 or more")

    def at_smoke_size(self) -> Self:
        """The same settings at the size of --smoke."""
        if not self.smoke:
            return self
        tiny = {
            "batch": 8,
            "steps": 2,
            "rounds": 1,
            "size": 16,
            "images": 16,
            "side": 24,
            "workers": (0,),
            "micro": (4, 2),
        }
        tiny |= {"teacher": "resnet18", "ranks": (1, 2), "rows": 64, "dim": 16, "round_ms": 1.0, "width": 0.125}
        return replace(self, **{key: value for key, value in tiny.items() if hasattr(self, key)})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class TrainingBench(BenchConfig):
    """What the benches of batches are set by. Raises ValueError where a batch has no negatives or too few images."""

    batch: int = 128
    """Images a step."""
    steps: int = 8
    """Steps a round."""
    size: int = 32
    """Side of the views in pixels. Up to 32: CIFAR stem, half colour strength and no blur."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 2:
            raise ValueError(f"batch={self.batch} leaves no negatives; give 2 or more")


@dataclass(frozen=True, kw_only=True)
class LoaderBench(TrainingBench):
    """Images a second from files to memory: ours, FFCV, DALI, torch's DataLoader, and bare decoding."""

    rounds: int = 9
    """Passes that count; all variants take turns in each. One more before them is warm-up, reported apart."""
    steps: int = 64
    """Batches a pass."""
    size: int = 224
    """Side of the two crops in pixels, where crops are made."""
    root: str | None = None
    """Folder of images (root/train/CLASS, root/CLASS or flat). Default: JPEG files made for the bench."""
    images: int = 400
    """How many of its images to use, spread over all; a pass reads them again and again."""
    side: int = 256
    """Side in pixels of the JPEG files made where no root is given."""
    sets: tuple[LoaderSet, ...] = ("packed", "raw", "original")
    """packed: shrunk to short_side, JPEG of quality 90; raw: the same, decoded; original: the files as they are."""
    short_side: int = 256
    """Shorter side in pixels of the packed images; 0: as they are."""
    whole: bool = True
    """Also DataLoader with torchvision's whole views, which takes most of the time."""
    threads: int = 0
    """Decoding threads, and worker processes of DataLoader; 0: one for each core."""
    scratch: str | None = None
    """Folder for the packed files, some 4 GB at the defaults. Default: the system's temporary one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.short_side < 0 or self.threads < 0:
            raise ValueError(f"short_side={self.short_side} and threads={self.threads} must be 0 or more")
        if not self.sets:
            raise ValueError("sets=[] leaves nothing to measure; name packed, raw or original")


@dataclass(frozen=True, kw_only=True)
class EncoderBench(TrainingBench):
    """What the benches that train one encoder on files are set by."""

    arch: TorchvisionArch = "resnet18"
    """The encoder."""
    width: float = 1.0
    """Multiplies its channels."""
    root: str | None = None
    """Folder of images (root/train/CLASS, root/CLASS or flat). Default: JPEG files made for the bench."""
    images: int = 5000
    """How many of its images to use, spread over all."""
    side: int = 32
    """Side in pixels of the JPEG files made where no root is given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < self.batch:
            raise ValueError(f"images={self.images} is fewer than batch={self.batch}; raise --images")


@dataclass(frozen=True, kw_only=True)
class CurveBench(EncoderBench):
    """The loss over some hundred steps in the automatic precision beside float32, and what other seeds make of it."""

    batch: int = 64
    """Images a step."""
    steps: int = 200
    """Steps of each curve."""
    precision: Literal["auto", "bf16", "fp16"] = "auto"
    """Precision under test."""
    width: float = 0.5
    """Multiplies its channels."""
    lr: float = 1.0
    """Peak learning rate of LARS, after 20 steps of warm-up."""
    others: int = 2
    """Curves in float32 with other weights, order and views: the noise."""
    threads: int = 0
    """Decoding threads; 0: one for each core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.others < 1:
            raise ValueError(f"others={self.others} leaves no noise to compare with; give 1 or more")


@dataclass(frozen=True, kw_only=True)
class MicroBench(EncoderBench):
    """A contrastive step whole, in micro-batches (gradient caching) and with blocks computed again: time, memory."""

    batch: int = 256
    """Images a step."""
    steps: int = 20
    """Steps of training before gradients are compared."""
    micro: tuple[int, ...] = (128, 64, 32)
    """Images of a micro-batch, divisors of the batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.micro or any(micro < 1 or self.batch % micro for micro in self.micro):
            raise ValueError(f"micro={list(self.micro)} must be divisors of batch={self.batch}; give one or more")


@dataclass(frozen=True, kw_only=True)
class CallBench(BenchConfig):
    """What the benches of single calls are set by. Raises ValueError where a number is not positive."""

    round_ms: float = 200.0
    """Each variant is called again in its turn until that many milliseconds have passed, at least once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.round_ms > 0:
            raise ValueError(f"round_ms={self.round_ms} must be above 0; 200 is usual")


@dataclass(frozen=True, kw_only=True)
class LossBench(CallBench):
    """NT-Xent forward and backward: ours, plain torch in several forms, and lightly, with peak memory."""

    rows: int | tuple[int, ...] = 16384
    """M, the projections of both views of all images; several as [8192,16384,65536]."""
    dim: int = 128
    """Width of the projections."""
    temperature: float = 0.1
    """Temperature of the loss."""
    dtype: Dtype = "fp32"
    """Format in which the projections arrive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bad := [rows for rows in self.all_rows if rows < 4 or rows % 2]:
            raise ValueError(f"rows={bad[0]} is not an even number of 4 or more; give two rows an image")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; SimCLR uses .05 to 1")

    @property
    def all_rows(self) -> tuple[int, ...]:
        """`rows` as a tuple."""
        return (self.rows,) if isinstance(self.rows, int) else tuple(self.rows)


@dataclass(frozen=True, kw_only=True)
class ViewsBench(CallBench):
    """Views of decoded images held in memory: ours, torchvision and lightly, with each op's error."""

    policy: Literal["simclr", "cifar"] = "simclr"
    """simclr: full colour strength and blur. cifar: half colour strength, no blur."""
    size: int = 224
    """Side of the views in pixels."""
    side: int = 256
    """Side of the images in pixels, where no root is given."""
    root: str | None = None
    """Folder of images (root/train/CLASS, root/CLASS or flat), held decoded at their own sizes. Default: synthetic."""
    images: int = 64
    """Images a call."""
    views: int = 2
    """Views of each image."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Format of our views; auto: fp16 on CUDA, fp32 on a CPU. The others make float32."""
    dataset: int = 0
    """Also gather the images of a call from that many in memory, by random ids; 0: do not."""
    threads: int = 1
    """Threads of torch on a CPU. The others work image by image in one process: 1 compares core with core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads < 1:
            raise ValueError(f"threads={self.threads} must be 1 or more")
        if self.root is not None and self.dataset:
            raise ValueError(f"dataset={self.dataset} and root={self.root!r} exclude each other: it is synthetic")


@dataclass(frozen=True, kw_only=True)
class NormBench(CallBench):
    """BN, sum with the shortcut and ReLU at the shapes of ResNet-50, forward and backward: ours and torch's."""

    batch: int = 128
    """Views a call."""
    size: int = 224
    """Side of the views in pixels."""
    dtype: Dtype = "bf16"
    """Format of the maps; statistics and parameters are float32."""


@dataclass(frozen=True, kw_only=True)
class LarsBench(CallBench):
    """One LARS step over a network's parameters: ours, lightly, plain torch, and SGD for scale."""

    arch: TorchvisionArch = "resnet50"
    """Encoder whose parameters are stepped, with SimCLR v1's head."""
    width: float = 1.0
    """Multiplies its channels."""
    variant: Literal["google", "lightly"] = "google"
    """Formula of ours and of plain torch; lightly's LARS has its own."""
