"""Every image once in each permutation, for any batch, any number of ranks, and from any step on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsimclr.loaders.order import Order, epoch_order, rank_positions, steps_per_run


def walk(n: int, batch: int, world: int, start: int, stop: int, seed: int = 3) -> list[tuple[int, int]]:
    """(epoch, id) of every sample of steps start..stop-1, rank after rank, each rank with an order of its own."""
    orders = [Order(n, seed) for _ in range(world)]
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


def test_steps_and_refusals() -> None:
    assert steps_per_run(50_000, 100, 512) == 9766  # 50,000 * 100 / 512 = 9765.6
    with pytest.raises(ValueError, match="global_batch=10 is not divisible by world_size=4; use 8"):
        rank_positions(0, 10, 0, 4)
    with pytest.raises(ValueError, match="use 4"):
        rank_positions(0, 3, 0, 4)
    with pytest.raises(ValueError, match="rank=4"):
        rank_positions(0, 8, 4, 4)
    with pytest.raises(ValueError, match="seed=-1"):
        epoch_order(4, -1, 0)
