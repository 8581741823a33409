"""The processes of one run, and what they exchange."""

# W ranks, N rows of a rank, C columns

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup, Work

T = TypeVar("T")

WORK_S = 1.0  # between two signs of a rank at work to those that wait for it


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
    def is_first(self) -> bool:
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
        value, failure = None, None
        if self.is_first:
            try:
                value = make()
            except Exception as error:
                failure = error
        box: list[Any] = [value, None if failure is None else _portable(failure)]
        dist.broadcast_object_list(box, src=0, group=self.control)
        if failure is not None:
            raise failure
        if box[1] is not None:
            raise box[1]
        return box[0]  # type: ignore[no-any-return]

    def host_by_host(self, make: Callable[[], T]) -> T:
        """What `make` returns; the first rank of each machine goes ahead, so that the others find what it downloads.

        It may take longer than the others wait in one exchange: they hear every second that it is at work. `make` must
        exchange nothing. An exception of it is raised on every rank.
        """
        if self.world == 1:
            return make()
        goes_ahead = self.local_rank == 0
        first, then = (self._while_at_work(make if mine else None) for mine in (goes_ahead, not goes_ahead))
        return cast(T, first if goes_ahead else then)

    def _while_at_work(self, make: Callable[[], T] | None) -> T | None:
        """What `make` returns, once no rank is at work any more; None where this one has nothing to make.

        It is a thread that speaks and listens, and the work stays in the main one, which Ctrl-C ends.
        """
        failures: dict[int, Exception] = {}
        ended, value = threading.Event(), None

        def speak() -> None:
            try:
                while True:
                    over, mine = ended.wait(WORK_S), failures.get(self.rank)
                    heard = self.gather((over, mine and _portable(mine)))
                    for rank, (_, error) in enumerate(heard):
                        if error is not None:
                            failures.setdefault(rank, error)
                    # What all have heard, not what this rank knows: it leaves the exchanges when the others do.
                    if any(error is not None for _, error in heard) or all(done for done, _ in heard):
                        return
            except Exception as error:  # of the exchange
                failures.setdefault(self.rank, error)

        speaker = threading.Thread(target=speak, name="at work", daemon=True)
        speaker.start()
        try:
            value = None if make is None else make()
        except Exception as error:
            failures[self.rank] = error
        except BaseException:
            ended.set()
            speaker.join(2 * WORK_S)
            raise
        ended.set()
        speaker.join()
        if failures:
            raise failures.get(self.rank) or failures[min(failures)]
        return value

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

    def same(self, name: str, value: object) -> None:
        """ValueError, on every rank, where the ranks have different values of `name`."""
        values = self.gather(value)
        for other, found in enumerate(values):
            if found != values[0]:
                raise ValueError(
                    f"rank {other} has {name} {found!r}, rank 0 has {values[0]!r}; every rank must see the same:"
                    " give all machines the same files and options"
                )

    def exchange(self, data: Tensor, sent: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        """Begin to give every rank its run of `data`; what it returns waits and gives the runs that came.

        data: [sum of sent], contiguous, on the run's device, in the order of the ranks; sent and received: how many
        values go to each rank and come from each. On a GPU the device waits, not the host. Every rank calls it, at the
        same place among everything else that they exchange of the device's tensors.
        """
        if self.world == 1:
            return lambda: data
        arrived = data.new_empty(sum(received))
        work = dist.all_to_all_single(arrived, data, list(received), list(sent), group=self.group, async_op=True)
        assert work is not None

        def wait() -> Tensor:
            work.wait()
            return arrived

        return wait

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


def _portable(error: Exception) -> Exception:
    """`error`, or one that says the same where it does not survive the way to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
