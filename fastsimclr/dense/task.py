"""What detection and segmentation share: their settings, what a task brings to the training, and its images."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastsimclr.dense.networks import Init, Norm
from fastsimclr.loaders import DataError
from fastsimclr.loaders.ahead import delayed
from fastsimclr.methods import Objective, Outcome
from fastsimclr.runtime.device import Runtime

T = TypeVar("T")
Item = tuple[Tensor, Any]
"""An image, float32 [3, H, W] in [0, 1], and what is to be learnt of it."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Which encoder, which images, and how to fine-tune. Raises ValueError where a value breaks its rule."""

    run: str
    """Run folder of a stage that trains, or a checkpoint in one."""
    images: str
    """Folder of the images."""
    out: str
    """Run folder: recipe.yaml, metrics.jsonl, checkpoints and result.json."""
    init: Init = "run"
    """run: the run's weights. random: the same architecture from scratch, the baseline to compare with; give both the
    same --norm then."""
    norm: Norm = "auto"
    """BatchNorm of the encoder. frozen: statistics, scale and shift stay. batch: trained. auto: frozen with --init run,
    batch with --init random, whose statistics mean nothing."""
    epochs: int = 12
    """Passes over the training images."""
    batch: int = 16
    """Images of a step."""
    lr: float = 0.02
    """Learning rate for 16 images; scaled by batch / 16 (arXiv 1706.02677)."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """Of SGD, on all parameters."""
    val_fraction: float = 0.1
    """Part of the images held out for validation, where no validation images are given."""
    seed: int = 0
    """Of the split, the order, the draws and the new layers' weights."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int = 2
    """Threads that read images."""
    checkpoint_steps: int = 500
    """Steps from one checkpoint to the next."""
    resume: Literal["never", "auto"] = "never"
    """auto: resume from the newest checkpoint in --out, if there is one."""

    def __post_init__(self) -> None:
        for key, least in (("epochs", 1), ("batch", 1), ("checkpoint_steps", 1), ("workers", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"--{key}={getattr(self, key)} must be {least} or more")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val_fraction={self.val_fraction} must lie between 0 and 1; use 0.1")
        if self.lr <= 0:
            raise ValueError(f"--lr={self.lr} must be above 0; use the default")


class Task(Objective):
    """A network with freshly drawn new layers, its training examples and its loss.

    last_loss: the loss of the last step, which checkpoints keep for result.json.
    """

    views = 1
    network: nn.Module
    examples: Sequence[Any]
    last_loss: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last_loss", torch.zeros(()))

    @abstractmethod
    def item(self, index: int, generator: torch.Generator) -> Item:
        """Training example `index`, with draws from `generator`."""

    @abstractmethod
    def loss(self, images: Sequence[Tensor], targets: Sequence[Any]) -> Tensor:
        """The loss of a batch on the device."""

    @abstractmethod
    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step as a part of the highest."""

    @abstractmethod
    def evaluate(self, device: torch.device, out: Path) -> dict[str, float]:
        """Metrics on the validation images; files beside them go to `out`."""

    @abstractmethod
    def data_summary(self) -> dict[str, Any]:
        """Counts of the data, for result.json."""

    def forward(self, images: Any, labels: Any) -> Outcome:
        """images: [3, H, W] each, of a batch. labels: their targets."""
        loss = self.loss(images, labels)
        self.last_loss.copy_(loss.detach())
        return Outcome(loss=loss, metrics={})


@dataclass(frozen=True, kw_only=True)
class Items:
    """The shipment of a batch: images that need no views, and their targets as labels, all on the device."""

    images: tuple[Tensor, ...]
    labels: tuple[Any, ...]
    ids: list[int]

    def render(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The images as they are."""
        return self.images


class Reader(AbstractContextManager["Reader"]):
    """The feed of a task: threads read the items of `steps` ahead. `waited_s`: seconds that next() waited for them.

    Order and draws depend on (seed, step) alone. The reader also seeds the global generator before each step, because
    torchvision's samplers of boxes draw from it.
    """

    def __init__(self, task: Task, config: FitConfig, steps: range, crops: None, runtime: Runtime) -> None:
        self.waited_s = 0.0
        self._task, self._config, self._steps, self._device = task, config, steps, runtime.device
        self._pool = ThreadPoolExecutor(config.workers)

    def __iter__(self) -> Iterator[Items]:
        batches_ahead = 1 + -(-self._config.workers // self._config.batch)
        for step, ids, reads in delayed(self._begun(), batches_ahead):
            yield self._ready(step, ids, reads)

    def _begun(self) -> Iterator[tuple[int, list[int], list[Future[Item]]]]:
        for step, ids in islice(enumerate(self._ids()), self._steps.start, self._steps.stop):
            yield step, ids, [self._pool.submit(self._item, step, index) for index in ids]

    def _ids(self) -> Iterator[list[int]]:
        """The indices of the examples of each step, from step 0 on."""
        n, batch = len(self._task.examples), self._config.batch
        for epoch in count():
            order = torch.randperm(n, generator=_generator(self._config.seed, epoch)).tolist()
            yield from (order[start : start + batch] for start in range(0, n - batch + 1, batch))

    def _item(self, step: int, index: int) -> Item:
        return self._task.item(index, _generator(self._config.seed, step, index))

    def _ready(self, step: int, ids: list[int], reads: list[Future[Item]]) -> Items:
        start = time.perf_counter()
        items = [read.result() for read in reads]
        self.waited_s += time.perf_counter() - start
        images, targets = zip(*tree_map(lambda tensor: tensor.to(self._device), items), strict=True)
        torch.manual_seed(_mixed(self._config.seed, step))
        return Items(images=images, labels=targets, ids=ids)

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def read_image(path: Path) -> Tensor:
    """float32 [3, H, W] in [0, 1], as stored: EXIF does not turn it. DataError naming a file that is no image."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); repair it or take it out") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def split(everything: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """(training, validation), at least one each, in the given order; the same for a seed."""
    count = min(len(everything) - 1, max(1, round(fraction * len(everything))))
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[: max(0, count)])
    return (
        [item for index, item in enumerate(everything) if index not in held],
        [item for index, item in enumerate(everything) if index in held],
    )


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(_mixed(*numbers))


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
