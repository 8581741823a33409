"""How torchrun starts a rank, and how the ranks find out which of them failed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store
from torch.distributed.rendezvous import rendezvous

from fastsimclr.distributed.ranks import Ranks

T = TypeVar("T")

BEAT_S = 1.0  # between two signs of life of a rank
SILENT_S = 4.0  # without one, a rank counts as gone
GRACE_S = 15.0  # for a rank to end by itself once another has failed
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What torchrun set up before any process group: the ranks' numbers, and the store through which they meet."""

    ranks: Ranks = field(default_factory=Ranks)
    store: Store | None = None
    host: str = field(default_factory=socket.gethostname)

    def connect(self, backend: Literal["gloo", "nccl"], timeout_s: float) -> Ranks:
        """Form the process groups, once; later calls return the same ranks. Alone it does nothing.

        timeout_s: how long a rank waits for the others in one exchange.
        """
        if self.store is None:
            return self.ranks
        global _connected
        if _connected is None:
            mine, wait = self.ranks, timedelta(seconds=timeout_s)
            # NCCL's watchdog aborts without a word: gloo, which asks every step too, is to speak before it.
            late = wait + timedelta(seconds=60) if backend == "nccl" else wait
            device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
            dist.init_process_group(
                backend,
                store=PrefixStore("groups", self.store),
                rank=mine.rank,
                world_size=mine.world,
                timeout=late,
                device_id=device,
            )
            control = dist.new_group(backend="gloo", timeout=wait)
            assert isinstance(control, ProcessGroup)
            _connected = Ranks(
                rank=mine.rank,
                world=mine.world,
                local_rank=mine.local_rank,
                local_world=mine.local_world,
                group=dist.group.WORLD,
                control=control,
            )
        return _connected

    def enter(self) -> None:
        """Begin to tell the others that this rank lives, and to end it where another has failed and it hangs."""
        global _watch
        if self.store is not None:
            _watch = _Watch(self)
            _watch.start()

    def wait(self) -> None:
        """Go on when every rank is here: rank 0 may hold the store that the others need."""
        if _connected is not None:
            _connected.wait()

    def leave(self) -> None:
        """End what `enter` and `connect` began."""
        global _connected, _watch
        _connected = None
        if dist.is_initialized():
            dist.destroy_process_group()
        if _watch is not None:  # last, for the rest may hang where another rank has failed
            if _watch.failed and self.ranks.is_first and not _agent_keeps_the_store():
                time.sleep(2 * BEAT_S)  # the others look into this process's store for the reason
            _watch.stop()
            _watch = None

    def blame(self, error: Exception, text: str) -> str | None:
        """What to say of an error that ends this rank, which alone is `text`: None where another rank says it.

        An error of an exchange is the echo of another rank's end: that one is named, as the one that failed, that shows
        no sign of life, or that is steps behind. Takes seconds.
        """
        if self.store is None:
            return text
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun stops all ranks of a machine when one has failed
        mine = self.ranks.rank
        text = f"rank {mine} of {self.ranks.world}, {self.host}: {text}"
        said = None
        if _watch is not None:
            _watch.failed, said = True, _watch.heard
        try:
            said = said or _in_time(lambda: self._reason(error, text), 3 * SILENT_S)
        except (RuntimeError, OSError):
            return self._without_store(error, text)
        by, host, reason = json.loads(said)
        if by == mine:
            _tell_torchrun(reason)
            return str(reason)
        return None if host == self.host or self.ranks.local_rank else f"ended, because of {reason}"

    def _reason(self, error: Exception, text: str) -> str:
        """What the first rank to fail says, as JSON of (rank, host, text); this one is first where no other was."""
        assert self.store is not None
        store = PrefixStore("watch", self.store)
        said = _wait_for_failure(store) if _is_echo(error) else None
        if said is None:
            if _is_echo(error):
                text = self._suspects(store) or f"{text} (every rank lives, none is behind; see trainer.timeout_s)"
            own = json.dumps([self.ranks.rank, self.host, text])
            said = store.compare_set("failed", "", own).decode()
        return said

    def _without_store(self, error: Exception, text: str) -> str | None:
        """What to say where the store is gone, with what kept it: one rank of each other machine says so."""
        if not _is_echo(error):
            return text
        if self.ranks.local_rank and self.ranks.rank != 1:
            return None
        return _lost_store()

    def _suspects(self, store: Store) -> str | None:
        before = _beats(store, self.ranks.world)
        time.sleep(SILENT_S)
        now = _beats(store, self.ranks.world)
        silent = [r for r, beat in enumerate(now) if beat == before[r] and r != self.ranks.rank]
        place = [f"rank {r} on {beat[2]}" if beat else f"rank {r}" for r, beat in enumerate(now)]
        if silent:
            who = ", ".join(place[r] for r in silent)
            return f"{who} shows no sign of life: killed, out of memory, or its machine is gone; see its own log"
        steps = [beat[1] if beat else 0 for beat in now]
        behind = [r for r, step in enumerate(steps) if step < max(steps)]
        if behind:
            who = ", ".join(f"{place[r]} has done {steps[r]} steps" for r in behind)
            return f"{who}, the others {max(steps)}: it did not come to an exchange in time (trainer.timeout_s)"
        return None


_connected: Ranks | None = None
_watch: _Watch | None = None
_steps = 0  # of this rank, over all stages


def step_done() -> None:
    """Tell the other ranks that this one is a step further."""
    global _steps
    _steps += 1


@cache
def launched() -> Launch:
    """What torchrun says of this process; alone where it was not started by torchrun, or as the only one.

    ValueError where the variables that torchrun sets are there in part.
    """
    given = [name for name in _VARIABLES if name in os.environ]
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return Launch()
    if missing := [name for name in _VARIABLES if name not in given]:
        raise ValueError(
            f"{given[0]} is set but {', '.join(missing)} not; start several ranks by torchrun, or unset {given[0]}"
        )
    rank, world, local_rank, local_world = (int(os.environ[name]) for name in _VARIABLES[:4])
    if world == 1:
        return Launch()
    if world % local_world:
        raise ValueError(
            f"{world} ranks in all and {local_world} on this machine: every machine must run the same number;"
            " give each torchrun the same --nproc-per-node"
        )
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) if _agent_keeps_the_store() else 0
    if restarts and world > local_world:
        raise ValueError(
            f"torchrun --max-restarts {restarts} over several machines needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in"
            " the environment of every torchrun: without it ranks that start again find what the last ones left"
        )
    store: Store
    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=600))))
    if restarts:
        store = PrefixStore(f"restart/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    ranks = Ranks(rank=rank, world=world, local_rank=local_rank, local_world=local_world)
    return Launch(ranks=ranks, store=store)


class _Watch(threading.Thread):
    """Beats, and looks whether another rank has failed; then it gives this one time to end, and ends it."""

    def __init__(self, launch: Launch) -> None:
        super().__init__(name="watch", daemon=True)
        assert launch.store is not None
        self._launch = launch
        self._store = PrefixStore("watch", launch.store.clone())  # a client of its own: the other one may block
        self._ended = threading.Event()
        self.heard: str | None = None  # what the first rank to fail said, as `Launch.blame` reads it
        self.failed = False  # this rank has

    def stop(self) -> None:
        self._ended.set()
        self.join(2 * BEAT_S)  # a call to a store whose machine is gone may not come back

    def run(self) -> None:
        beat, lost = 0, 0
        while not self._ended.wait(BEAT_S if beat else 0):
            beat += 1
            try:
                said = self._beat(beat)
                lost = 0
            except (RuntimeError, OSError) as error:
                lost += 1
                said = f"{_lost_store()} ({error})" if lost > 2 else None
            if said is not None and not self._ended.wait(GRACE_S):
                if self._launch.ranks.local_rank == 0:
                    print(f"error: ended, because of {said}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread hangs in an exchange that cannot end

    def _beat(self, number: int) -> str | None:
        """Why another rank failed, if one did."""
        self._store.set(f"beat/{self._launch.ranks.rank}", json.dumps([number, _steps, self._launch.host]))
        if not self._store.check(["failed"]):
            return None
        said = self._store.get("failed").decode()
        by, _, reason = json.loads(said)
        if by == self._launch.ranks.rank:
            return "an end that does not come"
        self.heard = said
        return str(reason)


def _agent_keeps_the_store() -> bool:
    """Whether torchrun holds the store of the run; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _lost_store() -> str:
    keeper = "torchrun" if _agent_keeps_the_store() else "rank 0"
    return (
        f"{keeper} at {os.environ.get('MASTER_ADDR')}, which keeps the store of the run, does not answer: killed,"
        " out of memory, or its machine is gone; see its own log"
    )


def _in_time(ask: Callable[[], T], limit_s: float) -> T:
    """What `ask` returns. TimeoutError where it takes longer: a store whose machine is gone may never answer."""
    found: list[T] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            found.append(ask())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="asks", daemon=True)
    thread.start()
    thread.join(limit_s)
    if failures:
        raise failures[0]
    if not found:
        raise TimeoutError(f"no answer in {limit_s} s")
    return found[0]


def _beats(store: Store, world: int) -> list[list[Any] | None]:
    keys = [f"beat/{rank}" for rank in range(world)]
    return [json.loads(store.get(key)) if store.check([key]) else None for key in keys]


def _wait_for_failure(store: Store) -> str | None:
    """What another rank says, if one comes forward within some seconds."""
    until = time.monotonic() + SILENT_S
    while time.monotonic() < until:
        if store.check(["failed"]):
            return store.get("failed").decode()
        time.sleep(0.1)
    return None


_ECHOES = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "process group", "timed out after")


def _is_echo(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(word in str(error).lower() for word in _ECHOES)


def _tell_torchrun(text: str) -> None:
    """Leave the message where torchrun looks for it, for its own report."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        said = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(said))
