"""Strict decoding in front of backends that are less strict: what it refuses never reaches them.

Each image is decoded strictly at its first visit; of a source that says it is `verified` (a packed file with checksums)
it is only read. That it is sound, and its size, are kept as long as the source is, for every loader of it.
"""

# N images of a batch, V views, S side, n images of a source

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastsimclr.loaders.ahead import ahead
from fastsimclr.loaders.arrays import Ints, Pixels
from fastsimclr.loaders.backends.native import AHEAD, DecodeJob, chunks
from fastsimclr.loaders.batch import Batch
from fastsimclr.loaders.cut import Crops
from fastsimclr.loaders.decode import MAX_PIXELS, Encoded
from fastsimclr.loaders.draw import ViewParams
from fastsimclr.loaders.source import Source

Sizes = npt.NDArray[np.int32]


@dataclass(kw_only=True)
class Known:
    """What is known of the n images of a source, under one limit of pixels.

    sizes: int32 [n, 2], height and width, 0 where not yet visited. plain: bool [n], a JPEG that every decoder reads
    alike, or pixels.
    """

    max_pixels: int
    sizes: Sizes
    plain: npt.NDArray[np.bool_]


_KNOWN: WeakKeyDictionary[Source, Known] = WeakKeyDictionary()


def _known(source: Source, max_pixels: int) -> Known:
    known = _KNOWN.get(source)
    if known is None or known.max_pixels != max_pixels:
        sizes, plain = np.zeros((len(source), 2), dtype=np.int32), np.zeros(len(source), dtype=bool)
        known = _KNOWN[source] = Known(max_pixels=max_pixels, sizes=sizes, plain=plain)
    return known


@dataclass(frozen=True, kw_only=True)
class Screened:
    """A batch all of whose images strict decoding takes.

    epochs, ids: int64 [N]. owners: int64 [N], the id of the image that is shown. sizes: int32 [N, 2], its pixels.
    plain: bool [N], whether other decoders read it as ours does. data: N files or pixel arrays, empty if not asked for.
    """

    epochs: Ints
    ids: Ints
    owners: Ints
    sizes: Sizes
    plain: npt.NDArray[np.bool_]
    data: list[Encoded | Pixels]

    def draw(self, crops: Crops) -> ViewParams:
        """The parameters of its V·N views."""
        return crops.draw(self.epochs, self.ids, self.sizes)

    def batch(self, job: DecodeJob, cuts_VNSS3: Tensor, params: ViewParams) -> Batch:
        """The batch of finished crops (uint8 [V, N, S, S, 3], contiguous, on any device) with their parameters."""
        labels = job.source.labels[self.owners]
        ids, epochs, sizes = self.ids, self.epochs, self.sizes
        return Batch.of_crops(cuts_VNSS3, params, ids=ids, epochs=epochs, labels=labels, sizes=sizes, pin=job.pin)


def screened(job: DecodeJob, *, data: bool) -> Generator[Screened]:
    """The batches of job.plan(), looked at AHEAD of their use in threads that end with the generator.

    data: whether the files are wanted. Damaged images are replaced or left out; batches with nothing left are skipped.
    """
    pool = ThreadPoolExecutor(job.threads, thread_name_prefix="decode")
    screen = _Screen(job, data)
    with ahead(pool, (_Look(screen, pool, epochs, ids) for epochs, ids in job.plan()), AHEAD) as looks:
        for found in map(_Look.result, looks):
            if len(found.ids):
                yield found


def largest_batch(job: DecodeJob) -> int:
    """Images in the largest batch of job.plan(), which is its first; 0 where there is none."""
    return next((len(ids) for _, ids in job.plan()), 0)


class _Screen:
    """Looks at images, from any thread."""

    def __init__(self, job: DecodeJob, keep: bool) -> None:
        self.job, self.keep = job, keep
        self.known = _known(job.source, job.reader.max_pixels)
        self._verified = job.source.verified
        self._table = job.source.pixel_sizes

    def look(self, row: int, index: int) -> tuple[int, int, Encoded | Pixels | None] | None:
        """(row, id of the image to show, its data if wanted) for image `index`; None where it is to be left out."""
        n = len(self.job.source)
        for step in range(n if self.job.stand_in else 1):
            owner = (index + step) % n
            if (sound := self._open(owner)) is not None:
                return row, owner, sound[0]
        if self.job.stand_in:
            raise self.job.reader.damage.too_many()
        return None

    def _open(self, index: int) -> tuple[Encoded | Pixels | None] | None:
        """(its data if wanted,) of a sound image; None for a damaged one."""
        reader, known = self.job.reader, self.known
        if index in reader.damage:
            return None
        visited = known.sizes[index, 0] > 0
        if visited and not self.keep:
            return (None,)
        found = reader.open(index)
        if found is not None and not visited:
            size = found.size if self._table is None else self._table[index].tolist()
            header = found.header
            if header and not self._verified and reader.decode(index, found.data, size, None, header) is None:
                return None
            few = found.size[0] * found.size[1] <= MAX_PIXELS  # Pillow has a limit of its own
            known.plain[index] = header is None or (few and header.plain)
            known.sizes[index] = found.size
        return None if found is None else (found.data if self.keep else None,)


class _Look:
    """A batch that is being looked at."""

    def __init__(self, screen: _Screen, pool: ThreadPoolExecutor, epochs: Ints, ids: Ints) -> None:
        self._screen, self._epochs, self._ids = screen, epochs, ids
        self._tasks = chunks(pool, screen.job, len(ids), self._look)

    def _look(self, start: int, stop: int) -> list[tuple[int, int, Encoded | Pixels | None]]:
        looks = [self._screen.look(row, int(self._ids[row])) for row in range(start, stop)]
        return [look for look in looks if look is not None]

    def result(self) -> Screened:
        looks = [look for task in self._tasks for look in task.result()]
        rows = np.array([row for row, _, _ in looks], dtype=np.int64)
        owners = np.array([owner for _, owner, _ in looks], dtype=np.int64)
        return Screened(
            epochs=self._epochs[rows],
            ids=self._ids[rows],
            owners=owners,
            sizes=self._screen.known.sizes[owners],
            plain=self._screen.known.plain[owners],
            data=[data for _, _, data in looks if data is not None],
        )
