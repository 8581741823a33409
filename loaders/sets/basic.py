"""Sources: files in a folder, arrays in memory, and parts of other sources; with the sets that come ready-made."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsimclr.loaders.arrays import Ints, Pixels
from fastsimclr.loaders.order import subset_blocks
from fastsimclr.loaders.philox import philox4x32
from fastsimclr.loaders.source import DataError, Source, digest
from fastsimclr.loaders.turbo import Spans

Sizes = npt.NDArray[np.int32]


def _frozen(values: npt.ArrayLike) -> Ints:
    array = np.array(values, dtype=np.int64)
    array.setflags(write=False)
    return array


class FileSource(Source):
    """n encoded files under `root`. names: paths relative to root, with forward slashes.

    sizes: int64 [n], bytes; they enter the fingerprint, so that a replaced file is noticed.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        names: Sequence[str],
        sizes: Sequence[int],
        labels: npt.ArrayLike,
        classes: Sequence[str],
    ) -> None:
        self.name = name
        self.root = root
        self.names = tuple(names)
        self.sizes = _frozen(sizes)
        self.labels = _frozen(labels)
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def fingerprint(self) -> str:
        texts = ("\0".join(self.names).encode(), "\0".join(self.classes).encode())
        return digest(*texts, self.sizes.tobytes(), self.labels.tobytes())

    def read(self, index: int) -> bytes:
        """The file's bytes. Raises OSError."""
        return (self.root / self.names[index]).read_bytes()

    def describe(self, index: int) -> str:
        return str(self.root / self.names[index])


class ArraySource(Source):
    """n decoded images in memory: pixels uint8 [n, H, W, 3], of any strides."""

    def __init__(self, name: str, pixels: Pixels, labels: npt.ArrayLike, classes: Sequence[str]) -> None:
        self.name = name
        self.pixels = pixels
        self.labels = _frozen(labels)
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.pixels)

    @cached_property
    def fingerprint(self) -> str:
        # Some 64 images stand for all: hashing three gigabytes would hold up each start.
        some = self.pixels[:: max(1, len(self) // 64)].tobytes()
        shape = repr((self.name, self.pixels.shape)).encode()
        return digest(shape, "\0".join(self.classes).encode(), self.labels.tobytes(), some)

    def read(self, index: int) -> Pixels:
        return np.ascontiguousarray(self.pixels[index])

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"


class SyntheticSource(Source):
    """n square images of noise with labels 0..k-1 in turn, for benches: costs no decoding."""

    def __init__(self, n: int, size: int, classes: int) -> None:
        self.name = "synthetic"
        self.size = size
        self.labels = _frozen(np.arange(n) % classes)
        self.classes = tuple(str(label) for label in range(classes))
        # An image is a window into one strip of noise, so that making it costs nothing and no two are alike.
        words = -(-(3 * size * size + 16 * n) // 16)
        counter = np.zeros((words, 4), dtype=np.uint32)
        counter[:, 0] = np.arange(words, dtype=np.uint32)
        self._noise = philox4x32(counter, (size, classes)).view(np.uint8).reshape(-1)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        return digest(repr((self.name, len(self), self.size, len(self.classes))).encode())

    def read(self, index: int) -> Pixels:
        start = 16 * index
        return self._noise[start : start + 3 * self.size * self.size].reshape(self.size, self.size, 3)

    def describe(self, index: int) -> str:
        return f"synthetic[{index}]"


class _Derived(Source):
    """Images of another source, `base`; all of them, unless `_in_base` gives others their numbers there."""

    base: Source

    def __len__(self) -> int:
        return len(self.base)

    def _in_base(self, ids: npt.ArrayLike) -> Ints:
        return np.asarray(ids, dtype=np.int64)

    @cached_property
    def pixel_sizes(self) -> Sizes | None:
        return self.base.pixel_sizes

    @cached_property
    def blocks(self) -> Ints | None:
        return self.base.blocks

    @cached_property
    def verified(self) -> bool:
        return self.base.verified

    @cached_property
    def whole_fits(self) -> bool:
        return self.base.whole_fits

    def read(self, index: int) -> bytes | Pixels:
        return self.base.read(int(self._in_base(index)))

    def describe(self, index: int) -> str:
        return self.base.describe(int(self._in_base(index)))

    def expect(self, ids: npt.ArrayLike) -> None:
        self.base.expect(self._in_base(ids))

    def borrow(self, index: int) -> bytes | memoryview | Pixels:
        return self.base.borrow(int(self._in_base(index)))

    def spans(self, ids: npt.ArrayLike) -> Spans | None:
        return self.base.spans(self._in_base(ids))

    def mapped(self, ids: npt.ArrayLike) -> tuple[Pixels, Ints] | None:
        return self.base.mapped(self._in_base(ids))


class Subset(_Derived):
    """The images of `source` at `indices` (int64 [n]), in that order."""

    def __init__(self, source: Source, indices: npt.ArrayLike, name: str | None = None) -> None:
        chosen = _frozen(indices)
        self.base: Source = source.base if isinstance(source, Subset) else source
        self.indices: Ints = _frozen(source.indices[chosen]) if isinstance(source, Subset) else chosen
        self.name = name or source.name
        self.classes = self.base.classes
        self.labels = _frozen(self.base.labels[self.indices])

    def __len__(self) -> int:
        return len(self.indices)

    def _in_base(self, ids: npt.ArrayLike) -> Ints:
        return self.indices[super()._in_base(ids)]

    @cached_property
    def fingerprint(self) -> str:
        return digest(self.base.fingerprint.encode(), self.indices.tobytes())

    @cached_property
    def pixel_sizes(self) -> Sizes | None:
        return None if self.base.pixel_sizes is None else self.base.pixel_sizes[self.indices]

    @cached_property
    def blocks(self) -> Ints | None:
        """The bounds of the base's blocks among these images, where they are in its order."""
        return None if self.base.blocks is None else subset_blocks(self.base.blocks, self.indices)


class Relabelled(_Derived):
    """The images of `source` with other labels, int64 [n], -1 for none."""

    def __init__(self, source: Source, labels: npt.ArrayLike) -> None:
        self.base = source
        self.name = source.name
        self.classes = source.classes
        self.labels = _frozen(labels)

    @cached_property
    def fingerprint(self) -> str:
        return digest(self.base.fingerprint.encode(), self.labels.tobytes())


def digits() -> ArraySource:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, in 10 classes; grey as RGB, 0..16 scaled to 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("data.source=digits needs scikit-learn; run: pip install scikit-learn") from error
    images, labels = load_digits(return_X_y=True)
    grey = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return ArraySource("digits", np.repeat(grey[..., None], 3, axis=3), labels, [str(digit) for digit in range(10)])


# What to put in the folder where there is no network; torchvision unpacks the archive when download is on.
ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz", "stl10": "stl10_binary.tar.gz"}


def torchvision_set(name: str, split: str, root: Path, download: bool) -> ArraySource:
    """cifar10 or cifar100 (split train, test) or stl10 (train, test, train+unlabeled) as an array in memory.

    Raises DataError naming the folder and the archive where the files are not there and cannot be fetched.
    """
    from torchvision import datasets

    makers: dict[str, Any] = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}
    which = {"split": split} if name == "stl10" else {"train": split == "train"}
    try:
        data = makers[name](str(root), download=download, **which)
    except (RuntimeError, OSError) as error:
        how = f"put {ARCHIVES[name]} there" + (" (the download failed)" if download else " and set data.download=true")
        raise DataError(f"data.source={name}: no usable files in {root.absolute()}: {how}: {error}") from error
    pixels = data.data.transpose(0, 2, 3, 1) if name == "stl10" else data.data
    return ArraySource(f"{name}:{split}", pixels, data.labels if name == "stl10" else data.targets, data.classes)
