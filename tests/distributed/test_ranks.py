"""What the ranks exchange, how they agree on a stop, and how one names the rank that failed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from fastsimclr.distributed import torchrun as launch
from fastsimclr.distributed.ranks import Agreement, Ranks
from fastsimclr.distributed.torchrun import Launch
from fastsimclr.loaders import DataConfig, TrainLoader
from fastsimclr.loaders.cut import Crops
from fastsimclr.runs import checkpoint
from fastsimclr.runs.stop import Stopped
from fastsimclr.runtime.device import Runtime
from tests.training.test_trainer import BATCH, SOURCE, TOTAL, At, fit, job

Pool = Callable[..., list[Any]]


def exchanged(ranks: Ranks) -> dict[str, Any]:
    rows = torch.arange(3.0 * ranks.rank).reshape(ranks.rank, 3) + ranks.rank  # none on rank 0
    found: dict[str, Any] = {
        "rows": ranks.gather_rows(rows),
        "total": ranks.total(torch.tensor([1.0, ranks.rank])),
        "gathered": ranks.gather(f"rank {ranks.rank}"),
        "first": ranks.on_first(lambda: {"from": ranks.rank}),
    }

    class Local(Exception):
        """Pickle cannot find it."""

    def fail() -> None:
        raise Local("the reason")

    try:
        ranks.on_first(fail)
    except Exception as error:
        found["local"] = f"{type(error).__name__} {error}"
    for name, act in {
        "on_first": lambda: ranks.on_first(lambda: {}["key"]),
        "same": lambda: ranks.same("the number", min(ranks.rank, 2)),
    }.items():
        try:
            act()
        except (KeyError, ValueError) as error:
            found[name] = f"{type(error).__name__} {error}"
    return found


@pytest.mark.parametrize("world", [1, 4])
def test_every_rank_hears_the_same(ranks_pool: Pool, world: int) -> None:
    rows = torch.cat([torch.arange(3.0 * r).reshape(r, 3) + r for r in range(world)])
    for found in ranks_pool(world, exchanged):
        assert torch.equal(found["rows"], rows)
        assert found["total"].tolist() == [world, sum(range(world))]
        assert found["gathered"] == [f"rank {r}" for r in range(world)]
        assert found["first"] == {"from": 0}
        assert found["on_first"] == "KeyError 'key'"
        assert found["local"] in ("Local the reason", "RuntimeError Local: the reason")
        if world > 1:
            assert found["same"].startswith("ValueError rank 1 has the number 1, rank 0 has 0; every rank must see")


def agreed(ranks: Ranks) -> list[int]:
    agreement = Agreement(ranks)
    heard = [agreement.propose(ranks.rank if step == 2 else 0) for step in range(5)]
    return [*heard, agreement.final(7 if ranks.rank == 1 else 0)]


def test_a_proposal_is_heard_by_all_at_the_next_step(ranks_pool: Pool) -> None:
    assert ranks_pool(4, agreed) == [[0, 0, 0, 3, 0, 7]] * 4
    assert ranks_pool(1, agreed) == [[0, 0, 0, 0, 0, 0]]


def shares(ranks: Ranks) -> Callable[[int, int, Crops], TrainLoader]:
    """The batches of a rank."""

    def batches(start: int, stop: int, crops: Crops) -> TrainLoader:
        data = DataConfig(loader="native", threads=1)
        part: Any = {"rank": ranks.rank, "world": ranks.world}
        return TrainLoader(SOURCE, data, batch=BATCH, seed=0, start=start, stop=stop, crops=crops, **part)

    return batches


def stopped(ranks: Ranks, run: Path, rank: int, moment: int, checkpoint_every_steps: int) -> str:
    """The message with which a training ends in which one rank gets SIGTERM while a hook runs after step `moment`."""

    def act() -> None:
        if ranks.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    given = replace(job(run, hooks=(At(moment, act),)), batches=shares(ranks))
    runtime = Runtime(device=torch.device("cpu"), precision="fp32", ranks=ranks)
    try:
        fit(given, runtime, checkpoint_every_steps=checkpoint_every_steps)
    except Stopped as stop:
        return str(stop)
    return "ran to the end"


@pytest.mark.parametrize(
    ("world", "rank"), [(2, 1), *(pytest.param(*ends, marks=pytest.mark.slow) for ends in [(2, 0), (4, 3)])]
)
def test_sigterm_to_one_rank_stops_all_at_one_step(ranks_pool: Pool, tmp_path: Path, world: int, rank: int) -> None:
    said = ranks_pool(world, stopped, tmp_path, rank, 3, 100)
    (saved,) = checkpoint.saved(tmp_path)
    assert saved.name == "step-00000005.pt"  # proposed after step 4, heard after step 5
    assert said[0] == f"pretrain: stopped at step 5 of {TOTAL}, state saved in {saved}"
    assert all(f"stopped at step 5 of {TOTAL}" in text for text in said)


@pytest.mark.slow
def test_sigterm_after_the_last_step_is_heard_by_all(ranks_pool: Pool, tmp_path: Path) -> None:
    said = ranks_pool(2, stopped, tmp_path, 1, TOTAL, 100)
    assert all(f"stopped at step {TOTAL} of {TOTAL}" in text for text in said)
    assert [path.name for path in checkpoint.saved(tmp_path)] == [f"step-{TOTAL:08d}.pt"]


ECHO = RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2000")


def launches(hosts: tuple[str, ...] = ("a", "a", "b")) -> list[Launch]:
    """Three ranks in one process that meet in one store."""
    store = HashStore()
    return [
        Launch(ranks=Ranks(rank=r, world=3, local_rank=r % 2, local_world=2), store=store, host=host)
        for r, host in enumerate(hosts)
    ]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SILENT_S", 0.2)
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def test_the_first_to_fail_speaks_and_its_echoes_do_not(quick: None, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    zero, one, two = launches()
    assert one.blame(ValueError("no such file"), "no such file") == "rank 1 of 3, a: no such file"
    assert "no such file" in (tmp_path / "error.json").read_text()  # where torchrun's own report takes it from
    assert zero.blame(ECHO, str(ECHO)) is None  # on the same machine as the one that spoke
    assert two.blame(ECHO, str(ECHO)) == "ended, because of rank 1 of 3, a: no such file"
    assert zero.blame(ValueError("no such file"), "no such file") is None  # all ranks had the same error


def test_a_silent_rank_and_a_late_rank_are_named(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    zero, _, _ = launches()

    def beat(steps: dict[int, int]) -> Callable[[float], None]:
        def sleep(seconds: float) -> None:
            for r, step in steps.items():
                said = f'[{time.monotonic_ns()}, {step}, "{"aab"[r]}"]'
                launch.PrefixStore("watch", zero.store).set(f"beat/{r}", said)  # type: ignore[arg-type]

        return sleep

    beat({0: 7, 1: 7, 2: 7})(0)
    monkeypatch.setattr(time, "sleep", beat({0: 7, 1: 7}))
    assert (zero.blame(ECHO, "echo") or "").startswith("rank 2 on b shows no sign of life: killed")
    zero, one, _ = launches()
    beat({0: 7, 1: 7, 2: 6})(0)
    monkeypatch.setattr(time, "sleep", beat({0: 7, 1: 7, 2: 6}))
    said = one.blame(ECHO, "echo") or ""
    assert said.startswith("rank 2 on b has done 6 steps, the others 7: it did not come to an exchange in time")


def test_torchrun_variables_in_part_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE is set but RANK, LOCAL_RANK, .* not; start several ranks"):
        launch.launched.__wrapped__()
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert launch.launched.__wrapped__().ranks.world == 1


TORCHRUN = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def test_restarts_over_machines_need_a_store_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=r"--max-restarts 3 over several .* needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    ):
        launch.launched.__wrapped__()
    monkeypatch.setattr(launch, "rendezvous", lambda *_, **__: iter([(HashStore(), 0, 4)]))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert isinstance(launch.launched.__wrapped__().store, HashStore)


def test_ranks_that_start_again_on_one_machine_do_not_meet_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = HashStore()  # by torchrun, through every restart
    monkeypatch.setattr(launch, "rendezvous", lambda *_, **__: iter([(kept, 0, 2)]))
    for name, value in (TORCHRUN | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    for count in "01":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        store = launch.launched.__wrapped__().store
        assert store is not None and not store.check(["failed"])
        store.set("failed", count)


class Silent:
    """A store whose machine is gone: nothing comes back."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def check(self, keys: list[str]) -> bool:
        time.sleep(self.seconds)
        raise RuntimeError("Connection reset by peer")

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        self.check([key])
        return b""


@pytest.mark.parametrize("seconds", [0.0, 30.0])
def test_a_store_that_is_gone_is_named(quick: None, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(launch, "PrefixStore", lambda _, store: store)
    monkeypatch.setenv("MASTER_ADDR", "node07")
    silent: Any = Silent(seconds)
    zero, one, two = (replace(rank, store=silent) for rank in launches())
    started = time.monotonic()
    gone = "rank 0 at node07, which keeps the store of the run, does not answer: killed, out of memory, or its machine"
    assert (two.blame(ECHO, "echo") or "").startswith(gone)
    assert (one.blame(ECHO, "echo") or "").startswith(gone)
    three = replace(two, ranks=replace(two.ranks, rank=3, local_rank=1))
    assert three.blame(ECHO, "echo") is None  # rank 2, on the same machine, says it
    assert zero.blame(ValueError("no such file"), "no such file") == "rank 0 of 3, a: no such file"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert (two.blame(ECHO, "echo") or "").startswith("torchrun at node07, which keeps the store of the run")
    assert time.monotonic() - started < 20
    heard = '[1, "a", "rank 1 of 3, a: no such file"]'  # by the watch, while there was a store
    monkeypatch.setattr(launch, "_watch", SimpleNamespace(heard=heard, failed=False))
    assert two.blame(ECHO, "echo") == "ended, because of rank 1 of 3, a: no such file"


def resumed(ranks: Ranks, run: Path, micro: int | None) -> str:
    runtime = Runtime(device=torch.device("cpu"), precision="fp32", ranks=ranks)
    given = replace(job(run, resume=True), batches=shares(ranks))
    try:
        fit(given, runtime, micro_batch=micro, bn_groups=1)
    except ValueError as error:
        return str(error)
    return "ran to the end"


@pytest.mark.slow
def test_micro_batches_stay_at_another_number_of_ranks(ranks_pool: Pool, tmp_path: Path) -> None:
    def begin(run: Path, micro: int | None) -> Path:
        given = job(run, hooks=(At(6, lambda: os.kill(os.getpid(), signal.SIGTERM)),))
        with pytest.raises(Stopped):
            fit(given, micro_batch=micro)
        return run

    run, one, whole = (begin(tmp_path / name, micro) for name, micro in (("4", 4), ("1", 1), ("whole", None)))
    (said, other) = ranks_pool(2, resumed, run, 4)
    assert said == other
    assert "was made with micro_batch=4, this run has micro_batch=None" in said, "4 is all that a rank has"
    assert said.endswith("images of all ranks that go through the networks at once; give 2 ranks trainer.micro_batch=2")
    assert ranks_pool(2, resumed, run, None)[0].endswith("give 2 ranks trainer.micro_batch=2")
    assert "which 2 ranks cannot share; start a number of ranks that divides 1" in ranks_pool(2, resumed, one, 1)[0]
    assert ranks_pool(2, resumed, whole, 2)[0].endswith("; leave trainer.micro_batch out")
    assert ranks_pool(2, resumed, run, 2) == ["ran to the end"] * 2
