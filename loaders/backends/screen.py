"""Strict decoding in front of backends that are less strict: what it refuses never reaches them.

Each image is decoded strictly at its first visit; of a source that says it is `verified` (a packed file with checksums)
it is only read. The verdict and the size are kept as long as the source is, for every loader of it.
"""

# N images of a batch, V views, S side, n images of a source

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsimclr.loaders.backends.native import AHEAD, Ints, Job, Pixels, chunks
from fastsimclr.loaders.batch import Batch, Ragged
from fastsimclr.loaders.cut import Crops
from fastsimclr.loaders.decode import MAX_PIXELS, Encoded, is_plain_jpeg
from fastsimclr.loaders.draw import ViewParams
from fastsimclr.loaders.source import Source

Sizes = npt.NDArray[np.int32]


@dataclass(kw_only=True)
class Known:
    """What is known of the n images of a source, under one limit of pixels.

    sizes: int32 [n, 2], height and width, 0 where not yet visited. plain: bool [n], a JPEG that every decoder reads
    alike, or pixels. bad: {id: reason}.
    """

    max_pixels: int
    sizes: Sizes
    plain: npt.NDArray[np.bool_]
    bad: dict[int, str] = field(default_factory=dict)


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

    def batch(self, job: Job, cuts_VNSS3: Tensor, params: ViewParams) -> Batch:
        """The batch of finished crops (uint8 [V, N, S, S, 3], contiguous, on any device) with their parameters."""
        views, n, side = cuts_VNSS3.shape[:3]
        place = cuts_VNSS3.device
        sides = torch.full((views * n,), side, dtype=torch.int32, device=place)
        offsets = torch.arange(views * n, device=place) * (3 * side * side)
        images = Ragged(buffer=cuts_VNSS3.view(-1), offsets=offsets, heights=sides, widths=sides)
        return Batch(
            images=images.pinned() if job.pin and place.type == "cpu" else images,
            ids=torch.from_numpy(self.ids),
            epochs=torch.from_numpy(self.epochs),
            labels=torch.from_numpy(job.source.labels[self.owners]),
            sizes=torch.from_numpy(self.sizes),
            params=params,
        )


def screened(job: Job, *, data: bool) -> Generator[Screened]:
    """The batches of job.plan(), looked at AHEAD of their use in threads that end with the generator.

    data: whether the files are wanted. Damaged images are replaced or left out; batches with nothing left are skipped.
    """
    pool = ThreadPoolExecutor(job.threads, thread_name_prefix="decode")
    screen, looking = _Screen(job, data), deque[_Look]()
    try:
        for epochs, ids in job.plan():
            looking.append(_Look(screen, pool, epochs, ids))
            if len(looking) > AHEAD and len((found := looking.popleft().found()).ids):
                yield found
        while looking:
            if len((found := looking.popleft().found()).ids):
                yield found
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def largest_batch(job: Job) -> int:
    """Images in the largest batch of job.plan(), which is its first; 0 where there is none."""
    return next((len(ids) for _, ids in job.plan()), 0)


class _Screen:
    """Looks at images, from any thread."""

    def __init__(self, job: Job, keep: bool) -> None:
        self.job, self.keep = job, keep
        self.known = _known(job.source, job.reader.max_pixels)
        self._verified = bool(getattr(job.source, "verified", False))
        self._table: Sizes | None = getattr(job.source, "pixel_sizes", None)
        for index, reason in self.known.bad.items():
            job.reader.bad.setdefault(index, reason)

    def look(self, row: int, index: int) -> tuple[int, int, Encoded | Pixels | None] | None:
        """(row, id of the image to show, its data if wanted) for image `index`; None where it is to be left out."""
        n = len(self.job.source)
        for step in range(n if self.job.stand_in else 1):
            owner = (index + step) % n
            if (sound := self._open(owner)) is not None:
                return row, owner, sound[0]
        if self.job.stand_in:
            raise self.job.reader.too_many()
        return None

    def _open(self, index: int) -> tuple[Encoded | Pixels | None] | None:
        """(its data if wanted,) of a sound image; None for a damaged one."""
        reader, known = self.job.reader, self.known
        if index in reader.bad:
            return None
        visited = known.sizes[index, 0] > 0
        if visited and not self.keep:
            return (None,)
        found = reader.open(index)
        if found is not None and not visited:
            size = found.size if self._table is None else self._table[index].tolist()
            pixels = isinstance(found.data, np.ndarray)
            if not pixels and not self._verified and reader.decode(index, found.data, size) is None:
                found = None
            else:
                few = found.size[0] * found.size[1] <= MAX_PIXELS  # Pillow has a limit of its own
                known.plain[index] = isinstance(found.data, np.ndarray) or (few and is_plain_jpeg(found.data))
                known.sizes[index] = found.size
        if found is None:
            known.bad[index] = reader.bad[index]
            return None
        return (found.data if self.keep else None,)


class _Look:
    """A batch that is being looked at."""

    def __init__(self, screen: _Screen, pool: ThreadPoolExecutor, epochs: Ints, ids: Ints) -> None:
        self._screen, self._epochs, self._ids = screen, epochs, ids
        self._tasks = chunks(pool, screen.job, len(ids), self._look)

    def _look(self, start: int, stop: int) -> list[tuple[int, int, Encoded | Pixels | None]]:
        looks = [self._screen.look(row, int(self._ids[row])) for row in range(start, stop)]
        return [look for look in looks if look is not None]

    def found(self) -> Screened:
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
