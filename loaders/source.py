"""Where images come from: the interface that folders, published sets and embedded data share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fastsimclr.loaders.turbo import Spans

Ints = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


class DataError(ValueError):
    """Bad input data. The message names the file or key, the value, the rule and the remedy."""


class Source(Protocol):
    """n images with optional labels, read one at a time from any thread.

    name: for people, e.g. "cifar10:train". classes: class names, () where nothing is labelled.
    labels: int64 [n], an index into classes, -1 where the image has no label.
    fingerprint: hex digest that changes when the list of images or labels changes; a checkpoint carries it.

    A source may know more, which is used where it is there. pixel_sizes: int32 [n, 2], height and width. verified:
    every image is known to decode. blocks: int64 [b + 1], the first id of each run of images that lie together, and n,
    for a quasi-random order. whole_fits: false where not all blocks can be at hand at once. expect(ids): what is next.
    borrow(index): `read` into memory of the calling thread's own, which its next call overwrites. spans(ids): where
    in an open file the JPEGs `ids` lie (fastsimclr.loaders.turbo). mapped(ids): the memory that holds them decoded.
    """

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def labels(self) -> npt.NDArray[np.int64]: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes | npt.NDArray[np.uint8]:
        """The encoded file (bytes), or decoded RGB pixels as uint8 [H, W, 3]."""
        ...

    def describe(self, index: int) -> str:
        """What an error message calls the image: its path, or e.g. "digits[12]"."""
        ...


def spans(source: Source, ids: Ints) -> Spans | None:
    """`source.spans(ids)` where the source has it, else None."""
    found: Callable[[Ints], Spans | None] = getattr(source, "spans", _unknown)
    return found(ids)


def mapped(source: Source, ids: Ints) -> tuple[Pixels, Ints] | None:
    """`source.mapped(ids)`, the memory and where in it each image begins, where the source has it, else None."""
    found: Callable[[Ints], tuple[Pixels, Ints] | None] = getattr(source, "mapped", _unknown)
    return found(ids)


def borrower(source: Source) -> Callable[[int], bytes | memoryview | Pixels]:
    """`source.borrow` where the source has it, else `source.read`."""
    found: Callable[[int], bytes | memoryview | Pixels] = getattr(source, "borrow", source.read)
    return found


def _unknown(ids: Ints) -> None:
    return None


def digest(*parts: bytes) -> str:
    """SHA-256 of the parts in hex, each with its length before it, so that no other cut of them has the same."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()
