"""Damaged images: each is named once in the log and counted, and too many of them stop the run."""

from __future__ import annotations

import logging
import threading

import numpy as np
import numpy.typing as npt

from fastsimclr.loaders.decode import decode
from fastsimclr.loaders.source import DataError, Source

Pixels = npt.NDArray[np.uint8]

LOG = logging.getLogger("fastsimclr")


class Reader:
    """Reads and decodes the images of a source from any thread, and keeps the list of those it could not.

    bad: {id: reason}, as found so far. Raises DataError when more than max_bad_fraction of the images are damaged.
    """

    def __init__(self, source: Source, max_bad_fraction: float, max_pixels: int) -> None:
        self.source = source
        self.max_bad_fraction = max_bad_fraction
        self.max_pixels = max_pixels
        self.bad: dict[int, str] = {}
        self._lock = threading.Lock()

    def read(self, index: int) -> Pixels | None:
        """Image `index` as uint8 [H, W, 3], RGB; None where it is damaged or its file cannot be read."""
        if index in self.bad:
            return None
        try:
            data = self.source.read(index)
            if isinstance(data, bytes):
                return decode(data, self.source.describe(index), self.max_pixels)
            return data
        except (DataError, OSError) as error:
            self._add(index, str(error))
            return None

    def read_or_next(self, index: int) -> tuple[int, Pixels]:
        """(id, pixels) of image `index`, or of the next readable one where it is damaged; 0 follows the last."""
        for step in range(len(self.source)):
            stand_in = (index + step) % len(self.source)
            if (pixels := self.read(stand_in)) is not None:
                return stand_in, pixels
        raise self._too_many()

    def _too_many(self) -> DataError:
        return too_many_damaged(self.source.name, len(self.source), self.bad, self.max_bad_fraction)

    def _add(self, index: int, reason: str) -> None:
        with self._lock:
            if index in self.bad:
                return
            self.bad[index] = reason
            if len(self.bad) > self.max_bad_fraction * len(self.source):
                raise self._too_many()
        LOG.warning("damaged image %d of %s: %s", index, self.source.name, reason)


def too_many_damaged(name: str, n: int, bad: dict[int, str], max_bad_fraction: float) -> DataError:
    """The error for a source of n images of which more than the fraction are damaged. bad: {id: reason}."""
    first = "; ".join(reason for _, reason in sorted(bad.items())[:3])
    return DataError(
        f"{name}: at least {len(bad)} of {n} images are damaged, over data.max_bad_fraction={max_bad_fraction};"
        f" repair or remove them, or raise it. The first: {first}"
    )
