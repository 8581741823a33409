"""Damaged images: each is named once in the log and counted, and too many of them stop the run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastsimclr.loaders.decode import Encoded, decode, image_size
from fastsimclr.loaders.scratch import Scratch
from fastsimclr.loaders.shards.remote import FetchError
from fastsimclr.loaders.source import DataError, Source, borrower

Pixels = npt.NDArray[np.uint8]

LOG = logging.getLogger("fastsimclr")
_IMAGE = Scratch()


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An image found readable so far: its id, its data (a file's bytes, or pixels), its height and width."""

    index: int
    data: Encoded | Pixels
    size: tuple[int, int]


class Reader:
    """Reads and decodes the images of a source from any thread, and keeps the list of those it could not.

    bad: {id: reason}, as found so far. Raises DataError when more than max_bad_fraction of the images are damaged,
    FetchError as the source does, and RuntimeError, naming the image, for what is no damage (memory, a defect).
    """

    def __init__(self, source: Source, max_bad_fraction: float, max_pixels: int) -> None:
        self.source = source
        self.max_bad_fraction = max_bad_fraction
        self.max_pixels = max_pixels
        self.bad: dict[int, str] = {}
        self._lock = threading.Lock()
        self._borrow = borrower(source)

    def open(self, index: int) -> Opened | None:
        """The data of image `index` and its size, from the header alone; None where it is known to be damaged."""
        if index in self.bad:
            return None
        try:
            data = self.source.read(index)
            if isinstance(data, np.ndarray):
                return Opened(index=index, data=data, size=(data.shape[0], data.shape[1]))
            return Opened(index=index, data=data, size=image_size(data, self.source.describe(index), self.max_pixels))
        except (DataError, OSError) as error:
            self._add(index, str(error))
            return None
        except FetchError:
            raise
        except Exception as error:
            raise unexpected(self.source.describe(index), error) from error

    def open_next(self, index: int) -> Opened:
        """`open` of image `index`, or of the next one that can be opened; 0 follows the last."""
        for step in range(len(self.source)):
            if (found := self.open((index + step) % len(self.source))) is not None:
                return found
        raise self.too_many()

    def decode(
        self, index: int, data: Encoded | Pixels | None, size: Sequence[int], out: Pixels | None = None
    ) -> Pixels | None:
        """Image `index`, of `size` by its header, decoded into `out` (uint8, flat); None where it is damaged.

        data: what `open` found; read here where None. The result is uint8 [H, W, 3], RGB, at the head of `out`. Without
        `out` it is for reading only, and for this thread until its next call.
        """
        try:
            data = self._borrow(index) if data is None else data
            if isinstance(data, np.ndarray):
                if out is None:
                    return data
                room = out[: data.size].reshape(data.shape)
                room[:] = data
                return room
            what = self.source.describe(index)
            pixels = decode(data, what, self.max_pixels, _IMAGE.take(3 * size[0] * size[1]) if out is None else out)
            if pixels.shape[:2] != tuple(size):
                raise DataError(
                    f"{what} has {pixels.shape[:2]} pixels, {tuple(size)} by its header or table; pack it anew"
                )
            return pixels
        except (DataError, OSError) as error:
            self._add(index, str(error))
            return None
        except FetchError:
            raise
        except Exception as error:
            raise unexpected(self.source.describe(index), error) from error

    def read(self, index: int) -> Pixels | None:
        """Image `index` as uint8 [H, W, 3], RGB; None where it is damaged or its file cannot be read."""
        found = self.open(index)
        if found is None:
            return None
        out = np.empty(3 * found.size[0] * found.size[1], dtype=np.uint8)
        return self.decode(index, found.data, found.size, out)

    def read_next(self, index: int) -> tuple[int, Pixels]:
        """(id, pixels) of image `index`, or of the next readable one where it is damaged; 0 follows the last."""
        for step in range(len(self.source)):
            stand_in = (index + step) % len(self.source)
            if (pixels := self.read(stand_in)) is not None:
                return stand_in, pixels
        raise self.too_many()

    def too_many(self) -> DataError:
        """The error for too many damaged images, of which there may be none left to stand in."""
        return too_many_damaged(self.source.name, len(self.source), self.bad, self.max_bad_fraction)

    def _add(self, index: int, reason: str) -> None:
        with self._lock:
            if index in self.bad:
                return
            self.bad[index] = reason
            if len(self.bad) > self.max_bad_fraction * len(self.source):
                raise self.too_many()
        LOG.warning("damaged image %d of %s: %s", index, self.source.name, reason)


def unexpected(what: str, error: Exception) -> RuntimeError:
    """The error for image `what`, on which a thread failed with one that no damage explains."""
    short = isinstance(error, MemoryError)
    remedy = "free memory, or lower the number of threads" if short else "--traceback shows where; please report it"
    cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return RuntimeError(f"{what} could not be read or decoded, and no damage explains it ({cause}); {remedy}")


def too_many_damaged(name: str, n: int, bad: dict[int, str], max_bad_fraction: float) -> DataError:
    """The error for a source of n images of which more than the fraction are damaged. bad: {id: reason}."""
    first = "; ".join(reason for _, reason in sorted(bad.items())[:3])
    return DataError(
        f"{name}: at least {len(bad)} of {n} images are damaged, over data.max_bad_fraction={max_bad_fraction};"
        f" repair or remove them, or raise it. The first: {first}"
    )
