"""Where images come from: the interface that folders, published sets and embedded data share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fastsimclr.loaders.arrays import Ints, Pixels
from fastsimclr.loaders.turbo import Spans

Sizes = npt.NDArray[np.int32]


class DataError(ValueError):
    """Bad input data. The message names the file or key, the value, the rule and the remedy."""


class Source(ABC):
    """n images with optional labels, read one at a time from any thread.

    name: for people, e.g. "cifar10:train". classes: class names, () where nothing is labelled.
    labels: int64 [n], an index into classes, -1 where the image has no label.
    A source overrides, or sets in its constructor, what it knows beyond these; here stands what holds for the others.
    """

    name: str
    classes: tuple[str, ...]
    labels: Ints

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> bytes | Pixels:
        """The encoded file (bytes), or decoded RGB pixels as uint8 [H, W, 3]."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """What an error message calls the image: its path, or e.g. "digits[12]"."""

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest that changes when the list of images or labels changes; a checkpoint carries it."""
        raise NotImplementedError(f"{type(self).__name__} has no fingerprint; give it one")

    @cached_property
    def pixel_sizes(self) -> Sizes | None:
        """int32 [n, 2], height and width of each image, where they are known without a read."""
        return None

    @cached_property
    def blocks(self) -> Ints | None:
        """int64 [b + 1], the first id of each run of images that lie together, and n: for a quasi-random order."""
        return None

    @cached_property
    def verified(self) -> bool:
        """Whether every image is known to decode."""
        return False

    @cached_property
    def whole_fits(self) -> bool:
        """Whether all blocks can be at hand at once."""
        return True

    def expect(self, ids: npt.ArrayLike) -> None:
        """Learn which images come next, to fetch them ahead."""
        return

    def borrow(self, index: int) -> bytes | memoryview | Pixels:
        """`read`, but perhaps into memory of the calling thread, which its next call overwrites."""
        return self.read(index)

    def spans(self, ids: npt.ArrayLike) -> Spans | None:
        """Where in an open file the JPEGs `ids` lie (fastsimclr.loaders.turbo), where they do."""
        return None

    def mapped(self, ids: npt.ArrayLike) -> tuple[Pixels, Ints] | None:
        """The memory that holds all of the images `ids` decoded, uint8, flat, and where each begins, if any."""
        return None


def digest(*fields: bytes) -> str:
    """SHA-256 of the parts in hex, each with its length before it, so that no other cut of them has the same."""
    whole = hashlib.sha256()
    for part in fields:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()
