"""The loaders: batches of decoded images for training and for evaluation, from memory or from decoding threads."""

# n images, B global batch, N images of a batch on this rank

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from fastsimclr.loaders.batch import Batch, Ragged
from fastsimclr.loaders.data import DataConfig
from fastsimclr.loaders.faults import Reader
from fastsimclr.loaders.order import Order, rank_positions
from fastsimclr.loaders.resident import Resident, offsets_of, thread_count
from fastsimclr.loaders.source import DataError, Source

Ints = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
Read = tuple[int, int, Pixels]  # row of the batch, id whose pixels these are, pixels

AHEAD = 3  # batches being decoded while one is in use
CHUNK = 32  # most images decoded by one task


class Loader(ABC):
    """Iterates Batch. What TrainLoader and EvalLoader share: where the pixels come from, threads, damaged images.

    resident: the source held decoded (see `hold`), or None to decode in threads as the batches are asked for.
    pin: whether decoded batches lie in pinned memory, for copies to a GPU that do not wait.
    Each iteration starts its own threads and ends them with it; leave one early by `close` or the end of a `with`.
    A damaged image is logged once and listed in `bad`; over data.max_bad_fraction of them DataError is raised.
    """

    stand_in: bool  # whether the next readable image takes the place of a damaged one; else it is left out

    def __init__(self, source: Source, config: DataConfig, *, resident: Resident | None, pin: bool) -> None:
        if resident is not None and resident.source.fingerprint != source.fingerprint:
            raise ValueError(
                f"resident holds {resident.source.name}, not {source.name}; hold the source that is loaded"
            )
        self.source = source
        self.resident = resident
        self.name = "native" if resident is None else resident.name
        self.pin = pin
        self.threads = thread_count(config.threads)
        self._reader = Reader(source, config.max_bad_fraction, config.max_pixels)
        # Weak, so that the threads end when a for loop is left and nothing else holds the iteration.
        self._iteration: weakref.ref[Generator[Batch]] | None = None

    @abstractmethod
    def plan(self) -> Iterator[tuple[Ints, Ints]]:
        """(epochs, ids) of each batch, int64 [N]."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def bad(self) -> dict[int, str]:
        """The damaged images found so far: {id: reason}."""
        return self._reader.bad if self.resident is None else self.resident.bad

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        iteration = self._native() if self.resident is None else self._resident(self.resident)
        self._iteration = weakref.ref(iteration)
        return iteration

    def close(self) -> None:
        """End the iteration and its threads."""
        if self._iteration is not None and (iteration := self._iteration()) is not None:
            iteration.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _resident(self, resident: Resident) -> Generator[Batch]:
        for epochs, ids in self.plan():
            if len(batch := resident.batch(epochs, ids, self.stand_in)):
                yield batch

    def _native(self) -> Generator[Batch]:
        decoders = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        packer = ThreadPoolExecutor(1, thread_name_prefix="pack")
        waiting: deque[Future[Batch]] = deque()
        try:
            for epochs, ids in self.plan():
                size = min(CHUNK, -(-len(ids) // self.threads))
                chunks = [decoders.submit(self._decode, ids, k, k + size) for k in range(0, len(ids), size)]
                waiting.append(packer.submit(self._pack, epochs, ids, chunks))
                if len(waiting) > AHEAD and len(batch := waiting.popleft().result()):
                    yield batch
            while waiting:
                if len(batch := waiting.popleft().result()):
                    yield batch
        finally:
            decoders.shutdown(wait=False, cancel_futures=True)
            packer.shutdown(wait=True, cancel_futures=True)
            decoders.shutdown(wait=True)

    def _decode(self, ids: Ints, start: int, stop: int) -> list[Read]:
        rows = []
        for row, index in enumerate(ids[start:stop].tolist(), start):
            if self.stand_in:
                rows.append((row, *self._reader.read_or_next(index)))
            elif (pixels := self._reader.read(index)) is not None:
                rows.append((row, index, pixels))
        return rows

    def _pack(self, epochs: Ints, ids: Ints, chunks: list[Future[list[Read]]]) -> Batch:
        reads = [read for chunk in chunks for read in chunk.result()]
        rows = [row for row, _, _ in reads]
        sizes = torch.tensor([pixels.shape[:2] for _, _, pixels in reads], dtype=torch.int32).view(-1, 2)
        offsets = offsets_of(sizes)
        total = sum(pixels.size for _, _, pixels in reads)
        buffer = torch.empty(total, dtype=torch.uint8, pin_memory=self.pin)
        flat = buffer.numpy()
        for start, (_, _, pixels) in zip(offsets.tolist(), reads, strict=True):
            flat[start : start + pixels.size] = pixels.reshape(-1)
        images = Ragged(buffer=buffer, offsets=offsets, heights=sizes[:, 0].clone(), widths=sizes[:, 1].clone())
        owners = np.array([owner for _, owner, _ in reads], dtype=np.int64)
        return Batch(
            images=_pinned(images) if self.pin else images,
            ids=torch.from_numpy(ids[rows]),
            epochs=torch.from_numpy(epochs[rows]),
            labels=torch.from_numpy(self.source.labels[owners]),
            sizes=sizes,
        )


def _pinned(images: Ragged) -> Ragged:
    return Ragged(
        buffer=images.buffer,
        offsets=images.offsets.pin_memory(),
        heights=images.heights.pin_memory(),
        widths=images.widths.pin_memory(),
    )


class TrainLoader(Loader):
    """Batches of steps start..stop-1, a pure function of (source, seed, batch): the same for any number of threads.

    The permutations of all epochs stand end to end; step s of the global batch B takes positions [s * B, (s + 1) * B),
    of which this rank takes its contiguous part of N = B / world. A batch may straddle two epochs.
    The next readable image (cyclic by id) stands in for a damaged one with its pixels and its label; the id stays.
    Raises DataError for a batch larger than the source, ValueError for one that `world` does not divide.
    """

    stand_in = True

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        batch: int,
        seed: int,
        stop: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        resident: Resident | None = None,
        pin: bool = False,
    ) -> None:
        if batch > len(source):
            raise DataError(f"global_batch={batch} is larger than the {len(source)} images of {source.name}; lower it")
        rank_positions(0, batch, rank, world)
        if not 0 <= start <= stop:
            raise ValueError(f"start={start} and stop={stop} must be 0 <= start <= stop")
        super().__init__(source, config, resident=resident, pin=pin)
        self.batch, self.rank, self.world = batch, rank, world
        self.steps = range(start, stop)
        self._order = Order(len(source), seed)

    def __len__(self) -> int:
        return len(self.steps)

    def plan(self) -> Iterator[tuple[Ints, Ints]]:
        """(epochs, ids) of each step, int64 [N]."""
        for step in self.steps:
            yield self._order.at(*rank_positions(step, self.batch, self.rank, self.world))


class EvalLoader(Loader):
    """One pass in the order of the ids, `batch` images at a time, epoch 0. Damaged images are left out.

    Rank r of W takes ids r * n // W to (r + 1) * n // W - 1: each image once over all ranks, parts that differ by one
    at most. len is that part / batch rounded up. The last batch may be smaller, as may one with damaged images; where
    none is left in it, it is skipped.
    """

    stand_in = False

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        batch: int,
        rank: int = 0,
        world: int = 1,
        resident: Resident | None = None,
        pin: bool = False,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch={batch} must be 1 or more")
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} must be in 0..{world - 1} for world_size={world}")
        super().__init__(source, config, resident=resident, pin=pin)
        self.batch = batch
        self.part = range(rank * len(source) // world, (rank + 1) * len(source) // world)

    def __len__(self) -> int:
        return -(-len(self.part) // self.batch)

    def plan(self) -> Iterator[tuple[Ints, Ints]]:
        """(epochs, ids) of each batch, int64 [N]; the epochs are 0."""
        for start in range(self.part.start, self.part.stop, self.batch):
            ids = np.arange(start, min(start + self.batch, self.part.stop), dtype=np.int64)
            yield np.zeros_like(ids), ids
