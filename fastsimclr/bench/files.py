"""The images of a bench: a folder of files, or JPEG files made for it, and how a baseline reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import default_loader

from fastsimclr.loaders import DataConfig, DataError, Source, Subset, open_data
from fastsimclr.runtime.device import Runtime


def open_files(root: str | None, images: int, side: int, seed: int, scratch: Path) -> tuple[Source, str]:
    """`images` files spread over the training images below `root`, and what they are in words.

    Without root: JPEG files of `side` x `side` px and quality 75, smooth noise, written to `scratch`.
    DataError where the folder has fewer.
    """
    what = f"{images} JPEG files of smooth noise, {side} px" if root is None else f"{images} files of {Path(root).name}"
    if root is None:
        root = str(scratch / "images")
        _write_jpegs(Path(root), images, side, seed)
    source = open_data(DataConfig(source="folder", root=root)).unlabelled
    if len(source) < images:
        raise DataError(f"{root} has {len(source)} training images, images={images} asks for more; lower --images")
    return Subset(source, np.linspace(0, len(source) - 1, images).astype(np.int64)), what


def _write_jpegs(folder: Path, images: int, side: int, seed: int) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for index in range(images):
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        pixels = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        pixels.save(folder / f"{index:06d}.jpg", quality=75)


class Files(torch.utils.data.Dataset[Any]):
    """The files of a source for a torch DataLoader: what torchvision's ImageFolder does, without the labels."""

    def __init__(self, source: Source, transform: Callable[[Any], Any], read: Callable[[str], Any] = default_loader):
        self._paths = [source.describe(index) for index in range(len(source))]
        self._transform, self._read = transform, read

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        return self._transform(self._read(self._paths[index]))


class LabelledFiles(Files):
    """The same with the labels of the source, (image, label)."""

    def __init__(self, source: Source, transform: Callable[[Any], Any]) -> None:
        super().__init__(source, transform)
        self._labels: list[int] = source.labels.tolist()

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index), self._labels[index]


def data_loader(
    dataset: Files, batch: int, steps: int, workers: int, runtime: Runtime, *, persistent: bool = True
) -> torch.utils.data.DataLoader[Any]:
    """torch's DataLoader in random order, `steps` whole batches a pass; persistent: workers live on between passes."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=batch,
        sampler=torch.utils.data.RandomSampler(dataset, num_samples=batch * steps),
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        pin_memory=runtime.pins,
    )
