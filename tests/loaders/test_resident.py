"""Where a data set is held: what fits where, and one answer for all ranks whatever each of them sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsimclr.loaders.backends import resident as resident_module
from fastsimclr.loaders.backends.resident import choose_placement
from fastsimclr.loaders.data import DataConfig
from fastsimclr.loaders.sets.basic import ArraySource, SyntheticSource
from fastsimclr.loaders.source import DataError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SOURCE = SyntheticSource(1024, 32, 2)  # 3 MiB decoded
MIB = 2**20


@dataclass(frozen=True)
class Seen:
    """Peers of which the others have `free` bytes and take a source for `needed` bytes."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    free: int = 2**40
    needed: int = 0

    def gather(self, value: Any) -> list[Any]:
        others = [(self.needed, self.free)] * (self.world - 1) if isinstance(value, tuple) else []
        return [value, *others]

    def exchange(self, data: Tensor, sent: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        raise AssertionError("nothing is exchanged yet")


def place(monkeypatch: pytest.MonkeyPatch, device: torch.device, free: int, seen: Seen, **keys: Any) -> tuple[int, str]:
    monkeypatch.setattr(resident_module, "free_bytes", lambda _: free)
    found = choose_placement(SOURCE, DataConfig(**keys), device, seen)
    return found.decoding_ranks, found.why


@pytest.mark.parametrize(
    ("free_mib", "world", "here", "parts", "words"),
    [
        (6, 1, 1, 1, "resident: 3 MiB decoded, the limit of 3 MiB a device"),
        (5, 1, 1, 0, "native, not resident: synthetic takes 3 MiB decoded, over the limit of 2.5 MiB a device"),
        (6, 8, 4, 1, "resident, whole on each device: 3 MiB decoded, the limit of 3 MiB a device"),
        (5, 8, 4, 4, "resident, sharded over the 4 ranks of a machine: 3 MiB decoded, the limit of 2.5 MiB a device"),
        (1, 8, 4, 8, "resident, sharded over all 8 ranks: 3 MiB decoded, the limit of 512 KiB a device"),
        (0.7, 8, 4, 0, "synthetic takes 3 MiB decoded, over the limit of 358 KiB a device and of all 8"),
    ],
)
def test_what_fits_where_on_gpus(
    monkeypatch: pytest.MonkeyPatch, free_mib: float, world: int, here: int, parts: int, words: str
) -> None:
    seen = Seen(0, world, 0, here)
    found, why = place(monkeypatch, GPU, int(free_mib * MIB), seen)
    assert (found, why[-len(words) :]) == (parts, words)
    again, _ = place(monkeypatch, GPU, 0, seen, resident_gib=free_mib / 2048)
    assert again == parts
    # As the rank with the least memory says, and the one that takes it for the largest.
    if world > 1:
        assert place(monkeypatch, GPU, 2**40, Seen(0, world, 0, here, free=int(free_mib * MIB)))[0] == parts
        assert place(monkeypatch, GPU, 2**30, Seen(0, world, 0, here, needed=2**40))[0] == 0


def test_ranks_on_cpus_share_the_limit_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(monkeypatch, CPU, 6 * MIB, Seen(0, 1, 0, 1))[0] == 1
    assert place(monkeypatch, CPU, 6 * MIB, Seen(0, 4, 0, 2))[0] == 2
    assert place(monkeypatch, CPU, 6 * MIB - 2, Seen(0, 4, 0, 2))[0] == 0  # more machines hold no more


def test_what_is_not_to_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(monkeypatch, CPU, 2**40, Seen(0, 1, 0, 1), loader="native") == (0, "native")
    empty = ArraySource("none", np.empty((0, 2, 2, 3), np.uint8), [], ())
    assert choose_placement(empty, DataConfig(loader="resident"), CPU).fill() is None
    seen = Seen(0, 2, 0, 2)
    with pytest.raises(DataError, match=r"data.loader=resident, but synthetic takes 3 MiB .* and of all 2; use auto"):
        place(monkeypatch, GPU, 2 * MIB, seen, loader="resident")

    class Remote(SyntheticSource):
        whole_fits = False

        def read(self, index: int) -> Any:
            raise AssertionError("fetched, to learn its size")

    found = choose_placement(Remote(4, 4, 2), DataConfig(), CPU)
    assert found.decoding_ranks == 0
    assert found.why.startswith("native, not resident: synthetic takes more than its cache, over the limit of ")
