"""Data held decoded by several ranks: the batches of one process in every bit, and one copy of it in their memory."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from fastsimclr.distributed.ranks import Ranks
from fastsimclr.loaders import Batch, DataConfig, EvalLoader, Policy, Resident, Source, TrainLoader, choose_placement
from fastsimclr.loaders.backends import held
from fastsimclr.loaders.backends.resident import Placement
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.writer import BetonWriter
from fastsimclr.loaders.cut import Crops
from fastsimclr.loaders.order import epoch_order
from fastsimclr.loaders.sets.basic import FileSource, SyntheticSource
from fastsimclr.recipe import Recipe
from fastsimclr.runs.stop import Stopped
from fastsimclr.runtime.device import Runtime
from fastsimclr.stages import Setting
from fastsimclr.training.feed import Feed
from tests.exchanges import Exchanges
from tests.loading import hold
from tests.training.test_trainer import BATCH, SOURCE, TOTAL, At, fit, job

Pool = Callable[..., list[Any]]
How = Literal["shared", "shared by two machines", "sharded", "sharded in pairs"]
CPU = torch.device("cpu")
N, STEPS, B, SEED = 23, 6, 12, 5
# Of 2 parts the second begins with 11, of 4 with 5, 11, 17. A run over the end of a part, and one over the end of all.
BAD = (10, 11, 12, 16, 22, 0)
Row = tuple[int, int, int, list[int], bytes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images of different sizes, six of them damaged."""
    root = tmp_path_factory.mktemp("files")
    draw = np.random.default_rng(0)
    for k in range(N):
        Image.fromarray(draw.integers(0, 256, (3 + k, 40 - k, 3), dtype=np.uint8)).save(root / f"{k:02}.png")
    for k in BAD:
        (root / f"{k:02}.png").write_bytes(b"not an image")
    return root


def files(root: Path) -> FileSource:
    return FileSource("files", root, [f"{k:02}.png" for k in range(N)], [0] * N, np.arange(N) % 3, ("a", "b", "c"))


def settings(**keys: Any) -> DataConfig:
    return DataConfig(**{"threads": 1, "max_bad_fraction": 0.5, "loader": "resident", **keys})


def resident(source: Source, ranks: Ranks, how: How, data: DataConfig) -> Resident:
    """`source` held as CPUs do, or as GPUs do where it does not fit one: by all ranks, or by every two."""
    if how == "shared by two machines":
        ranks = replace(ranks, local_world=ranks.world // 2, local_rank=ranks.rank % (ranks.world // 2))
    if how.startswith("shared"):
        found = hold(source, data, CPU, peers=ranks)
    else:
        parts = 2 if how == "sharded in pairs" else ranks.world
        place = Placement(
            source=source, config=data, device=CPU, peers=ranks, decoding_ranks=parts, expected=100, why=""
        )
        found = place.fill()
    assert found is not None
    return found


def rows(batch: Batch) -> list[Row]:
    columns = [column.tolist() for column in (batch.ids, batch.epochs, batch.labels, batch.sizes)]
    pixels = [batch.images.image(row).numpy().tobytes() for row in range(len(batch))]
    return list(zip(*columns, pixels, strict=True))


def held_batches(ranks: Ranks, root: Path, how: How, data: DataConfig, extent: int) -> dict[str, Any]:
    """What a rank reads in training, in its part of an evaluation, and in one of all images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held, "GIB", extent)  # the least length of an extent
        patch.setattr(held, "CHUNK", 3)
        source = files(root)
        kept = resident(source, ranks, how, data)
        rank, world = ranks.rank, ranks.world
        train = TrainLoader(source, data, batch=B, seed=SEED, stop=STEPS, rank=rank, world=world, resident=kept)
        part = EvalLoader(source, data, batch=4, rank=rank, world=world, resident=kept)
        every = EvalLoader(source, data, batch=4, resident=kept)
        sent: list[Sequence[int]] = []
        patch.setattr(Ranks, "exchange", noting(sent, Ranks.exchange))
        with Exchanges() as exchanged:
            runs = {name: [rows(batch) for batch in loader] for name, loader in (("train", train), ("part", part))}
            runs["every"] = [rows(batch) for batch in every]
        counts = {"exchanges": len(exchanged.names), "sent": np.sum(sent, axis=0, dtype=np.int64).tolist()}
        return {**runs, **counts, "bad": kept.damage.bad, "name": train.name}


def noting(sent: list[Sequence[int]], exchange: Callable[..., Any]) -> Callable[..., Any]:
    """`exchange`, with a list of how much was sent to each rank."""

    def noted(ranks: Ranks, data: torch.Tensor, counts: Sequence[int], received: Sequence[int]) -> Any:
        sent.append(counts)
        return exchange(ranks, data, counts, received)

    return noted


def by_hand(root: Path) -> Callable[[int, int], Row]:
    """(epoch, id) -> its row, by a plain loop over the files."""

    def row(epoch: int, index: int) -> Row:
        shown = index
        while shown in BAD:
            shown = (shown + 1) % N
        pixels = np.asarray(Image.open(root / f"{shown:02}.png"))
        return index, epoch, shown % 3, list(pixels.shape[:2]), pixels.tobytes()

    return row


@pytest.mark.parametrize(
    ("world", "how", "extent"),
    [
        (1, "shared", 2**30),
        (2, "shared", 2**30),
        (4, "shared", 1500),  # extents of one to four images
        (4, "shared by two machines", 1500),
        (2, "sharded", 2**30),
        (4, "sharded", 2**30),
        (4, "sharded in pairs", 2**30),
    ],
)
def test_batches_are_those_of_one_process(ranks_pool: Pool, folder: Path, world: int, how: How, extent: int) -> None:
    found = ranks_pool(world, held_batches, folder, how, settings(max_pixels=500), extent)
    row = by_hand(folder)
    order = [(epoch, index) for epoch in range(4) for index in epoch_order(N, SEED, epoch).tolist()]
    for step in range(STEPS):
        whole = [one for rank in found for one in rank["train"][step]]
        assert whole == [row(*place) for place in order[step * B : (step + 1) * B]]
    sound = [row(0, index) for index in range(N) if index not in BAD]
    assert [one for rank in found for batch in rank["part"] for one in batch] == sound
    for number, rank in enumerate(found):
        assert [one for batch in rank["every"] for one in batch] == sound
        assert sorted(rank["bad"]) == sorted(BAD)
        assert all("is not an image" in reason for reason in rank["bad"].values())
        assert rank["name"] == "resident"
        # One a batch, and none in an evaluation of which each rank holds its part.
        exchanges = {"sharded": STEPS + 6, "sharded in pairs": STEPS + 2 + 6}
        assert rank["exchanges"] == exchanges.get(how, 0)
        if how == "sharded in pairs":  # nothing to the other pair
            assert [bool(count) for count in rank["sent"]] == [other // 2 == number // 2 for other in range(world)]


def exchanged(ranks: Ranks) -> tuple[list[int], int]:
    """Rank r sends r * k values to rank k, all of them 10 * r + k."""
    me, world = ranks.rank, ranks.world
    sent = [me * k for k in range(world)]
    data = torch.cat([torch.full((me * k,), 10 * me + k, dtype=torch.uint8) for k in range(world)])
    both = [ranks.exchange(data, sent, [k * me for k in range(world)]) for _ in range(2)]  # two under way
    return both[0]().tolist(), len(both[1]())


@pytest.mark.parametrize("world", [1, 4])
def test_exchange_of_runs_of_different_lengths(ranks_pool: Pool, world: int) -> None:
    for me, (came, again) in enumerate(ranks_pool(world, exchanged)):
        assert came == [10 * k + me for k in range(world) for _ in range(k * me)]
        assert again == len(came)


def few(ranks: Ranks) -> list[Row]:
    source = SyntheticSource(2, 4, 2)
    loader = EvalLoader(source, settings(), batch=5, resident=resident(source, ranks, "sharded", settings()))
    return [row for batch in loader for row in rows(batch)]


def test_fewer_images_than_ranks(ranks_pool: Pool) -> None:
    source = SyntheticSource(2, 4, 2)
    for said in ranks_pool(4, few):
        assert [(row[0], row[4]) for row in said] == [(k, source.read(k).tobytes()) for k in range(2)]


def refused(ranks: Ranks, root: Path, how: How, act: str, rank: int) -> str:
    """What a rank says of data that cannot be held, which `act` brings about on one of them."""
    with pytest.MonkeyPatch.context() as patch:
        data = (
            settings(max_bad_fraction=0.2)
            if act == "damage"
            else settings(loader="auto" if act == "auto" else "resident")
        )
        if ranks.rank == rank and act == "full":
            patch.setattr(os, "pwrite", Failing(OSError(errno.ENOSPC, "No space left on device")))
        if ranks.rank == rank and act == "bug":
            patch.setattr(FileSource, "read", Failing(KeyError("a bug")))
        if ranks.rank == rank and act in ("apart", "auto"):
            patch.setattr(
                os, "open" if rank else "memfd_create", Failing(PermissionError(errno.EACCES, "Not permitted"))
            )
        try:
            if act == "auto":
                return choose_placement(files(root), data, CPU, ranks).why
            resident(files(root), ranks, how, data)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "held"


class Failing:
    """Called, it raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *_: object) -> Any:
        raise self.error


@pytest.mark.parametrize("how", ["shared", "sharded"])
def test_too_much_damage_is_one_error_on_all_ranks(ranks_pool: Pool, folder: Path, how: How) -> None:
    said = ranks_pool(2, refused, folder, how, "damage", 0)
    assert said[0] == said[1]
    assert "DataError: files: at least 6 of 23 images are damaged, over data.max_bad_fraction=0.2" in said[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_reaches_all(ranks_pool: Pool, folder: Path, rank: int) -> None:
    full = ranks_pool(2, refused, folder, "shared", "full", rank)
    assert "No space left on device" in full[rank]
    assert full[1 - rank].startswith(f"DataError: rank {rank}, while decoding files: ")
    assert "No space left on device" in full[1 - rank]
    assert all("a bug" in text for text in ranks_pool(2, refused, folder, "sharded", "bug", rank))


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_cannot_share_memory(ranks_pool: Pool, folder: Path, rank: int) -> None:
    start = f"rank {rank} cannot share memory with the ranks of its machine: "
    for text in ranks_pool(2, refused, folder, "shared", "apart", rank):
        assert text.startswith(f"DataError: data.loader=resident, but {start}")
        assert text.endswith("Not permitted; use auto or raise data.resident_gib")
    for text in ranks_pool(2, refused, folder, "shared", "auto", rank):
        assert text.startswith(f"native, not resident: {start}")


def without_memfd(ranks: Ranks, root: Path, place: Path) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(os, "memfd_create")
        patch.setattr(tempfile, "tempdir", str(place))
        kept = resident(files(root), ranks, "shared", settings())
        assert kept.images.image(1).numpy().tobytes() == by_hand(root)(0, 1)[4]
        return [path.name for path in place.iterdir()]


def test_where_there_is_no_memfd_a_file_without_a_name_is_shared(
    ranks_pool: Pool, folder: Path, tmp_path: Path
) -> None:
    assert ranks_pool(2, without_memfd, folder, tmp_path) == [[], []]


def chosen(ranks: Ranks, free: list[int], loader: str) -> tuple[str, Any]:
    """Which loader a Setting chooses on a rank that sees `free` bytes of its own."""
    recipe = Recipe(device="cpu", data=DataConfig(loader=loader), views=Policy(size=8))  # type: ignore[arg-type]
    runtime = Runtime(device=CPU, precision="fp32", ranks=ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastsimclr.stages.setting.choose_runtime", lambda *_: runtime)
        patch.setattr("fastsimclr.loaders.backends.resident.free_bytes", lambda _: free[ranks.rank])
        setting = Setting(recipe)
        name = setting.loader_name(setting.splits.train)
        ids = [row[0] for batch in setting.passes(setting.splits.train) for row in rows(batch)]
        return name, ids


FITS = "resident, one copy for the 2 ranks of a machine: 270 KiB decoded, the limit of 270 KiB a machine"
OVER = "native, not resident: digits:train takes 270 KiB decoded, over the limit of 270 KiB a machine"
DIGITS = 1438 * 192  # bytes


@pytest.mark.parametrize(
    ("free", "loader", "name"),
    [
        ([2 * DIGITS, 2 * DIGITS + 7], "auto", FITS),
        ([2 * DIGITS - 2, 10 * DIGITS], "auto", OVER),
        ([10 * DIGITS, 10 * DIGITS], "native", "native"),
    ],
    ids=["fits", "over", "native"],
)
def test_all_ranks_choose_alike_by_the_one_with_the_least_memory(
    ranks_pool: Pool, free: list[int], loader: str, name: str
) -> None:
    found = ranks_pool(2, chosen, free, loader)
    assert [said for said, _ in found] == [name, name]
    assert [index for _, ids in found for index in ids] == list(range(1438))


class Unreadable(FileSource):
    """Files of which one cannot be read on one rank."""

    failing = False

    def read(self, index: int) -> bytes:
        if self.failing and index == 3:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(index)


def whole_on_each(ranks: Ranks, root: Path) -> tuple[list[int], list[int], bytes]:
    sound = files(root)
    source = Unreadable(sound.name, root, sound.names, [0] * N, sound.labels, sound.classes)
    source.failing = ranks.rank == 1
    data = settings(max_bad_fraction=0.5)
    found = Placement(
        source=source, config=data, device=CPU, peers=ranks, decoding_ranks=1, expected=100, why=""
    ).fill()
    assert found is not None
    pixels = [found.images.image(k).numpy().tobytes() for k in range(N)]
    return sorted(found.damage.bad), found.labels.tolist(), b"".join(pixels)


def test_where_each_device_holds_all_damage_on_one_is_damage_on_all(ranks_pool: Pool, folder: Path) -> None:
    one, other = ranks_pool(2, whole_on_each, folder)
    assert one == other and one[0] == sorted({*BAD, 3})
    assert one[1][3] == 4 % 3 and one[1][2] == 2


def training(ranks: Ranks, run: Path, how: How, stop_at: int | None) -> tuple[str, dict[str, Any], int]:
    """A training of held data, and how many batches were asked of the loader; SIGTERM to the last rank at a step."""
    data, asked = settings(), 0
    kept = resident(SOURCE, ranks, how, data)

    def batches(start: int, stop: int, crops: Crops) -> Iterable[Batch]:
        part: Any = {"rank": ranks.rank, "world": ranks.world, "resident": kept}
        return TrainLoader(SOURCE, data, batch=BATCH, seed=0, start=start, stop=stop, crops=crops, **part)

    def act() -> None:
        if stop_at is not None and ranks.rank == ranks.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluate() -> None:  # other exchanges, while a batch is on its way
        nonlocal asked
        asked += sum(len(batch) for batch in EvalLoader(SOURCE, data, batch=7, resident=kept))

    hooks = (At(4, evaluate), At(stop_at or TOTAL, act))
    given = replace(job(run, hooks=hooks, resume=stop_at is None), batches=batches)
    # On a CPU a loader cuts torchvision's crops itself, rounded to bytes, where no image is on another rank.
    given = replace(given, policy=replace(given.policy, semantics="tensorflow"))
    try:
        trainer = fit(given, Runtime(device=CPU, precision="fp32", ranks=ranks), checkpoint_every_steps=100)
    except Stopped as stop:
        return str(stop), {}, asked
    return "", {key: value for key, value in trainer.last.items() if key in ("loss", "accuracy")}, asked


@pytest.fixture(scope="module")
def trained(ranks_pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the ranks return of a training whose data each of them sees as a whole."""
    return ranks_pool(2, training, tmp_path_factory.mktemp("trained") / "shared", "shared", None)


def test_training_with_exchanges(ranks_pool: Pool, trained: list[Any], tmp_path: Path) -> None:
    assert ranks_pool(2, training, tmp_path / "sharded", "sharded", None) == trained
    assert [asked for *_, asked in trained] == [40, 40]


@pytest.mark.slow
def test_training_with_exchanges_goes_on_after_a_stop(ranks_pool: Pool, trained: list[Any], tmp_path: Path) -> None:
    stopped = ranks_pool(2, training, tmp_path / "stopped", "sharded", 5)
    assert all(f"stopped at step 7 of {TOTAL}" in text for text, *_ in stopped)
    assert [last for _, last, _ in ranks_pool(2, training, tmp_path / "stopped", "sharded", None)] == [
        last for _, last, _ in trained
    ]


def in_a_thread(ranks: Ranks) -> tuple[str, bool]:
    kept = resident(SOURCE, ranks, "sharded", settings())
    loader = TrainLoader(SOURCE, settings(), batch=8, seed=0, stop=2, rank=ranks.rank, world=2, resident=kept)
    runtime = Runtime(device=CPU, precision="fp32", ranks=ranks)
    crops = Crops(policy=Policy(size=8), seed=0, views=2)
    with Feed(loader, crops, runtime) as feed:
        right = [len(shipment.ids) for shipment in feed] == [4, 4]
    try:
        with Feed(iter(loader), crops, runtime) as feed:
            next(feed)
    except RuntimeError as error:
        return str(error), right
    return "", right


def test_images_are_exchanged_in_the_thread_that_trains(ranks_pool: Pool) -> None:
    for said, right in ranks_pool(2, in_a_thread):
        assert right
        assert said == "images of other ranks were asked for in a second thread; ask in the one that trains"


def memory() -> dict[str, int]:
    """This process's own and shared memory in bytes; of shared memory that k processes use, each has a k-th."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    table = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return {kind: 1024 * int(table[f"Pss_{kind}"].split()[0]) for kind in ("Anon", "Shmem")}


def grown(ranks: Ranks, path: Path | None) -> dict[str, int]:
    """Bytes by which a rank's memory grows with data: a packed file's, or those held where there is none."""

    def load(images: int) -> dict[str, int]:
        source: Source = SyntheticSource(images, SIDE, 2) if path is None else BetonSource(path)
        world, seen = ranks.world, 0
        loader: Iterable[Batch]
        if path is None:
            loader = EvalLoader(source, settings(), batch=8, resident=resident(source, ranks, "shared", settings()))
        else:
            steps, data = images // (4 * world), settings(loader="native")
            loader = TrainLoader(source, data, batch=4 * world, seed=0, stop=steps, rank=ranks.rank, world=world)
        for batch in loader:
            seen += sum(bool(batch.images.image(row).sum() > 0) for row in range(len(batch)))
        assert seen == (images if path is None else images // world)
        ranks.wait()
        found = memory()  # while the loader is there
        ranks.wait()
        return found

    load(32)  # what libraries and their threads set up once
    before, after = load(32), load(IMAGES)
    return {kind: after[kind] - before[kind] for kind in before}


IMAGES, SIDE = 320, 224
DATA = 3 * SIDE * SIDE * (IMAGES - 32)  # 41 MiB more than at first
SOME = 20 * 2**20  # half of that; malloc keeps some


@pytest.mark.parametrize("world", [1, 2, 4])
def test_another_rank_takes_no_more_memory_for_held_data(ranks_pool: Pool, world: int) -> None:
    taken = ranks_pool(world, grown, None)
    shared = sum(rank["Shmem"] for rank in taken)
    if world == 1:
        assert shared < SOME and abs(taken[0]["Anon"] - DATA) < SOME
    else:
        assert abs(shared - DATA) < 2**20 and max(rank["Anon"] for rank in taken) < SOME


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "noise.beton"
    writer = BetonWriter(path, IMAGES, 2**21)
    source = SyntheticSource(IMAGES, SIDE, 2)
    for row in range(IMAGES):
        writer.add(row, source.read(row).tobytes(), SIDE, SIDE, True)
    writer.finish([0] * IMAGES)
    writer.close()
    return path


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_that_read_a_packed_file_hold_batches_only(ranks_pool: Pool, packed: Path, world: int) -> None:
    assert all(max(rank.values()) < SOME for rank in ranks_pool(world, grown, packed))
