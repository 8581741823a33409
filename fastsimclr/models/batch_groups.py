"""The groups of images over which BatchNorm takes its statistics, and how they cut a rank's batch."""

# N images of a rank, V views, S parts of a rank's batch (each lies in one group), P pieces of a part,
# K parts that the ranks exchange

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class BatchGroups:
    """The groups of images over whose values BatchNorm takes its statistics; made by `batch_groups`.

    The global batch of B images is cut into `groups` runs of B / groups consecutive images; an image's views stay
    together. Rank r of `world` holds the images [r·N, (r + 1)·N), its tensors are view-major [V·N, ...]. So the result
    depends on the number of groups and not on the number of ranks. 1 group is the global batch, `world` groups are one
    for each rank, as many groups as machines are node-sized.

    exchange: the ranks with which this one shares groups; None where each rank holds its groups whole. peers: how many.
    """

    groups: int
    views: int
    rank: int
    world: int
    exchange: dist.ProcessGroup | None
    peers: int

    @property
    def plain(self) -> bool:
        """Whether a rank's batch is one whole group."""
        return self.groups == self.world

    @property
    def aligned(self) -> bool:
        """Whether a rank's batch lies in one group."""
        return self.world % self.groups == 0

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchGroups:
        return self  # copies of a network exchange with the same ranks; a process group cannot be copied


def batch_groups(
    groups: int,
    *,
    views: int,
    rank: int = 0,
    world: int = 1,
    group: dist.ProcessGroup | None = None,
    timeout: timedelta | None = None,
) -> BatchGroups:
    """Form the process groups that `groups` statistics groups need; all ranks call it, in the same order.

    groups: 1 or more, a divisor of the global batch; aligned with the ranks or not. views: of each image, in one
    forward. group: all `world` ranks, needed above 1. timeout: of a new process group, torch's own if None.
    Raises ValueError where a number is below 1 or `group` is missing.
    """
    for name, value in (("groups", groups), ("views", views), ("world", world)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if groups % world == 0:
        return BatchGroups(groups=groups, views=views, rank=rank, world=world, exchange=None, peers=1)
    if group is None:
        raise ValueError(f"groups={groups} over world={world} ranks needs their process group; give group=")
    peers = world // groups if world % groups == 0 else world
    exchange = group if peers == world else _subgroup(group, rank, world, peers, timeout)
    return BatchGroups(groups=groups, views=views, rank=rank, world=world, exchange=exchange, peers=peers)


@functools.cache  # the stages of a run share them
def _subgroup(
    group: dist.ProcessGroup, rank: int, world: int, size: int, timeout: timedelta | None
) -> dist.ProcessGroup:
    made = [dist.new_group(range(first, first + size), timeout) for first in range(0, world, size)]
    mine = made[rank // size]
    assert isinstance(mine, dist.ProcessGroup)
    return mine


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupLayout:
    """How the groups cut a rank's batch. Known by arithmetic, so that no counts are exchanged.

    group_rows: rows (V times images) of a group.
    pieces: for each of the S parts, the slices of x's rows that make it up; shares_P: how much of the part each is.
    weight_S: how much of this rank's batch each part is.
    shared: (part, place) of the parts that other ranks continue, and where each stands in what this rank sends.
    sent: how many parts every rank sends, zeros where it has fewer.
    fractions_K: for each shared part, the share of its group in each part received, 0 where that is of another group.
    """

    group_rows: int
    pieces: tuple[tuple[slice, ...], ...]
    shares_P: tuple[Tensor, ...]
    weight_S: Tensor
    shared: tuple[tuple[int, int], ...]
    sent: int
    fractions_K: tuple[Tensor, ...]


@functools.lru_cache(maxsize=1024)
def group_layout(
    groups: BatchGroups, rows: int, piece_rows: int, device: torch.device, dtype: torch.dtype
) -> GroupLayout:
    """rows: V·N of a rank. piece_rows: the most rows of a piece."""
    views, world = groups.views, groups.world
    n, rest = divmod(rows, views)
    if rest:
        raise ValueError(f"BatchNorm got {rows} rows, which views={views} does not divide; see BatchGroups")
    if n * world % groups.groups:
        raise ValueError(
            f"global batch {n * world} is not divisible by BatchNorm's groups={groups.groups};"
            f" use {n * world - n * world % groups.groups} images"
        )
    size = n * world // groups.groups

    def cuts(rank: int) -> list[tuple[int, int, int]]:
        """(group, start, stop) of the parts of a rank's batch, in images of the global batch."""
        first, last = rank * n // size, ((rank + 1) * n - 1) // size
        return [(g, max(g * size, rank * n), min((g + 1) * size, (rank + 1) * n)) for g in range(first, last + 1)]

    def split(rank: int) -> list[int]:
        """The parts of a rank that other ranks continue: at most its first and its last."""
        return [index for index, (_, start, stop) in enumerate(cuts(rank)) if stop - start < size]

    def tensor(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    mine, shared = cuts(groups.rank), split(groups.rank)
    leader = groups.rank // groups.peers * groups.peers
    peers = range(leader, leader + groups.peers)
    sent = max(len(split(peer)) for peer in peers)
    received = [(-1, 0, 0)] * (sent * groups.peers)
    for peer in peers:
        for place, part in enumerate(split(peer)):
            received[(peer - leader) * sent + place] = cuts(peer)[part]
    pieces = []
    for _, start, stop in mine:
        # One part is the whole batch, its views side by side; of several, each has a run of rows in every view.
        runs = [(0, rows)] if len(mine) == 1 else [(v * n + start, v * n + stop) for v in range(views)]
        if len(mine) > 1:
            runs = [(a - groups.rank * n, b - groups.rank * n) for a, b in runs]
        pieces.append(tuple(slice(a, min(a + piece_rows, hi)) for lo, hi in runs for a in range(lo, hi, piece_rows)))
    return GroupLayout(
        group_rows=views * size,
        pieces=tuple(pieces),
        shares_P=tuple(
            tensor([(p.stop - p.start) / (views * (stop - start)) for p in part])
            for part, (_, start, stop) in zip(pieces, mine, strict=True)
        ),
        weight_S=tensor([(stop - start) / n for _, start, stop in mine]),
        shared=tuple((part, place) for place, part in enumerate(shared)),
        sent=sent,
        fractions_K=tuple(
            tensor([(stop - start) / size if group == mine[part][0] else 0.0 for group, start, stop in received])
            for part in shared
        ),
    )
