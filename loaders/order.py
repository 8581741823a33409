"""The order of the samples: a permutation for each (seed, epoch) that needs no state, and each rank's part of it."""

# n images, B global batch, W ranks

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from fastsimclr.loaders.arrays import Ints
from fastsimclr.loaders.philox import philox4x32
from fastsimclr.loaders.source import DataError, Source

OrderName = Literal["random", "quasi"]

# Views count up from 0 in the same counter word (draw.py), so the last values are free for the order.
ORDER_WORD, BLOCKS_WORD = 0xFFFF_FFFF, 0xFFFF_FFFE
WINDOW = 16  # blocks that a quasi-random order mixes; 16 shards of 1,000 images mix as well as most shuffle buffers


def epoch_order(n: int, seed: int, epoch: int) -> Ints:
    """The permutation of 0..n-1 in which epoch `epoch` visits the images, int64 [n].

    Each id gets a 64-bit key, Philox4x32-10 (Salmon et al. 2011) of (seed, epoch, id); ids are sorted by key.
    seed and epoch are in 0..2**32-1, n in 0..2**32-1.
    """
    return _permutation(n, seed, epoch, ORDER_WORD)


def _permutation(n: int, seed: int, epoch: int, word: int) -> Ints:
    if not (0 <= seed < 2**32 and 0 <= epoch < 2**32):
        raise ValueError(f"seed={seed} and epoch={epoch} must be in 0..{2**32 - 1}, the words of the generator's key")
    counter = np.zeros((n, 4), dtype=np.uint32)
    counter[:, 0] = np.arange(n, dtype=np.uint32)
    counter[:, 2] = word
    words = philox4x32(counter, (seed, epoch)).astype(np.uint64)
    return np.argsort((words[:, 0] << np.uint64(32)) | words[:, 1], kind="stable").astype(np.int64)


def quasi_order(blocks: npt.ArrayLike, seed: int, epoch: int, window: int = WINDOW) -> tuple[Ints, Ints]:
    """(the permutation of 0..n-1 for epoch `epoch`, where its windows end), int64 [n] and int64 [windows].

    blocks: int64 [blocks + 1], where the ids of each block (a shard, a page) begin, from 0 to n; a block may be empty.
    The blocks are permuted and cut into windows of `window` at most, as even as can be; the ids of all the blocks of a
    window are permuted together. So each id comes once, and never are more than `window` blocks begun and not finished.
    A pure function of its arguments. Raises ValueError for bounds that fall or do not begin with 0.
    """
    bounds = block_bounds(blocks)
    if window < 1:
        raise ValueError(f"window={window} must be 1 block or more")
    sizes = np.diff(bounds)
    filled = np.flatnonzero(sizes)
    k = len(filled)
    windows = -(-k // window)
    place = np.zeros(len(sizes), dtype=np.int64)
    place[filled[_permutation(k, seed, epoch, BLOCKS_WORD)]] = np.arange(k) * windows // max(k, 1)
    window_of = np.repeat(place, sizes)  # of each id
    order = epoch_order(int(bounds[-1]), seed, epoch)
    ends = np.cumsum(np.bincount(window_of, minlength=windows)).astype(np.int64)
    return order[np.argsort(window_of[order], kind="stable")], ends


def block_bounds(blocks: npt.ArrayLike) -> Ints:
    """`blocks` as int64 [blocks + 1]; ValueError where they are no bounds: 0 first, none below the one before."""
    bounds = np.asarray(blocks, dtype=np.int64)
    if bounds.ndim != 1 or not bounds.size or bounds[0] != 0 or (np.diff(bounds) < 0).any():
        raise ValueError(f"blocks={blocks!r:.80} must be the first ids of the blocks: 0, none below the one before, n")
    return bounds


def subset_blocks(blocks: npt.ArrayLike, indices: npt.ArrayLike) -> Ints | None:
    """The bounds of a source's blocks among the chosen ids `indices` of it; None where those are not in rising order.

    Chosen ids k with bounds[b] <= k < bounds[b + 1] belong to block b, as in the source; some blocks may become empty.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    if (np.diff(chosen) < 0).any():
        return None
    return np.searchsorted(chosen, block_bounds(blocks)).astype(np.int64)


class Order:
    """The permutations of epoch 0, 1, 2, ... of n images, end to end; the last two are kept.

    blocks: the bounds of the source's blocks for a quasi-random order (`quasi_order`) of windows of `window` of them;
    None for a full permutation. Raises ValueError for blocks of another n.
    """

    def __init__(self, n: int, seed: int, blocks: npt.ArrayLike | None = None, window: int = WINDOW) -> None:
        self.n = n
        self.seed = seed
        self.blocks = None if blocks is None else block_bounds(blocks)
        self.window = window
        if self.blocks is not None and self.blocks[-1] != n:
            raise ValueError(
                f"blocks end at {self.blocks[-1]}, but there are {n} images; give the blocks of the source"
            )
        self._kept: dict[int, tuple[Ints, Ints]] = {}

    def at(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """(epochs, ids) of positions start..stop-1, both int64 [stop - start]; the epoch of a position is pos // n."""
        positions = np.arange(start, stop, dtype=np.int64)
        epochs = positions // self.n
        ids = np.empty_like(positions)
        for epoch in range(start // self.n, -(-stop // self.n)):
            here = slice(max(epoch * self.n, start) - start, min((epoch + 1) * self.n, stop) - start)
            ids[here] = self._epoch(epoch)[0][positions[here] - epoch * self.n]
        return epochs, ids

    def window_at(self, position: int) -> tuple[int, int]:
        """(epoch, window) of a position; the windows of an epoch count from 0, a full permutation is one."""
        epoch, offset = divmod(position, self.n)
        return epoch, int(np.searchsorted(self._epoch(epoch)[1], offset, side="right"))

    def coming(self, position: int) -> Ints:
        """The ids that the window of `position` has left, then those of the next window, int64: what to fetch ahead.

        Under a full permutation, where nothing can be said of the blocks that come, empty.
        """
        if self.blocks is None:
            return np.empty(0, dtype=np.int64)
        epoch, window = self.window_at(position)
        offset = position - epoch * self.n
        ids, ends = self._epoch(epoch)
        if window + 1 < len(ends):
            return ids[offset : ends[window + 1]]
        following, following_ends = self._epoch(epoch + 1)
        return np.concatenate([ids[offset:], following[: following_ends[0]]])

    def _epoch(self, epoch: int) -> tuple[Ints, Ints]:
        if epoch not in self._kept:
            if len(self._kept) == 2:
                del self._kept[min(self._kept)]
            if self.blocks is None:
                self._kept[epoch] = epoch_order(self.n, self.seed, epoch), np.array([self.n])
            else:
                self._kept[epoch] = quasi_order(self.blocks, self.seed, epoch, self.window)
        return self._kept[epoch]


def choose_order(
    source: Source, asked: Literal["auto", "random", "quasi"], *, fits: bool | None = None
) -> tuple[OrderName, str]:
    """(the order for training on `source`, why): quasi where auto is asked and its blocks cannot all be at hand.

    fits: whether they can, where several hosts must agree; None asks the source. Raises DataError where a quasi-random
    order is asked for of a source without blocks: there it would spare nothing.
    """
    if asked == "quasi" and source.blocks is None:
        raise DataError(
            f"data.order=quasi needs images that lie together in blocks, in the order of their ids, as in shards or in"
            f" a packed file, and {source.name} has none; fastsimclr pack SRC DST.beton makes one, or use"
            " data.order=random"
        )
    if asked != "auto":
        return asked, "as data.order says"
    if source.whole_fits if fits is None else fits:
        return "random", "all images can be at hand at once"
    if source.blocks is None:
        return "random", "its shards do not fit data.cache_gib, but its images are not in their order: slow"
    return "quasi", "its shards do not fit data.cache_gib together"


def rank_positions(step: int, batch: int, rank: int = 0, world: int = 1) -> tuple[int, int]:
    """(start, stop) of a rank's positions in step `step` of global batch `batch`.

    The global batch takes positions [step * B, (step + 1) * B); a rank takes the rank-th of W equal runs of them.
    """
    if batch < 1 or world < 1 or batch % world:
        remedy = max(batch - batch % world, world) if world > 0 else batch
        raise ValueError(f"global_batch={batch} is not divisible by world_size={world}; use {remedy}")
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} must be in 0..{world - 1} for world_size={world}")
    part = batch // world
    start = step * batch + rank * part
    return start, start + part
