"""The pool of gloo ranks that other tests stand on: results by rank, errors and hangs that name the rank."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastsimclr.distributed.ranks import Ranks

Pool = Callable[..., list[Any]]


def facts(ranks: Ranks, values: Tensor) -> tuple[int, int, int, float, Tensor]:
    return ranks.rank, ranks.world, os.getpid(), float(ranks.total(values * (ranks.rank + 1)).sum()), values


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_results_come_by_rank_from_processes_that_stay(ranks_pool: Pool, world: int) -> None:
    values = torch.arange(3.0)
    first, second = ranks_pool(world, facts, values), ranks_pool(world, facts, values)
    assert [(rank, size) for rank, size, *_ in first] == [(rank, world) for rank in range(world)]
    assert [pid for _, _, pid, *_ in first] == [pid for _, _, pid, *_ in second]
    assert all(total == 3.0 * world * (world + 1) / 2 for *_, total, _ in first)
    assert all(torch.equal(back, values) for *_, back in first)


def fail_on(ranks: Ranks, rank: int, how: str) -> None:
    if ranks.rank == rank:
        if how == "raise":
            raise KeyError("the spanner")
        if how == "warn":
            warnings.warn("loose bolt", stacklevel=1)
        if how == "exit":
            os._exit(3)
        time.sleep(60)
    dist.barrier(group=ranks.group)


@pytest.mark.parametrize(
    ("how", "words"), [("raise", "the spanner"), ("warn", "loose bolt"), ("exit", "its process ended")]
)
def test_an_error_names_the_rank_and_the_pool_goes_on(ranks_pool: Pool, how: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=f"(?s)rank 1 of 2: .*{words}"):
        ranks_pool(2, fail_on, 1, how)
    assert len(ranks_pool(2, facts, torch.ones(1))) == 2


def test_a_hang_ends_and_names_the_ranks(ranks_pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_pool(2, facts, torch.ones(1))
    monkeypatch.setattr(ranks_pool, "timeout_s", 1.0)
    with pytest.raises(TimeoutError, match=r"rank 0, 1 of 2 in 1\.0 s"):
        ranks_pool(2, fail_on, 0, "hang")
    monkeypatch.undo()
    assert len(ranks_pool(2, facts, torch.ones(1))) == 2
