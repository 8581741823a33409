"""The feed: every batch once and in order, errors handed on, no thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastsimclr.kernels.views import make_views
from fastsimclr.loaders import ArraySource, Batch, Crops, DataConfig, DataError, Policy, TrainLoader, draw
from fastsimclr.runtime.device import Runtime
from fastsimclr.training.feed import Feed

RUNTIME = Runtime(device=torch.device("cpu"), precision="fp32")
POLICY = Policy(size=8, normalise="none")
ONE, TWO = Crops(policy=POLICY, seed=0, views=1), Crops(policy=POLICY, seed=3, views=2)


def loader(stop: int, crops: Crops | None = None) -> TrainLoader:
    rng = np.random.default_rng(0)
    source = ArraySource("noise", rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), np.arange(20) % 2, ("a", "b"))
    return TrainLoader(source, DataConfig(loader="native", threads=2), batch=6, seed=3, stop=stop, crops=crops)


def feeds() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in ("feed",) or "decode" in thread.name]


def test_every_batch_once_in_order_with_its_draws() -> None:
    with Feed(loader(7, TWO), TWO, RUNTIME) as feed:
        shipments = list(feed)
    expected = list(loader(7))
    assert [s.ids.tolist() for s in shipments] == [b.ids.tolist() for b in expected]
    assert [s.labels.tolist() for s in shipments] == [b.labels.tolist() for b in expected]
    for shipment, batch in zip(shipments, expected, strict=True):
        params = draw(POLICY, 3, batch.epochs, batch.ids, 2, batch.sizes)
        assert torch.equal(shipment.params.factors, params.factors)
        views = shipment.render(torch.float32)
        assert views.shape == (12, 3, 8, 8)
        # Cut by the loader, as this is a CPU: crops of whole pixel values.
        plain = replace(POLICY, jitter=0.0, grey=0.0, blur=0.0)
        crops = replace(shipment, params=replace(shipment.params, ops=plain.ops)).render(torch.float32)
        exact = make_views(batch.images, replace(params, ops=plain.ops), **plain.rendering)
        assert (crops - exact).abs().max() < 1.01 / 255
    assert feeds() == []


def test_an_error_in_the_loader_reaches_the_loop() -> None:
    def broken() -> Iterator[Batch]:
        yield from loader(1)
        raise DataError("x.jpg is damaged")

    with Feed(broken(), ONE, RUNTIME) as feed:
        assert len(next(feed).ids) == 6
        with pytest.raises(DataError, match=r"x\.jpg is damaged"):
            next(feed)
    assert feeds() == []


def test_leaving_early_ends_the_threads() -> None:
    with Feed(loader(10_000, TWO), TWO, RUNTIME) as feed:
        next(feed)
    assert feeds() == []


def test_only_a_few_batches_are_made_ahead() -> None:
    made = 0

    def counted() -> Iterator[Batch]:
        nonlocal made
        for batch in loader(50):
            made += 1
            yield batch

    with Feed(counted(), ONE, RUNTIME) as feed:
        next(feed)
        time.sleep(0.3)
        assert made <= 5


def test_waiting_is_counted() -> None:
    def slow() -> Iterator[Batch]:
        for batch in loader(3):
            time.sleep(0.05)
            yield batch

    with Feed(slow(), ONE, RUNTIME) as feed:
        assert len(list(feed)) == 3
        assert feed.waited_s >= 0.1
