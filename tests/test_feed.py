"""The feed: every batch once and in order, errors handed on, no thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastsimclr.feed import Feed
from fastsimclr.loaders import ArraySource, Batch, DataConfig, DataError, Policy, TrainLoader, draw
from fastsimclr.runtime import Runtime

RUNTIME = Runtime(device=torch.device("cpu"), precision="fp32")
POLICY = Policy(size=8, normalise="none")


def loader(stop: int) -> TrainLoader:
    rng = np.random.default_rng(0)
    source = ArraySource("noise", rng.integers(0, 256, (20, 9, 9, 3), dtype=np.uint8), np.arange(20) % 2, ("a", "b"))
    return TrainLoader(source, DataConfig(resident="never", threads=2), batch=6, seed=3, stop=stop)


def feeds() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in ("feed",) or "decode" in thread.name]


def test_every_batch_once_in_order_with_its_draws() -> None:
    with Feed(loader(7), POLICY, seed=3, views=2, runtime=RUNTIME) as feed:
        shipments = list(feed)
    expected = list(loader(7))
    assert [s.ids.tolist() for s in shipments] == [b.ids.tolist() for b in expected]
    assert [s.labels.tolist() for s in shipments] == [b.labels.tolist() for b in expected]
    for shipment, batch in zip(shipments, expected, strict=True):
        params = draw(POLICY, 3, batch.epochs, batch.ids, 2, batch.sizes)
        assert torch.equal(shipment.params.crop, params.crop)
        assert torch.equal(shipment.params.factors, params.factors)
        assert shipment.views(POLICY, torch.float32).shape == (12, 3, 8, 8)
    assert feeds() == []


def test_an_error_in_the_loader_reaches_the_loop() -> None:
    def broken() -> Iterator[Batch]:
        yield from loader(1)
        raise DataError("x.jpg is damaged")

    with Feed(broken(), POLICY, seed=0, views=1, runtime=RUNTIME) as feed:
        assert len(next(feed).ids) == 6
        with pytest.raises(DataError, match=r"x\.jpg is damaged"):
            next(feed)
    assert feeds() == []


def test_leaving_early_ends_the_threads() -> None:
    with Feed(loader(10_000), POLICY, seed=0, views=2, runtime=RUNTIME) as feed:
        next(feed)
    assert feeds() == []


def test_only_a_few_batches_are_made_ahead() -> None:
    made = 0

    def counted() -> Iterator[Batch]:
        nonlocal made
        for batch in loader(50):
            made += 1
            yield batch

    with Feed(counted(), POLICY, seed=0, views=1, runtime=RUNTIME) as feed:
        next(feed)
        time.sleep(0.3)
        assert made <= 5


def test_waiting_is_counted() -> None:
    def slow() -> Iterator[Batch]:
        for batch in loader(3):
            time.sleep(0.05)
            yield batch

    with Feed(slow(), POLICY, seed=0, views=1, runtime=RUNTIME) as feed:
        assert len(list(feed)) == 3
        assert feed.waited_s >= 0.1
