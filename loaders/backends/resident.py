"""A data set held decoded in memory: read once, after which a batch is a list of ids.

One process holds it whole on its device. The ranks of a machine that run on CPUs decode it together into one copy that
all of them read. GPUs hold it whole each where it fits one; where it fits only several, each holds a part and the
images of a batch are exchanged (sharded.py), among those of a machine if they suffice, else among all.
"""

# n images, N images of a batch, W ranks, P ranks that decode together

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from fastsimclr.loaders.arrays import Ints
from fastsimclr.loaders.backends.decoded import cut_batches
from fastsimclr.loaders.backends.held import DeviceRoom, HostRoom, Room, decode_into, free_bytes
from fastsimclr.loaders.backends.native import DecodeJob
from fastsimclr.loaders.backends.sharded import Alone, Peers, Shards
from fastsimclr.loaders.batch import Batch, Ragged
from fastsimclr.loaders.data import DataConfig
from fastsimclr.loaders.decode import read_header
from fastsimclr.loaders.faults import Damage, Reader
from fastsimclr.loaders.shards.cache import GIB
from fastsimclr.loaders.source import DataError, Source

ALONE = Alone()
SAMPLE = 256  # images whose sizes stand for all
HEADROOM = 1.05  # on the estimate from a sample, and on a part's share
_NONE: tuple[Ints, Ints] = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


def thread_count(asked: int) -> int:
    """`asked`, or one thread for each core this process may use where it is 0."""
    if asked:
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Resident:
    """The n images of `source` decoded, with their sizes and labels on the host.

    A damaged image has the pixels, size and label of the next readable one. damage: of all ranks.
    images: n rows on the device; of a sharded set the offsets are into the parts that `shards` knows, of which the
    buffer is this rank's. sizes: int32 [n, 2]. labels: int64 [n]. readable: bool [n], numpy.
    """

    def __init__(
        self,
        source: Source,
        images: Ragged,
        sizes: Tensor,
        labels: Tensor,
        damage: Damage,
        shards: Shards | None = None,
    ) -> None:
        self.source = source
        self.images = images
        self.sizes = sizes
        self.labels = labels
        self.damage = damage
        self.shards = shards
        self.readable = np.ones(len(source), dtype=bool)
        self.readable[list(damage.bad)] = False

    @property
    def cuts(self) -> bool:
        """Whether crops can be cut on the CPU: the pixels of all images are there."""
        return self.shards is None and self.images.buffer.device.type == "cpu"

    def batches(self, job: DecodeJob) -> Generator[Batch]:
        """The batches of the job's plan; damaged images are left out unless others stand in, and batches of none.

        Of a sharded set all ranks ask for theirs in step, each for its own part of one plan, or (world 1) all for the
        same; the next batch is then on its way while one is in use.
        """
        if self.shards is None and job.crops is not None:
            plans = (self._kept(plan, job.stand_in) for plan in job.plan())
            where = self.images.buffer.numpy(), self.images.offsets.numpy(), self.sizes.numpy(), self.labels.numpy()
            yield from cut_batches((plan for plan in plans if len(plan[1])), job.crops, *where, job.threads)
            return
        if self.shards is None:
            for plan in job.plan():
                epochs, ids = self._kept(plan, job.stand_in)
                if len(ids):
                    yield self._batch(epochs, ids, self._select(ids))
            return
        peers = self.shards.peers
        parts_of = [job.plan(rank % job.world) for rank in range(peers.world)]
        coming: Callable[[], Batch] | None = None
        for parts in zip_longest(*parts_of, fillvalue=_NONE):
            kept = [self._kept(part, job.stand_in) for part in parts]
            following = self._begin(kept, self.shards)
            if coming and len(batch := coming()):
                yield batch
            coming = following
        if coming and len(batch := coming()):
            yield batch

    def _begin(self, kept: list[tuple[Ints, Ints]], shards: Shards) -> Callable[[], Batch]:
        images = shards.fetch([ids for _, ids in kept])
        epochs, ids = kept[shards.peers.rank]
        return lambda: self._batch(epochs, ids, images())

    def _kept(self, plan: tuple[Ints, Ints], stand_in: bool) -> tuple[Ints, Ints]:
        epochs, ids = plan
        return (epochs, ids) if stand_in else (epochs[self.readable[ids]], ids[self.readable[ids]])

    def _select(self, ids: Ints) -> Ragged:
        index, device = torch.from_numpy(ids), self.images.buffer.device
        return self.images.select(index if device.type == "cpu" else index.pin_memory().to(device, non_blocking=True))

    def _batch(self, epochs: Ints, ids: Ints, images: Ragged) -> Batch:
        index = torch.from_numpy(ids)
        return Batch(
            images=images,
            ids=index,
            epochs=torch.from_numpy(epochs),
            labels=self.labels[index],
            sizes=self.sizes[index],
        )


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a source is to be held, the same on all ranks. why: which loader serves it and for what reason, in words.

    decoding_ranks: how many ranks decode it together, 0 where it is not held. expected: its bytes decoded, estimated.
    room: the memory that the ranks of a machine share, if they do; else each has its own.
    """

    source: Source
    config: DataConfig
    device: torch.device
    peers: Peers
    decoding_ranks: int
    expected: int
    why: str
    room: HostRoom | None = None

    def fill(self, progress: Callable[[int, int], None] | None = None) -> Resident | None:
        """The source decoded there, once, or None where it is not held. Every rank calls it.

        progress: called with (images done, images of this rank). DataError, on every rank that decodes with another,
        where too much is damaged or memory is used up.
        """
        if not self.decoding_ranks:
            return None
        n, rank = len(self.source), self.peers.rank
        bounds = np.array([n * part // self.decoding_ranks for part in range(self.decoding_ranks + 1)])
        share = self.expected if self.decoding_ranks == 1 else int(HEADROOM * self.expected) // self.decoding_ranks
        room: Room = self.room or DeviceRoom(self.device, share)
        part = rank % self.decoding_ranks
        damage = Damage(self.source.name, n, self.config.max_bad_fraction)
        tables = self._decoded(room, range(bounds[part], bounds[part + 1]), damage, progress)
        owners = _stand_ins(n, damage.bad)
        sizes = torch.cat([sizes for sizes, _ in tables])[owners]
        offsets = torch.cat([offsets for _, offsets in tables])[owners]
        labels = torch.tensor(self.source.labels)[owners]
        heights, widths = sizes[:, 0].contiguous(), sizes[:, 1].contiguous()
        images = Ragged(buffer=room.filled(), offsets=offsets, heights=heights, widths=widths).to(self.device)
        shards = None
        if self.decoding_ranks > 1 and self.room is None:
            shards = Shards(
                self.peers,
                self.decoding_ranks,
                images.buffer,
                shard_index=np.searchsorted(bounds, owners.numpy(), side="right") - 1,
                offsets=offsets.numpy(),
                heights=heights.long().numpy(),
                widths=widths.long().numpy(),
            )
        return Resident(self.source, images, sizes, labels, damage, shards)

    def _decoded(
        self, room: Room, ids: range, damage: Damage, progress: Callable[[int, int], None] | None
    ) -> list[tuple[Tensor, Tensor]]:
        """(sizes, offsets) of each of the ranks that decode together; what is damaged on any rank goes to `damage`."""
        reader = Reader(self.source, damage, self.config.max_pixels)
        mine: tuple[Tensor, Tensor] | None = None
        failure: Exception | None = None
        threads = thread_count(self.config.threads)
        if self.peers.world == 1:
            return [decode_into(room, reader, ids, threads, progress)]
        try:
            mine = decode_into(room, reader, ids, threads, progress)
        except Exception as error:  # raised below: the others wait for this rank, and are to hear of it
            failure = error
        told = mine if self.decoding_ranks > 1 else None  # where each holds all, its own table does
        said = self.peers.gather((told, damage.bad, None if failure is None else str(failure)))
        damage.merge(*(bad for _, bad, _ in said))
        if failure is not None:
            raise failure
        for rank, (_, _, text) in enumerate(said):
            if text is not None:
                raise DataError(f"rank {rank}, while decoding {self.source.name}: {text}")
        if self.decoding_ranks == 1:
            assert mine is not None  # or there is a failure
            return [mine]
        first = self.peers.rank - self.peers.rank % self.decoding_ranks
        return [table for table, _, _ in said[first : first + self.decoding_ranks] if table is not None]


def _stand_ins(n: int, bad: dict[int, str]) -> Tensor:
    """int64 [n], whose pixels each image shows: its own, or where damaged those of the next readable one, cyclic."""
    owners = torch.arange(n)
    for index in 2 * sorted(bad, reverse=True):  # from the end, and twice, for a run that goes past the end
        owners[index] = owners[(index + 1) % n]
    return owners


def choose_placement(source: Source, config: DataConfig, device: torch.device, peers: Peers = ALONE) -> Placement:
    """Where `source` is to be held by `peers`, each of which has a `device` of its own and calls this.

    The limit is data.resident_gib, or half of the free memory where that is least: of a device, or of a machine for
    ranks on CPUs. DataError where data.loader=resident and it does not fit.
    """

    def placement(decoding_ranks: int, why: str, room: HostRoom | None = None) -> Placement:
        return Placement(
            source=source,
            config=config,
            device=device,
            peers=peers,
            decoding_ranks=decoding_ranks,
            expected=needed,
            why=why,
            room=room,
        )

    needed = 0
    if config.loader not in ("auto", "resident"):
        return placement(0, config.loader)
    if not len(source):
        return placement(0, "native: no image to hold")
    # Shards that do not fit their cache are not fetched to learn their images' sizes.
    needed = _estimate(source, config.max_pixels) if source.whole_fits else 2**63
    answers = peers.gather((needed, free_bytes(device)))
    needed = max(answer[0] for answer in answers)
    limit = int(config.resident_gib * GIB) or min(answer[1] for answer in answers) // 2
    shared = device.type == "cpu"
    decoding_ranks, where = _layout(needed, limit, shared, peers.world, peers.local_world)
    size = f"{_amount(needed)} decoded" if needed < 2**63 else "more than its cache"
    bound = f"the limit of {_amount(limit)} a {'machine' if shared else 'device'}"
    room, reason = None, "" if decoding_ranks else f"{source.name} takes {size}, over {bound}{where}"
    if shared and decoding_ranks > 1:
        try:
            room = HostRoom(peers, config.max_pixels)
        except DataError as error:
            reason = str(error)
    if reason and config.loader == "resident":
        raise DataError(f"data.loader=resident, but {reason}; use auto or raise data.resident_gib")
    return (
        placement(0, f"native, not resident: {reason}")
        if reason
        else placement(decoding_ranks, f"resident{where}: {size}, {bound}", room)
    )


def _layout(needed: int, limit: int, shared: bool, world: int, local_world: int) -> tuple[int, str]:
    """(how many ranks decode together, in words where the images then are); 0 where `needed` bytes do not fit.

    limit: bytes of a device, or of a machine where its ranks share its memory.
    """
    if shared:
        one = f", one copy for the {local_world} ranks of a machine" if local_world > 1 else ""
        return (local_world, one) if needed <= limit else (0, "")
    if needed <= limit:
        return 1, ", whole on each device" if world > 1 else ""
    if HEADROOM * needed <= limit * local_world:
        return local_world, f", sharded over the {local_world} ranks of a machine"
    if HEADROOM * needed <= limit * world:
        return world, f", sharded over all {world} ranks"
    return 0, f" and of all {world}" if world > 1 else ""


def _amount(count: int) -> str:
    """`count` bytes for people."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} bytes"


def _estimate(source: Source, max_pixels: int) -> int:
    """Bytes of all images decoded, from the sizes of up to 256 spread over the source; exact where those are all."""
    n = len(source)
    if (sizes := source.pixel_sizes) is not None:
        return 3 * int(sizes.prod(axis=1, dtype=np.int64).sum())
    ids = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64))
    areas = [area for index in ids if (area := _area(source, int(index), max_pixels))]
    if not areas:
        return 0
    alike = len(ids) == n or min(areas) == max(areas)
    return int(np.ceil(3 * n * np.mean(areas) * (1 if alike else HEADROOM)))


def _area(source: Source, index: int, max_pixels: int) -> int:
    """Pixels of an image; 0 where it is damaged, which the decoding will count."""
    try:
        data = source.read(index)
        size = data.shape[:2] if isinstance(data, np.ndarray) else read_header(data, "", max_pixels).size
    except (DataError, OSError):
        return 0
    return int(size[0]) * int(size[1])
