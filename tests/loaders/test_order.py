"""Every image once in each permutation, for any batch, any number of ranks, and from any step on."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsimclr.loaders.order import Order, epoch_order, quasi_order, rank_positions, subset_blocks

SEEDS = st.integers(0, 2**32 - 1)
# Sizes of blocks: unequal, some empty, at least one image.
BLOCKS = st.lists(st.integers(0, 40), min_size=1, max_size=40).filter(any)


def even_blocks(n: int, size: int) -> list[int]:
    """Bounds of blocks of `size` ids, the last with what is left."""
    return [*range(0, n, size), n]


def bounds(sizes: list[int]) -> list[int]:
    return [sum(sizes[:k]) for k in range(len(sizes) + 1)]


def walk(
    n: int, batch: int, world: int, start: int, stop: int, seed: int = 3, **quasi: object
) -> list[tuple[int, int]]:
    """(epoch, id) of every sample of steps start..stop-1, rank after rank, each rank with an order of its own."""
    orders = [Order(n, seed, **quasi) for _ in range(world)]  # type: ignore[arg-type]
    seen: list[tuple[int, int]] = []
    for step in range(start, stop):
        for rank, order in enumerate(orders):
            epochs, ids = order.at(*rank_positions(step, batch, rank, world))
            assert epochs.dtype == ids.dtype == np.int64
            assert len(ids) == batch // world
            seen += list(zip(epochs.tolist(), ids.tolist(), strict=True))
    return seen


@given(st.integers(0, 300), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(n, seed, epoch).tolist()) == list(range(n))


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_each_image_once_an_epoch_for_any_batch_and_ranks(n: int, part: int, world: int, epochs: int) -> None:
    batch = part * world
    steps = -(-n * epochs // batch)
    seen = walk(n, batch, world, 0, steps)[: n * epochs]
    assert sorted(seen) == [(epoch, i) for epoch in range(epochs) for i in range(n)]
    assert [epoch for epoch, _ in seen] == sorted(epoch for epoch, _ in seen)


@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 20))
def test_resumed_and_resharded_runs_go_on_alike(n: int, part: int, start: int) -> None:
    batch = 4 * part
    whole = walk(n, batch, 1, 0, start + 5)
    for world in (1, 2, 4):
        assert walk(n, batch, world, start, start + 5) == whole[start * batch :]


def test_a_batch_straddles_two_epochs() -> None:
    epochs, ids = Order(10, 0).at(8, 12)
    assert epochs.tolist() == [0, 0, 1, 1]
    assert ids.tolist() == [*epoch_order(10, 0, 0)[8:], *epoch_order(10, 0, 1)[:2]]


def test_memory_is_bounded_over_many_epochs() -> None:
    order = Order(10, 0)
    for start in range(0, 200, 7):
        order.at(start, start + 7)
        assert len(order._kept) <= 2


def test_orders_differ_by_seed_and_epoch_and_are_uniform() -> None:
    assert epoch_order(50, 0, 0).tolist() != epoch_order(50, 0, 1).tolist() != epoch_order(50, 1, 0).tolist()
    first = np.array([epoch_order(5, seed, epoch)[0] for seed in range(50) for epoch in range(40)])
    counts = np.bincount(first, minlength=5)
    assert ((counts - 400) ** 2 / 400).sum() < 18.5  # chi-square, 4 degrees of freedom, p = .001


def test_refusals() -> None:
    with pytest.raises(ValueError, match="global_batch=10 is not divisible by world_size=4; use 8"):
        rank_positions(0, 10, 0, 4)
    with pytest.raises(ValueError, match="use 4"):
        rank_positions(0, 3, 0, 4)
    with pytest.raises(ValueError, match="rank=4"):
        rank_positions(0, 8, 4, 4)
    with pytest.raises(ValueError, match="seed=-1"):
        epoch_order(4, -1, 0)


@given(BLOCKS, SEEDS, st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_a_quasi_random_epoch_is_a_permutation_and_keeps_to_its_window(
    sizes: list[int], seed: int, epoch: int, window: int
) -> None:
    ids, ends = quasi_order(bounds(sizes), seed, epoch, window)
    assert sorted(ids.tolist()) == list(range(sum(sizes)))
    block_of = [block for block, size in enumerate(sizes) for _ in range(size)]
    left, begun = dict(enumerate(sizes)), set[int]()
    finished_at = []
    for position, index in enumerate(ids.tolist(), 1):
        block = block_of[index]
        begun.add(block)
        assert len(begun) <= window
        left[block] -= 1
        if not left[block]:
            begun.remove(block)
        if not begun:
            finished_at.append(position)
    assert set(ends.tolist()) <= set(finished_at)
    assert ends[-1] == len(ids)
    assert len(ends) == -(-sum(size > 0 for size in sizes) // window)
    blocks = [len({block_of[i] for i in part.tolist()}) for part in np.split(ids, ends[:-1])]
    assert max(blocks) - min(blocks) <= 1  # no window of one block alone, where there are others


@pytest.mark.parametrize("n", [1, 2, 63, 1000, 10_000])
def test_quasi_random_orders_of_any_size(n: int) -> None:
    for size, window in ((1, 1), (7, 3), (64, 16), (n, 1)):
        ids, _ = quasi_order(even_blocks(n, size), 5, 2, window)
        assert np.array_equal(np.sort(ids), np.arange(n))


@given(BLOCKS, st.integers(1, 64), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))
def test_quasi_random_each_image_once_over_any_ranks(
    sizes: list[int], world: int, part: int, window: int, epochs: int
) -> None:
    n, batch = sum(sizes), world * part
    seen = walk(n, batch, world, 0, -(-n * epochs // batch), blocks=bounds(sizes), window=window)[: n * epochs]
    assert sorted(seen) == [(epoch, i) for epoch in range(epochs) for i in range(n)]


@given(BLOCKS, st.integers(0, 12), st.integers(1, 3), st.integers(1, 5), st.sampled_from([2, 3, 4, 6, 8, 16, 64]))
@pytest.mark.slow
def test_quasi_random_runs_resume_at_any_step_and_world(
    sizes: list[int], start: int, part: int, window: int, world: int
) -> None:
    n, batch = sum(sizes), 192 * part
    order = {"blocks": bounds(sizes), "window": window}
    whole = walk(n, batch, 1, 0, start + 3, **order)
    assert walk(n, batch, world, start, start + 3, **order) == whole[start * batch :]


def test_quasi_random_orders_differ_by_seed_and_epoch_and_mix() -> None:
    blocks = even_blocks(64 * 50, 50)
    orders = {(seed, epoch): quasi_order(blocks, seed, epoch, 8)[0] for seed in (0, 1) for epoch in (0, 1)}
    assert len({order.tobytes() for order in orders.values()}) == 4
    # Which blocks share a window is drawn: 8 of 64 in the first one, each with the same chance over 400 epochs.
    counts = np.zeros(64)
    for epoch in range(400):
        ids, ends = quasi_order(blocks, 7, epoch, 8)
        counts[np.unique(ids[: ends[0]] // 50)] += 1
    assert counts.sum() == 400 * 8
    assert ((counts - 50) ** 2 / 50 / (1 - 1 / 8)).sum() < 103.4  # chi-square, 63 degrees of freedom, p = .001
    # Within a window ids of all its blocks alternate: 7 of 8 neighbours are of different blocks.
    neighbours = np.diff(orders[0, 0][:400] // 50) != 0
    assert 0.8 < neighbours.mean() < 0.95


def test_one_window_over_all_blocks_is_the_full_permutation() -> None:
    assert np.array_equal(quasi_order([0, 3, 3, 10], 4, 1, 3)[0], epoch_order(10, 4, 1))


@given(BLOCKS, SEEDS, st.integers(1, 6), st.data())
def test_what_comes_is_told_a_window_ahead(sizes: list[int], seed: int, window: int, data: st.DataObject) -> None:
    n = sum(sizes)
    order = Order(n, seed, bounds(sizes), window)
    position = data.draw(st.integers(0, 3 * n - 1))
    coming = order.coming(position)
    assert order.at(position, position + len(coming))[1].tolist() == coming.tolist()
    filled = sum(size > 0 for size in sizes)
    blocks = np.searchsorted(bounds(sizes), coming, side="right")
    assert len(np.unique(blocks)) <= 2 * window
    # Never less than the rest of this window and the whole of the next.
    ends = quasi_order(bounds(sizes), seed, position // n, window)[1]
    following = quasi_order(bounds(sizes), seed, position // n + 1, window)[1]
    after = [*ends.tolist(), *(n + following).tolist()]
    later = [end for end in after if end > position % n]
    assert len(coming) == later[1] - position % n
    assert filled > 0


def test_nothing_can_be_told_of_a_full_permutation() -> None:
    assert len(Order(10, 0).coming(3)) == 0


@given(BLOCKS, st.data())
def test_blocks_of_a_subset(sizes: list[int], data: st.DataObject) -> None:
    n = sum(sizes)
    chosen = sorted(data.draw(st.sets(st.integers(0, n - 1))))
    found = subset_blocks(bounds(sizes), chosen)
    assert found is not None
    block_of = [block for block, size in enumerate(sizes) for _ in range(size)]
    expected = [[k for k in chosen if block_of[k] == block] for block in range(len(sizes))]
    assert [chosen[a:b] for a, b in pairwise(found)] == expected
    assert subset_blocks([0, 5], [3, 1]) is None


def test_quasi_random_memory_is_bounded_and_values_are_refused() -> None:
    order = Order(10, 0, even_blocks(10, 3), 2)
    for start in range(0, 200, 7):
        order.at(start, start + 7)
        order.coming(start)
        assert len(order._kept) <= 2
    with pytest.raises(ValueError, match="window=0 must be 1 block or more"):
        quasi_order([0, 4], 0, 0, 0)
    for blocks in ([], [1, 4], [0, 5, 4]):
        with pytest.raises(ValueError, match="must be the first ids of the blocks"):
            quasi_order(blocks, 0, 0)
    with pytest.raises(ValueError, match="blocks end at 9, but there are 10 images"):
        Order(10, 0, [0, 9])
