"""The native backend: threads that read and decode, straight into the batch, one decode for all views of an image."""

# N images of a batch, V views, S side

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsimclr.loaders import turbo
from fastsimclr.loaders.ahead import ahead, delayed
from fastsimclr.loaders.arrays import Ints, Pixels
from fastsimclr.loaders.batch import Batch, Ragged, offsets_of
from fastsimclr.loaders.compiled import COMPILED
from fastsimclr.loaders.cut import Crops, copy_many, cut, cut_many
from fastsimclr.loaders.data import DataConfig
from fastsimclr.loaders.decode import Encoded, Header
from fastsimclr.loaders.faults import Reader
from fastsimclr.loaders.source import Source

T = TypeVar("T")

AHEAD = 3  # batches being decoded while one is in use
CHUNK = 32  # most images decoded by one task


class DecodeJob(Protocol):
    """What a backend reads of a loader: fastsimclr.loaders.loader.Loader."""

    source: Source
    reader: Reader
    crops: Crops | None
    threads: int
    pin: bool
    stand_in: bool
    rank: int
    world: int
    config: DataConfig

    def plan(self, rank: int | None = None) -> Iterator[tuple[Ints, Ints]]: ...


class Buffers:
    """Memory of batches that are no longer in use, for those to come: fresh pages would cost a fifth of a decode."""

    def __init__(self) -> None:
        self._free: deque[Pixels] = deque(maxlen=AHEAD + 1)

    def take(self, count: int, pin: bool) -> Tensor:
        """uint8 [count], uninitialised; reused once nothing holds the tensor or a view of it."""
        if pin:
            return torch.empty(count, dtype=torch.uint8, pin_memory=True)  # torch keeps pinned memory itself
        memory = self._free.popleft() if self._free else np.empty(0, dtype=np.uint8)
        if len(memory) < count:
            memory = np.empty(count + count // 8, dtype=np.uint8)
        lent = memory[:count]
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)


@dataclass(frozen=True, kw_only=True)
class Head:
    """A readable image before its decoding: its row in the batch, its id, its height and width.

    data, header: as in Opened, where it is read already.
    """

    row: int
    owner: int
    size: tuple[int, int]
    data: Encoded | Pixels | None = None
    header: Header | None = None


def native_batches(job: DecodeJob) -> Generator[Batch]:
    """The batches of job.plan(), AHEAD of them in the making; threads end with the generator."""
    pool = ThreadPoolExecutor(job.threads, thread_name_prefix="decode")
    buffers = Buffers()
    opening = delayed((_Opening(job, pool, buffers, epochs, ids) for epochs, ids in job.plan()), 1)
    with ahead(pool, map(_Decoding, opening), AHEAD) as decodings:
        for batch in map(_Decoding.finish, decodings):  # no name for a decoding: it would hold its memory
            if len(batch):
                yield batch


def chunks(
    pool: ThreadPoolExecutor, job: DecodeJob, n: int, task: Callable[[int, int], list[T]]
) -> list[Future[list[T]]]:
    """`task(start, stop)` for the rows 0 .. n - 1 in runs of CHUNK at most, begun in the pool."""
    size = max(1, min(CHUNK, -(-n // job.threads)))
    return [pool.submit(task, start, min(start + size, n)) for start in range(0, n, size)]


class _Opening:
    """A batch whose images' sizes are being found out: they decide where each lies and where its crops are."""

    def __init__(self, job: DecodeJob, pool: ThreadPoolExecutor, buffers: Buffers, epochs: Ints, ids: Ints) -> None:
        self.job, self.pool, self.buffers, self.epochs, self.ids = job, pool, buffers, epochs, ids
        self._sizes = job.source.pixel_sizes
        self._tasks = [] if self._sizes is not None else chunks(pool, job, len(ids), self._open)

    def heads(self) -> list[Head]:
        """One for each row; in evaluation none for a row whose image is damaged."""
        if self._sizes is None:
            return [head for task in self._tasks for head in task.result()]
        heads, damage = list[Head](), self.job.reader.damage
        for row, (owner, (height, width)) in enumerate(
            zip(self.ids.tolist(), self._sizes[self.ids].tolist(), strict=True)
        ):
            if owner in damage:  # another stands in, or the row falls away
                heads += self._open(row, row + 1)
            else:
                heads.append(Head(row=row, owner=owner, size=(height, width)))
        return heads

    def _open(self, start: int, stop: int) -> list[Head]:
        heads = []
        for row in range(start, stop):
            owner = int(self.ids[row])
            found = self.job.reader.open_next(owner) if self.job.stand_in else self.job.reader.open(owner)
            if found is not None:
                heads.append(Head(row=row, owner=found.index, size=found.size, data=found.data, header=found.header))
        return heads


class _Decoding:
    """A batch that is being decoded into its place."""

    def __init__(self, opening: _Opening) -> None:
        self._job, self._heads = opening.job, opening.heads()
        rows = [head.row for head in self._heads]
        self._epochs, self._ids = opening.epochs[rows], opening.ids[rows]
        self._owners = np.array([head.owner for head in self._heads], dtype=np.int64)
        self._sizes = np.array([head.size for head in self._heads], dtype=np.int32).reshape(-1, 2)
        n, self._params, self._starts = len(rows), None, [0] * (len(rows) + 1)
        if self._job.crops is not None:
            crops, side = self._job.crops, self._job.crops.policy.size
            self._params = crops.draw(self._epochs, self._ids, self._sizes)
            self._boxes = self._params.crop.view(crops.views, n, 4).numpy()
            memory = opening.buffers.take(crops.views * n * 3 * side * side, self._job.pin)
            self._buffer = memory.view(crops.views, n, side, side, 3)
            self._cuts = self._buffer.numpy()
        else:
            self._offsets = offsets_of(torch.from_numpy(self._sizes))
            total = int(3 * self._sizes.prod(axis=1, dtype=np.int64).sum())
            self._buffer = opening.buffers.take(total, self._job.pin)
            self._flat, self._places = self._buffer.numpy(), self._offsets.numpy()
            self._starts = [*self._offsets.tolist(), total]
        self._mapped = self._job.source.mapped(self._owners)
        self._tasks = chunks(opening.pool, self._job, n, self._decode)

    def finish(self) -> Batch:
        """The batch, once all its images are decoded; stand-ins for those whose damage only the decoding showed."""
        damaged = [k for task in self._tasks for k in task.result()]
        for k in damaged if self._job.stand_in else ():
            owner, pixels = self._job.reader.read_next(int(self._owners[k]))
            self._owners[k], self._sizes[k] = owner, pixels.shape[:2]
            if self._job.crops is None:
                self._offsets[k] = len(self._buffer)
                self._buffer = torch.cat((self._buffer, torch.from_numpy(pixels.reshape(-1).copy())))
            else:
                one = self._job.crops.draw(self._epochs[k : k + 1], self._ids[k : k + 1], self._sizes[k : k + 1])
                self._cut(pixels, k, one.crop.numpy()[:, None])
        if damaged and self._job.pin and not self._buffer.is_pinned():
            self._buffer = self._buffer.pin_memory()
        kept = np.setdiff1d(np.arange(len(self._ids)), () if self._job.stand_in else damaged)
        ids, epochs, sizes = self._ids[kept], self._epochs[kept], self._sizes[kept]
        labels = self._job.source.labels[self._owners[kept]]
        if self._job.crops is not None:
            params, cuts = self._params, self._buffer
            if params is None or len(kept) != len(self._ids):
                params, cuts = self._job.crops.draw(epochs, ids, sizes), cuts[:, torch.from_numpy(kept)]
            pin = self._job.pin
            return Batch.of_crops(cuts, params, ids=ids, epochs=epochs, labels=labels, sizes=sizes, pin=pin)
        every = torch.from_numpy(self._sizes)
        images = Ragged(buffer=self._buffer, offsets=self._offsets, heights=every[:, 0], widths=every[:, 1])
        images = images.select(torch.from_numpy(kept))
        return Batch(
            images=images.pinned() if self._job.pin else images,
            ids=torch.from_numpy(ids),
            epochs=torch.from_numpy(epochs),
            labels=torch.from_numpy(labels),
            sizes=torch.from_numpy(sizes),
        )

    def _decode(self, start: int, stop: int) -> list[int]:
        """Decodes rows start .. stop - 1 of those kept; the rows whose images turned out damaged."""
        damaged = []
        for k in self._left(start, stop):
            head = self._heads[k]
            room = None if self._job.crops else self._flat[self._starts[k] : self._starts[k + 1]]
            pixels = self._job.reader.decode(head.owner, head.data, head.size, room, head.header)
            if pixels is None:
                damaged.append(k)
            elif self._job.crops is not None:
                self._cut(pixels, k, self._boxes[:, k : k + 1])
        return damaged

    def _left(self, start: int, stop: int) -> Iterable[int]:
        """Those of rows start .. stop - 1 that one call for all of them does not decode, cut or copy."""
        rows = slice(start, stop)
        if self._mapped is not None:
            return self._left_of_pixels(*self._mapped, rows)
        files = self._files(rows) if turbo.AVAILABLE else None
        if files is None:
            return range(start, stop)
        sizes, limit = self._sizes[rows], self._job.reader.max_pixels
        if self._job.crops is None:
            left = turbo.decode_run(files, sizes, limit, self._flat, self._places[rows])
        else:
            left = turbo.crop_run(files, sizes, limit, self._cuts, self._boxes, rows)
        return [start + k for k in left]

    def _left_of_pixels(self, memory: Pixels, starts: Ints, rows: slice) -> Iterable[int]:
        if self._job.crops is not None:
            cut_many(memory, starts, self._sizes, self._boxes, self._cuts, rows)
            return ()
        if COMPILED:
            counts = 3 * self._sizes[rows].prod(axis=1, dtype=np.int64)
            copy_many(memory, starts[rows], counts, self._flat, self._places[rows])
            return ()
        return range(rows.start, rows.stop)

    def _files(self, rows: slice) -> turbo.Spans | list[bytes] | None:
        if (found := self._job.source.spans(self._owners[rows])) is not None:
            return found
        data = [head.data for head in self._heads[rows] if isinstance(head.data, bytes)]
        return data if len(data) == rows.stop - rows.start else None

    def _cut(self, pixels: Pixels, k: int, boxes_V14: npt.NDArray[np.int32]) -> None:
        for view, (box,) in enumerate(boxes_V14.tolist()):
            cut(pixels, box, self._cuts[view, k])
