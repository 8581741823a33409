"""What every loader is: a plan of ids, which no backend changes, and a backend that reads, decodes and packs them."""

# n images, B global batch, N images of a batch on this rank

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from importlib import import_module
from types import TracebackType
from typing import Self, TypedDict, Unpack

import numpy as np

from fastsimclr.loaders.arrays import Ints
from fastsimclr.loaders.backends import dali, ffcv
from fastsimclr.loaders.backends.dataloader import torchvision_batches
from fastsimclr.loaders.backends.native import native_batches
from fastsimclr.loaders.backends.resident import Resident, thread_count
from fastsimclr.loaders.backends.synthetic import synthetic_batches
from fastsimclr.loaders.batch import Batch
from fastsimclr.loaders.cut import Crops
from fastsimclr.loaders.data import DataConfig
from fastsimclr.loaders.draw import Policy
from fastsimclr.loaders.faults import Damage, Reader
from fastsimclr.loaders.order import Order, choose_order, rank_positions
from fastsimclr.loaders.source import DataError, Source


class Options(TypedDict, total=False):
    """The keywords of every loader; see Loader."""

    rank: int
    world: int
    resident: Resident | None
    damage: Damage | None
    crops: Crops | None
    cut: bool
    pin: bool


class Loader(ABC):
    """Iterates Batch. What TrainLoader and EvalLoader share: the backend, threads, damaged images.

    resident: the source held decoded (see `hold`), or None to decode as the batches are asked for, by the backend that
    config.loader names (natively for auto and resident). name: the backend's.
    crops: what the views of the images are to be. A batch is of finished crops with their parameters, as a CPU wants
    them, where crops are given and cut is True, or the backend makes nothing else. What lies on a GPU is not cut here,
    nor is anything under tensorflow semantics, with its own resize: such batches are of decoded images.
    pin: whether batches lie in pinned memory, for copies to a GPU that do not wait.
    Each iteration starts its own threads and ends them with it; leave one early by `close` or the end of a `with`.
    A damaged image is logged once and listed in `bad`; over data.max_bad_fraction of them DataError is raised.
    damage: the list that loaders of one source share; a loader of held images has theirs.
    A source that fetches ahead hears what comes next, from the oldest batch in the making on, until the iteration ends.
    ValueError for crops that a backend which always cuts cannot make.
    """

    stand_in: bool  # whether the next readable image takes the place of a damaged one; else it is left out

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        batch: int,
        rank: int = 0,
        world: int = 1,
        resident: Resident | None = None,
        damage: Damage | None = None,
        crops: Crops | None = None,
        cut: bool = True,
        pin: bool = False,
    ) -> None:
        if resident is not None and resident.source.fingerprint != source.fingerprint:
            raise ValueError(f"resident holds {resident.source.name}, not {source.name}; hold the source that is read")
        self.source = source
        self.config = config
        self.batch, self.rank, self.world = batch, rank, world
        self.resident = resident
        self.name = "resident" if resident is not None else backend_name(config)
        self._batches = choose_backend(self.name, source) if resident is None else resident.batches
        self.pin = pin
        self.threads = thread_count(config.threads)
        damage = damage if resident is None else resident.damage
        self.damage = damage or Damage(source.name, len(source), config.max_bad_fraction)
        self.reader = Reader(source, self.damage, config.max_pixels)
        wanted = crops is not None and (cut or self.always_cuts) and self._cuts(crops.policy)
        self.crops = crops if wanted else None
        # Weak, so that the threads end when a for loop is left and nothing else holds the iteration.
        self._iteration: weakref.ref[Generator[Batch]] | None = None
        self._expect: Callable[[Ints], None] | None = None
        self._made = 0  # batches of this iteration that are done

    def plan(self, rank: int | None = None) -> Iterator[tuple[Ints, Ints]]:
        """(epochs, ids) of each batch of `rank`, by default of this one, int64 [N].

        Within an iteration of this rank the source is told what comes.
        """
        for number in range(self._count(self.rank if rank is None else rank)):
            if rank is None and self._expect is not None and len(coming := self._coming(self._made, number)):
                self._expect(coming)
            yield self._at(number, self.rank if rank is None else rank)

    @abstractmethod
    def _at(self, number: int, rank: int) -> tuple[Ints, Ints]:
        """(epochs, ids) of batch `number` of `rank`, int64 [N]."""

    @abstractmethod
    def _count(self, rank: int) -> int:
        """Batches of `rank`."""

    @abstractmethod
    def _coming(self, oldest: int, number: int) -> Ints:
        """One id of each block that this rank reads from batch `oldest` to some blocks behind batch `number`, int64.

        In the order of need; none where that cannot be said.
        """

    def __len__(self) -> int:
        return self._count(self.rank)

    @property
    def bad(self) -> dict[int, str]:
        """The damaged images found so far: {id: reason}."""
        return self.damage.bad

    @property
    def exchanges(self) -> bool:
        """Whether all ranks iterate in step, in the thread that trains, because each holds a part of the images."""
        return self.resident is not None and self.resident.shards is not None

    @property
    def always_cuts(self) -> bool:
        """Whether the backend makes nothing but finished crops, and so must be given `crops`."""
        return self.name in CUTTING

    def _cuts(self, policy: Policy) -> bool:
        """Whether crops are cut here for `policy`. ValueError for one that a backend which always cuts cannot serve."""
        if policy.semantics != "torchvision" and self.always_cuts:
            raise ValueError(
                f"data.loader={self.name} resizes as torchvision does, not as views.semantics={policy.semantics} asks;"
                " use data.loader=native"
            )
        if self.config.photometric == "dali" and (more := policy.ops - dali.OPS):
            raise ValueError(
                f"data.photometric=dali can {', '.join(sorted(dali.OPS))}, but the views also need"
                f" {', '.join(sorted(more))}; use data.photometric=kernel"
            )
        return policy.semantics == "torchvision" and (self.resident is None or self.resident.cuts)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        if self.always_cuts and self.crops is None:
            raise ValueError(
                f"data.loader={self.name} makes crops only; give crops=Crops(policy=..., seed=..., views=...)"
            )
        iteration = self._iterate()
        self._iteration = weakref.ref(iteration)
        return iteration

    def _iterate(self) -> Generator[Batch]:
        reads = self.resident is None and self.name != "synthetic" and self.source.blocks is not None
        expect = self.source.expect if reads else None
        self._expect, self._made = expect, 0
        try:
            with closing(self._batches(self)) as batches:
                for batch in batches:
                    self._made += 1
                    yield batch
        finally:
            self._expect = None
            if expect is not None:
                expect(())

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


BLOCKS_AHEAD = 2  # blocks fetched ahead in evaluation, where each rank of a machine is at others
CUTTING = ("dali", "dali_gpu", "ffcv", "torchvision")
_PACKAGES = {"dali": ("nvidia.dali", dali.INSTALL), "ffcv": ("ffcv", ffcv.INSTALL)}
_BACKENDS: dict[str, Callable[[Loader], Generator[Batch]]] = {
    "native": native_batches,
    "dali": dali.dali_batches,
    "dali_gpu": dali.dali_batches,
    "ffcv": ffcv.ffcv_batches,
    "torchvision": torchvision_batches,
    "synthetic": synthetic_batches,
}


def backend_name(config: DataConfig) -> str:
    """The backend that reads for `config` where the source is not held decoded."""
    return "native" if config.loader in ("auto", "resident") else config.loader


def choose_backend(name: str, source: Source) -> Callable[[Loader], Generator[Batch]]:
    """The generator function of backend `name`. DataError where its package or GPU is missing, or `source` not its."""
    package, install = _PACKAGES.get(name.removesuffix("_gpu"), ("", ""))
    try:
        if package:
            import_module(package)
    except ImportError as error:
        raise DataError(f"data.loader={name} needs {package} ({error}); run: {install}") from error
    if name == "dali_gpu":
        dali.check_gpu()
    if name == "ffcv":
        ffcv.beton_rows(source)
    return _BACKENDS[name]


class TrainLoader(Loader):
    """Batches of steps start..stop-1, a pure function of (source, seed, batch): the same for any number of threads.

    The permutations of all epochs stand end to end; step s of the global batch B takes positions [s * B, (s + 1) * B),
    of which this rank takes its contiguous part of N = B / world. A batch may straddle two epochs.
    order: how an epoch is permuted, random or quasi. Under data.order=auto `choose_order` says it for this process
    alone; where there are several, choose once for all of them.
    The next readable image (cyclic by id) stands in for a damaged one with its pixels and its label; the id stays.
    Raises DataError for a batch larger than the source and for a quasi-random order of a source without blocks,
    ValueError for a batch that `world` does not divide.
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
        **options: Unpack[Options],
    ) -> None:
        if batch > len(source):
            raise DataError(f"global_batch={batch} is larger than the {len(source)} images of {source.name}; lower it")
        if not 0 <= start <= stop:
            raise ValueError(f"start={start} and stop={stop} must be 0 <= start <= stop")
        super().__init__(source, config, batch=batch, **options)
        rank_positions(0, batch, self.rank, self.world)
        self.steps = range(start, stop)
        self.order, _ = choose_order(source, config.order)
        blocks = source.blocks if self.order == "quasi" else None
        self._order = Order(len(source), seed, blocks, config.window)
        self._windows: tuple[tuple[int, int], tuple[int, int]] | None = None
        self._of_blocks: Ints = np.empty(0, dtype=np.int64)

    def _count(self, rank: int) -> int:
        return len(self.steps)

    def _at(self, number: int, rank: int) -> tuple[Ints, Ints]:
        return self._order.at(*rank_positions(self.steps[number], self.batch, rank, self.world))

    def _coming(self, oldest: int, number: int) -> Ints:
        if self._order.blocks is None:
            return self._of_blocks
        begin, end = self.steps[oldest] * self.batch, (self.steps[number] + 1) * self.batch - 1
        windows = self._order.window_at(begin), self._order.window_at(end)
        if windows != self._windows:  # what a window needs is sorted out once, for that takes milliseconds
            self._windows = windows
            ids = np.concatenate([self._order.at(begin, end)[1], self._order.coming(end)])
            ids = ids[: self.steps.stop * self.batch - begin]
            part = (begin + np.arange(len(ids))) % self.batch * self.world // self.batch
            ids = ids[part == self.rank]
            blocks = np.searchsorted(self._order.blocks, ids, side="right")
            self._of_blocks = ids[np.sort(np.unique(blocks, return_index=True)[1])]
        return self._of_blocks


class EvalLoader(Loader):
    """One pass in the order of the ids, `batch` images at a time, epoch 0. Damaged images are left out.

    Rank r of W takes ids r * n // W to (r + 1) * n // W - 1: each image once over all ranks, parts that differ by one
    at most. len is that part / batch rounded up. The last batch may be smaller, as may one with damaged images; where
    none is left in it, it is skipped.
    """

    stand_in = False

    def __init__(self, source: Source, config: DataConfig, *, batch: int, **options: Unpack[Options]) -> None:
        if batch < 1:
            raise ValueError(f"batch={batch} must be 1 or more")
        super().__init__(source, config, batch=batch, **options)
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank={self.rank} must be in 0..{self.world - 1} for world_size={self.world}")
        self.rank_ids = self._rank_ids(self.rank)

    def _count(self, rank: int) -> int:
        return -(-len(self._rank_ids(rank)) // self.batch)

    def _rank_ids(self, rank: int) -> range:
        return range(rank * len(self.source) // self.world, (rank + 1) * len(self.source) // self.world)

    def _at(self, number: int, rank: int) -> tuple[Ints, Ints]:
        part = self._rank_ids(rank)
        start = part.start + number * self.batch
        ids = np.arange(start, min(start + self.batch, part.stop), dtype=np.int64)
        return np.zeros_like(ids), ids

    def _coming(self, oldest: int, number: int) -> Ints:
        if self.source.blocks is None:
            return np.empty(0, dtype=np.int64)
        begin, end = (self.rank_ids.start + k * self.batch for k in (oldest, number))
        first, last = np.searchsorted(self.source.blocks, (begin, end), side="right")
        starts = np.maximum(self.source.blocks[first - 1 : last + BLOCKS_AHEAD], begin)
        return np.unique(starts[starts < self.rank_ids.stop])
