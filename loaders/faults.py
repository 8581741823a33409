"""Damaged images: each is named once in the log and counted, and too many of them stop the run."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastsimclr.loaders.arrays import Pixels
from fastsimclr.loaders.decode import Encoded, Header, decode, read_header
from fastsimclr.loaders.log import LOG
from fastsimclr.loaders.scratch import Scratch
from fastsimclr.loaders.shards.remote import FetchError
from fastsimclr.loaders.source import DataError, Source

_IMAGE = Scratch()


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An image found readable so far: its id, its data (a file's bytes, or pixels), its height and width.

    header: that of a file; None of pixels.
    """

    index: int
    data: Encoded | Pixels
    size: tuple[int, int]
    header: Header | None = None


class Damage:
    """The damaged images among the n of a source, as any thread finds them: each is named once in the log.

    bad: {id: reason}. DataError where they are more than max_bad_fraction of the images.
    """

    def __init__(self, name: str, n: int, max_bad_fraction: float) -> None:
        self.name, self.n, self.max_bad_fraction = name, n, max_bad_fraction
        self.bad: dict[int, str] = {}
        self._lock = threading.Lock()

    def __contains__(self, index: int) -> bool:
        return index in self.bad

    def add(self, index: int, reason: str) -> None:
        """Note image `index`."""
        with self._lock:
            if index in self.bad:
                return
            self.bad[index] = reason
            self._check()
        LOG.warning("damaged image %d of %s: %s", index, self.name, reason)

    def merge(self, *others: dict[int, str]) -> None:
        """Note what other ranks have found, which is in their logs."""
        with self._lock:
            for bad in others:
                self.bad.update(bad)
            self._check()

    def too_many(self) -> DataError:
        """The error for too many damaged images, of which there may be none left to stand in."""
        first = "; ".join(reason for _, reason in sorted(self.bad.items())[:3])
        return DataError(
            f"{self.name}: at least {len(self.bad)} of {self.n} images are damaged, over"
            f" data.max_bad_fraction={self.max_bad_fraction}; repair or remove them, or raise it. The first: {first}"
        )

    def _check(self) -> None:
        if len(self.bad) > self.max_bad_fraction * self.n:
            raise self.too_many()


class Reader:
    """Reads and decodes the images of a source from any thread, and adds those it cannot to `damage`.

    Raises DataError when too many images are damaged, FetchError as the source does, and RuntimeError, naming the
    image, for what is no damage (memory, a defect).
    """

    def __init__(self, source: Source, damage: Damage, max_pixels: int) -> None:
        self.source = source
        self.damage = damage
        self.max_pixels = max_pixels

    def open(self, index: int) -> Opened | None:
        """The data of image `index` and its size, from the header alone; None where it is known to be damaged."""
        if index in self.damage:
            return None
        try:
            data = self.source.read(index)
            if isinstance(data, np.ndarray):
                return Opened(index=index, data=data, size=(data.shape[0], data.shape[1]))
            header = read_header(data, self.source.describe(index), self.max_pixels)
            return Opened(index=index, data=data, size=header.size, header=header)
        except Exception as error:
            self._note(index, error)
            return None

    def _note(self, index: int, error: Exception) -> None:
        """Add image `index` to `damage` for a DataError or OSError; raise others, all but a fetch's by name."""
        if isinstance(error, DataError | OSError):
            self.damage.add(index, str(error))
        elif isinstance(error, FetchError):
            raise error
        else:
            raise unexpected(self.source.describe(index), error) from error

    def open_next(self, index: int) -> Opened:
        """`open` of image `index`, or of the next one that can be opened; 0 follows the last."""
        for step in range(len(self.source)):
            if (found := self.open((index + step) % len(self.source))) is not None:
                return found
        raise self.damage.too_many()

    def decode(
        self,
        index: int,
        data: Encoded | Pixels | None,
        size: Sequence[int],
        out: Pixels | None = None,
        header: Header | None = None,
    ) -> Pixels | None:
        """Image `index`, of `size` by its header, decoded into `out` (uint8, flat); None where it is damaged.

        data, header: what `open` found; read here where None. The result is uint8 [H, W, 3], RGB, at the head of `out`.
        Without `out` it is for reading only, and for this thread until its next call.
        """
        try:
            data = self.source.borrow(index) if data is None else data
            if isinstance(data, np.ndarray):
                if out is None:
                    return data
                room = out[: data.size].reshape(data.shape)
                room[:] = data
                return room
            what = self.source.describe(index)
            room = _IMAGE.take(3 * size[0] * size[1]) if out is None else out
            pixels = decode(data, what, self.max_pixels, room, header)
            if pixels.shape[:2] != tuple(size):
                raise DataError(
                    f"{what} has {pixels.shape[:2]} pixels, {tuple(size)} by its header or table; pack it anew"
                )
            return pixels
        except Exception as error:
            self._note(index, error)
            return None

    def read(self, index: int) -> Pixels | None:
        """Image `index` as uint8 [H, W, 3], RGB; None where it is damaged or its file cannot be read."""
        found = self.open(index)
        if found is None:
            return None
        out = np.empty(3 * found.size[0] * found.size[1], dtype=np.uint8)
        return self.decode(index, found.data, found.size, out, found.header)

    def read_next(self, index: int) -> tuple[int, Pixels]:
        """(id, pixels) of image `index`, or of the next readable one where it is damaged; 0 follows the last."""
        for step in range(len(self.source)):
            stand_in = (index + step) % len(self.source)
            if (pixels := self.read(stand_in)) is not None:
                return stand_in, pixels
        raise self.damage.too_many()


def unexpected(name: str, error: Exception) -> RuntimeError:
    """The error for image `name`, on which a thread failed with one that no damage explains."""
    short = isinstance(error, MemoryError)
    remedy = "free memory, or lower the number of threads" if short else "--traceback shows where; please report it"
    cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return RuntimeError(f"{name} could not be read or decoded, and no damage explains it ({cause}); {remedy}")
