"""A data set of which each rank holds a part, and the exchange that brings every rank the images of its batch.

The plan of every rank and the place of every image are known to all. So each rank can tell by itself what it owes to
whom, what it will get and in which order: one all-to-all of bytes a batch, with no word about sizes before it.

An exchange is a collective: all ranks must begin theirs in one order, also with regard to the other collectives of the
run. Two ways to break that are avoided. A thread that reads ahead begins exchanges whenever it comes to it: between
other collectives of the step on each rank, and, when a run stops, more of them on one rank than on another, which then
waits for ever. And a process group of their own would be a second NCCL communicator on the device. Each kernel of NCCL
holds its place on the device until the other ranks have begun theirs: one of each communicator, in opposite orders on
two ranks, can keep each other out. So the thread that trains begins them, in the process group of the step: what one
thread begins in one group has one order on all ranks, on the host and on the device.

The step does not wait for them: batch k + 1 is begun when batch k is asked for, and travels on the group's own stream
during step k.
"""

# W ranks, P parts, n images, N images of a batch on this rank

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastsimclr.loaders.arrays import Ints
from fastsimclr.loaders.batch import Ragged

T = TypeVar("T")


class Peers(Protocol):
    """The W processes of a run as a loader needs them: fastsimclr.distributed.ranks.Ranks, or `Alone`.

    Ranks are numbered machine by machine, local_world on each. gather(value): every rank's, in the order of the ranks.
    exchange(data, sent, received): begins to give each rank its run of data (uint8 [sum of sent], in the order of the
    ranks); what it returns waits and gives what came, uint8 [sum of received]. Every rank calls both at the same place.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def local_world(self) -> int: ...
    def gather(self, value: T) -> list[T]: ...
    def exchange(self, data: Tensor, sent: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Alone:
    """The peers of a process that has none."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    def gather(self, value: T) -> list[T]:
        """The one value."""
        return [value]

    def exchange(self, data: Tensor, sent: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        """What is sent is what comes."""
        return lambda: data


class Shards:
    """n images in P parts: ranks 0 .. P - 1 hold them all, one part each, and so do the next P, if there are more.

    buffer: uint8, this rank's part, on its device. For each of the n ids, int64 [n]: shard_index, the part with its
    pixels; offsets, the byte where they begin there; heights and widths in pixels.
    """

    def __init__(
        self, peers: Peers, count: int, buffer: Tensor, *, shard_index: Ints, offsets: Ints, heights: Ints, widths: Ints
    ) -> None:
        self.peers, self.count, self.buffer = peers, count, buffer
        self._shard_index, self._offsets, self._heights, self._widths = shard_index, offsets, heights, widths
        self._bytes = 3 * heights * widths
        self._thread = threading.get_ident()

    def fetch(self, wanted: Sequence[Ints]) -> Callable[[], Ragged]:
        """Begin to get this rank its images; what it returns waits for them, and gives them in the order asked for.

        wanted: for each of the W ranks the ids (int64) that it asks for, the same on every rank. Every rank calls it.
        Where each holds all that it asks for, nothing is exchanged. RuntimeError in another thread than the maker's.
        """
        if threading.get_ident() != self._thread:
            raise RuntimeError("images of other ranks were asked for in a second thread; ask in the one that trains")
        rank = self.peers.rank
        holders = [self._holders(other, ids) for other, ids in enumerate(wanted)]
        if all((held_by == other).all() for other, held_by in enumerate(holders)):
            return lambda: self._rows(self.buffer, self._offsets[wanted[rank]], wanted[rank])
        owed = [ids[held_by == rank] for ids, held_by in zip(wanted, holders, strict=True)]
        sent = [int(self._bytes[ids].sum()) for ids in owed]
        flat = np.concatenate(owed)
        starts = self._offsets[flat]
        ends = starts + self._bytes[flat]
        pieces = [self.buffer[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        ids, mine = wanted[rank], holders[rank]
        received = np.zeros(self.peers.world, dtype=np.int64)
        np.add.at(received, mine, self._bytes[ids])
        order = np.argsort(mine, kind="stable")  # as they come: by rank, and of one rank in the order asked for
        offsets = np.empty(len(ids), dtype=np.int64)
        offsets[order] = np.cumsum(self._bytes[ids][order]) - self._bytes[ids][order]
        data = torch.cat(pieces) if pieces else self.buffer[:0]
        arrived = self.peers.exchange(data, sent, received.tolist())
        return lambda: self._rows(arrived(), offsets, ids)

    def _holders(self, rank: int, ids: Ints) -> Ints:
        """The rank that `rank` gets each of `ids` from."""
        return rank - rank % self.count + self._shard_index[ids]

    def _rows(self, buffer: Tensor, offsets: Ints, ids: Ints) -> Ragged:
        table = torch.from_numpy(np.stack([offsets, self._heights[ids], self._widths[ids]]))
        if buffer.device.type != "cpu":
            table = table.pin_memory().to(buffer.device, non_blocking=True)
        return Ragged(buffer=buffer, offsets=table[0], heights=table[1].int(), widths=table[2].int())
