"""Several ranks: one order for all of them, and a machine that opens its data for longer than an exchange may take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fastsimclr.distributed.ranks import Ranks
from fastsimclr.loaders import ArraySource, DataConfig, DataError, Policy
from fastsimclr.recipe import Recipe
from fastsimclr.runtime.device import Runtime
from fastsimclr.stages import Setting

Pool = Callable[..., list[Any]]


def ordered(ranks: Ranks, roomy: int, begun: dict[str, Any]) -> tuple[str, int]:
    """Order and window on a rank, where only rank `roomy` has room for all blocks."""
    source = ArraySource("few", np.zeros((4, 1, 1, 3), np.uint8), np.zeros(4), ("a",))
    source.__dict__ |= {"blocks": np.array([0, 2, 4]), "whole_fits": ranks.rank == roomy}
    recipe = Recipe(device="cpu", data=DataConfig(window=3), views=Policy(size=8))
    runtime = Runtime(device=torch.device("cpu"), precision="fp32", ranks=ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastsimclr.stages.setting.choose_runtime", lambda *_: runtime)
        data = Setting(recipe).ordered(source, begun)
    return data.order, data.window


def test_all_ranks_have_one_order_whatever_room_each_has(ranks_pool: Pool) -> None:
    assert ranks_pool(2, ordered, 0, {}) == ranks_pool(2, ordered, 1, {}) == [("quasi", 3)] * 2
    assert ranks_pool(1, ordered, 0, {}) == [("random", 3)]
    assert ranks_pool(1, ordered, 1, {}) == [("quasi", 3)]
    assert ranks_pool(2, ordered, 0, {"order": "random"}) == [("random", 3)] * 2
    assert ranks_pool(1, ordered, 0, {"order": "quasi", "window": 8}) == [("quasi", 8)]
    assert ranks_pool(1, ordered, 1, {"batch": 2}) == [("random", 3)]  # a checkpoint from before there was a choice


WAIT_S, WORK_S = 4.0, 6.0  # how long an exchange may take, and how long the work does


def opened(ranks: Ranks, slow: tuple[int, ...], failing: int) -> tuple[str, list[tuple[float, float]]]:
    """(what host_by_host returned or raised, when each rank's work began and ended) on two machines of two ranks."""
    control = dist.new_group(backend="gloo")
    assert isinstance(control, dist.ProcessGroup)
    # Afterwards: that the ranks find each other takes its time, too.
    control.set_timeout(timedelta(seconds=WAIT_S))
    mine = replace(ranks, control=control, local_rank=ranks.rank % 2, local_world=2)
    begun = [0.0, 0.0]

    def work() -> str:
        begun[0] = time.monotonic()
        time.sleep(WORK_S if ranks.rank in slow else 0.0)
        begun[1] = time.monotonic()
        if ranks.rank == failing:
            raise DataError(f"{ranks.rank} has no such file")
        return f"of {ranks.rank}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastsimclr.distributed.ranks.WORK_S", 0.1)
        try:
            said = mine.host_by_host(work)
        except DataError as error:
            said = f"DataError {error}"
    times = ranks.gather((begun[0], begun[1]))  # of one clock: all ranks of the pool are on this machine
    dist.destroy_process_group(control)
    return said, times


def test_work_may_take_longer_than_an_exchange(ranks_pool: Pool) -> None:
    found = ranks_pool(4, opened, (2,), -1)
    assert [said for said, _ in found] == [f"of {rank}" for rank in range(4)]
    (_, times), *_ = found
    assert times[2][1] - times[2][0] > WAIT_S
    for first, then in ((0, 1), (2, 3), (0, 3), (2, 1)):  # nobody begins before every machine is ready
        assert times[then][0] >= times[first][1]


@pytest.mark.parametrize("failing", [0, 2, 3])
def test_an_error_of_one_is_raised_on_all(ranks_pool: Pool, failing: int) -> None:
    found = ranks_pool(4, opened, (), failing)
    assert [said for said, _ in found] == [f"DataError {failing} has no such file"] * 4
    (_, times), *_ = found
    if failing in (0, 2):
        assert times[1] == times[3] == (0.0, 0.0)  # the others of the machines need not begin


def alone(ranks: Ranks) -> str:
    return ranks.host_by_host(lambda: "made")


def test_one_process_just_works(ranks_pool: Pool) -> None:
    assert ranks_pool(1, alone) == ["made"]


def test_a_failure_while_ranks_speak_reaches_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """One fails after it has said in an exchange that all is well, and before that exchange ends."""
    monkeypatch.setattr("fastsimclr.distributed.ranks.WORK_S", 0.05)
    meeting, said = threading.Barrier(2, timeout=5), [None, None]
    speaking, failed, exchanges = threading.Event(), threading.Event(), 0

    class Two:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def gather(self, value: Any) -> list[Any]:
            nonlocal exchanges
            said[self.rank] = value
            meeting.wait()
            heard = list(said)
            if self.rank == 0 and (exchanges := exchanges + 1) == 2:
                speaking.set()
                assert failed.wait(5)
                time.sleep(0.2)  # until it is known beside the one who speaks
            meeting.wait()
            return heard

    def fails() -> None:
        assert speaking.wait(5)
        failed.set()
        raise OSError("the disk is full")

    ended: list[BaseException | None] = [None, None]

    def work(rank: int, make: Callable[[], None]) -> None:
        try:
            Ranks._while_at_work(Two(rank), make)  # type: ignore[arg-type]
        except BaseException as error:
            ended[rank] = error

    threads = [
        threading.Thread(target=work, args=(rank, make)) for rank, make in enumerate((fails, lambda: time.sleep(1)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [(type(error), str(error)) for error in ended] == [(OSError, "the disk is full")] * 2
