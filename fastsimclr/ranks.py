"""The processes of one run: who they are, what they exchange, and which of them failed."""

# W ranks, N rows of a rank, C columns

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
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
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store, Work
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

BEAT_S = 1.0  # between two signs of life of a rank
SILENT_S = 4.0  # without one, a rank counts as gone
GRACE_S = 15.0  # for a rank to end by itself once another has failed
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the W processes of a run, as torchrun numbers them; by default it is alone.

    group: the process group of tensors on the run's device, None where alone. control: a gloo group for what the hosts
    tell each other, never used for tensors of the device, so that asking it waits for no kernel.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    group: ProcessGroup | None = None
    control: ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that writes files and talks."""
        return self.rank == 0

    @property
    def hosts(self) -> int:
        """How many machines, each with the same number of ranks."""
        return self.world // self.local_world

    def on_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; an exception of it is raised on every rank.

        The others need not see the files that it reads. The value must be picklable, its tensors on the CPU.
        """
        if self.world == 1:
            return make()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.control)
        if box[1] is not None:
            raise box[1]
        return box[0]  # type: ignore[no-any-return]

    def host_by_host(self, make: Callable[[], T]) -> T:
        """What `make` returns; the first rank of each machine goes ahead, so that the others find what it downloads."""
        if self.world == 1:
            return make()
        value = make() if self.local_rank == 0 else None
        self.wait()
        return make() if value is None else value

    def wait(self) -> None:
        """Go on when every rank is here."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def same(self, what: str, value: object) -> None:
        """ValueError, on every rank, where the ranks have different values of `what`."""
        values = self.gather(value)
        for other, found in enumerate(values):
            if found != values[0]:
                raise ValueError(
                    f"rank {other} has {what} {found!r}, rank 0 has {values[0]!r}; every rank must see the same:"
                    " give all machines the same files and options"
                )

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks, a new tensor. values: any shape, the same on all ranks, on the run's device."""
        values = values.clone()
        if self.world > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def gather_rows(self, rows_NC: Tensor) -> Tensor:
        """All ranks' rows in the order of the ranks: [N, ...], N different on each, -> [sum of N, ...]."""
        if self.world == 1:
            return rows_NC
        counts = self.gather(len(rows_NC))
        padded = rows_NC.new_zeros(max(counts), *rows_NC.shape[1:])
        padded[: len(rows_NC)] = rows_NC
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class Agreement:
    """The largest of what the ranks propose, one step later and without waiting: all ranks hear it at the same step."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: tuple[Work, Tensor] | None = None

    def propose(self, value: int) -> int:
        """Offer `value` (0: nothing) for this step; returns the largest of the previous step, alone of this one."""
        if self._ranks.world == 1:
            return value
        before = self.settle()
        mine = torch.tensor(value)
        work = dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._ranks.control, async_op=True)
        assert work is not None
        self._pending = work, mine
        return before

    def final(self, value: int) -> int:
        """After the last step: the largest of what is still under way and of `value` of every rank."""
        before = self.settle()
        last = self.propose(value)
        return max(before, last, self.settle())

    def settle(self) -> int:
        """Wait for what was proposed last, and return the largest; 0 where nothing is under way."""
        if self._pending is None:
            return 0
        work, value = self._pending
        self._pending = None
        work.wait()
        return int(value)


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
            device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
            dist.init_process_group(
                backend,
                store=PrefixStore("groups", self.store),
                rank=mine.rank,
                world_size=mine.world,
                timeout=wait,
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
        global _watch
        if _watch is not None:
            _watch.stop()
            _watch = None
        _disconnect()

    def blame(self, error: Exception, text: str) -> str | None:
        """What to say of an error that ends this rank, which alone is `text`: None where another rank says it.

        An error of an exchange is the echo of another rank's end: that one is named, as the one that failed, that shows
        no sign of life, or that is steps behind. Takes seconds.
        """
        if self.store is None:
            return text
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun stops all ranks of a machine when one has failed
        mine = self.ranks.rank
        store, text = PrefixStore("watch", self.store), f"rank {mine} of {self.ranks.world}, {self.host}: {text}"
        try:
            said = _wait_for_failure(store) if _is_echo(error) else None
            if said is None:
                text = (self._suspects(store) or text) if _is_echo(error) else text
                own = json.dumps([mine, self.host, text])
                said = store.compare_set("failed", "", own).decode()
        except (RuntimeError, OSError):  # the store is gone, with the machine that kept it
            return text
        by, host, reason = json.loads(said)
        if by == mine:
            _tell_torchrun(text)
            return text
        return None if host == self.host or self.ranks.local_rank else f"ended, because of {reason}"

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
            who = ", ".join(f"{place[r]} is at step {steps[r]}" for r in behind)
            return f"{who}, the others at {max(steps)}: it did not come to an exchange in time (trainer.timeout_s)"
        return None


_connected: Ranks | None = None
_watch: _Watch | None = None
_reached = 0  # the step of this rank, for the others to see


def reached(step: int) -> None:
    """Tell the watch how far this rank is."""
    global _reached
    _reached = step


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
    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=600))))
    ranks = Ranks(rank=rank, world=world, local_rank=local_rank, local_world=local_world)
    return Launch(ranks=ranks, store=store)


def _disconnect() -> None:
    global _connected
    _connected = None
    if dist.is_initialized():
        dist.destroy_process_group()


class _Watch(threading.Thread):
    """Beats, and looks whether another rank has failed."""

    def __init__(self, launch: Launch) -> None:
        super().__init__(name="watch", daemon=True)
        assert launch.store is not None
        self._launch = launch
        self._store = PrefixStore("watch", launch.store.clone())  # a client of its own: the other one may block
        self._ended = threading.Event()

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        rank, beat = self._launch.ranks.rank, 0
        while not self._ended.wait(BEAT_S if beat else 0):
            beat += 1
            try:
                self._store.set(f"beat/{rank}", json.dumps([beat, _reached, self._launch.host]))
                failed = self._store.check(["failed"])
            except (RuntimeError, OSError):
                failed = True
            if failed and not self._ended.wait(GRACE_S):
                os._exit(1)  # the main thread hangs in an exchange that cannot end


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
