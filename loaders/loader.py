"""What every loader is: a plan of ids, which no backend changes, and a backend that reads, decodes and packs them."""

# n images, B global batch, N images of a batch on this rank

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from importlib import import_module
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from fastsimclr.loaders.backends import dali, ffcv
from fastsimclr.loaders.backends.dataloader import torchvision_batches
from fastsimclr.loaders.backends.native import native_batches
from fastsimclr.loaders.backends.resident import Resident, thread_count
from fastsimclr.loaders.backends.synthetic import synthetic_batches
from fastsimclr.loaders.batch import Batch
from fastsimclr.loaders.cut import Crops
from fastsimclr.loaders.data import DataConfig
from fastsimclr.loaders.draw import Policy
from fastsimclr.loaders.faults import Reader
from fastsimclr.loaders.order import Order, rank_positions
from fastsimclr.loaders.source import DataError, Source

Ints = npt.NDArray[np.int64]


class Loader(ABC):
    """Iterates Batch. What TrainLoader and EvalLoader share: the backend, threads, damaged images.

    resident: the source held decoded (see `hold`), or None to decode as the batches are asked for, by the backend that
    config.loader names (natively for auto and resident). name: the backend's.
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
        self.config = config
        self.resident = resident
        self.name = "resident" if resident is not None else backend_name(config)
        self._batches = _resident_batches if resident is not None else choose_backend(self.name, source)
        self.pin = pin
        self.threads = thread_count(config.threads)
        self.reader = Reader(source, config.max_bad_fraction, config.max_pixels)
        self.crops: Crops | None = None
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
        return self.reader.bad if self.resident is None else self.resident.bad

    @property
    def always_cuts(self) -> bool:
        """Whether the backend makes nothing but finished crops, so that `cut` must be called before its iteration."""
        return self.name in CUTTING

    def cut(self, policy: Policy, seed: int, views: int) -> None:
        """Ask for batches of finished crops with their parameters, as a CPU wants them; for the iterations to come.

        resident does not cut, nor does native under tensorflow semantics, whose resize OpenCV lacks: their batches are
        decoded images as before. ValueError for a policy that a backend which always cuts cannot serve.
        """
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
        if self.resident is None and policy.semantics == "torchvision":
            self.crops = Crops(policy=policy, seed=seed, views=views)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        if self.always_cuts and self.crops is None:
            raise ValueError(
                f"data.loader={self.name} makes crops only; call cut(policy, seed, views) first, as Feed does"
            )
        iteration = self._batches(self)
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
    if name == "dali_gpu" and not torch.cuda.is_available():
        raise DataError("data.loader=dali_gpu needs a CUDA device, and there is none; use dali or native")
    if name == "ffcv":
        ffcv.beton_rows(source)
    return _BACKENDS[name]


def _resident_batches(loader: Loader) -> Generator[Batch]:
    assert loader.resident is not None
    for epochs, ids in loader.plan():
        if len(batch := loader.resident.batch(epochs, ids, loader.stand_in)):
            yield batch


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
