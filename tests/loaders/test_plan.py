"""What TrainLoader plans: each image once a permutation, equal batches, resumed anywhere at any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastsimclr.loaders import (
    ArraySource,
    DataConfig,
    DataError,
    EvalLoader,
    FetchError,
    Relabelled,
    Subset,
    TrainLoader,
)
from fastsimclr.loaders.batch import Batch
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.order import choose_order
from fastsimclr.loaders.shards.cache import ShardCache
from fastsimclr.loaders.shards.source import ShardSource, open_shards
from tests.loaders.pictures import encoded
from tests.loaders.tars import write_tar

Asked = Literal["random", "quasi"]
ORDERS = st.sampled_from(("random", "quasi"))
BLOCKS = st.lists(st.integers(0, 40), min_size=1, max_size=30)
WORLDS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)


class Blocks(ArraySource):
    """Images of one pixel in blocks of these sizes, that can be at hand at once or not; it keeps what it was told."""

    def __init__(self, sizes: list[int], fits: bool = True) -> None:
        n = sum(sizes)
        super().__init__("blocks", np.arange(3 * n, dtype=np.uint8).reshape(n, 1, 1, 3), np.zeros(n), ("a",))
        self.blocks = np.cumsum([0, *sizes])
        self.whole_fits = fits
        self.told: list[list[int]] = []
        self.read_unannounced = 0

    def expect(self, ids: npt.ArrayLike) -> None:
        self.told.append(np.asarray(ids, dtype=np.int64).tolist())

    def block(self, index: int) -> int:
        return int(np.searchsorted(self.blocks, index, side="right")) - 1

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        told = {self.block(i) for i in self.told[-1]} if self.told else set()
        self.read_unannounced += self.block(index) not in told
        return super().read(index)


def plan(source: ArraySource, order: Asked, window: int, world: int, batch: int, start: int, stop: int) -> list[Any]:
    """[steps][ranks] of (epochs, ids), each rank by a loader of its own."""
    config = DataConfig(order=order, window=window)
    steps = {"batch": batch, "seed": 7, "start": start, "stop": stop}
    loaders = [TrainLoader(source, config, rank=rank, world=world, **steps) for rank in range(world)]  # type: ignore[arg-type]
    return list(zip(*(loader.plan() for loader in loaders), strict=True))


def pairs(steps: list[Any]) -> list[tuple[int, int]]:
    """(epoch, id) of every sample of `plan`, rank after rank."""
    return [pair for step in steps for epochs, ids in step for pair in zip(epochs.tolist(), ids.tolist(), strict=True)]


@given(BLOCKS, ORDERS, st.integers(1, 6), st.integers(1, 64), st.integers(1, 3), st.integers(1, 3))
def test_each_image_once_a_permutation_in_equal_batches(
    sizes: list[int], order: Asked, window: int, world: int, part: int, epochs: int
) -> None:
    batch = world * part
    source = Blocks([*sizes, batch])  # a batch may not be larger than the source
    n = len(source)
    steps = plan(source, order, window, world, batch, 0, -(-n * epochs // batch))
    assert {len(ids) for step in steps for _, ids in step} == {part}
    assert all(epochs.dtype == ids.dtype == np.int64 for step in steps for epochs, ids in step)
    assert sorted(pairs(steps)[: n * epochs]) == [(epoch, i) for epoch in range(epochs) for i in range(n)]


@given(BLOCKS, ORDERS, st.integers(1, 6), st.data())
def test_a_run_goes_on_from_any_step_at_another_number_of_ranks(
    sizes: list[int], order: Asked, window: int, data: st.DataObject
) -> None:
    before = data.draw(st.integers(1, 64))
    after = data.draw(st.sampled_from(WORLDS))
    batch = int(np.lcm(before, after))
    source = Blocks([*sizes, batch])
    n, epochs = len(source), 2
    stop = -(-n * epochs // batch)
    cut = data.draw(st.integers(0, stop))
    first = plan(source, order, window, before, batch, 0, cut)
    then = plan(source, order, window, after, batch, cut, stop)
    seen = pairs(first) + pairs(then)
    assert sorted(seen[: n * epochs]) == [(epoch, i) for epoch in range(epochs) for i in range(n)]
    assert seen == pairs(plan(source, order, window, 1, batch, 0, stop))


# ---- the choice


def test_the_order_that_is_chosen() -> None:
    fitting, large, plain = (
        Blocks([5, 5]),
        Blocks([5, 5], fits=False),
        ArraySource("x", np.zeros((9, 1, 1, 3), "u1"), np.zeros(9), ("a",)),
    )
    assert choose_order(fitting, "auto") == ("random", "all images can be at hand at once")
    assert choose_order(plain, "auto")[0] == "random"
    assert choose_order(large, "auto") == ("quasi", "its shards do not fit data.cache_gib together")
    for part in (Subset(large, [1, 4, 8]), Relabelled(large, np.zeros(10)), Relabelled(Subset(large, [2, 3]), [0, 0])):
        assert choose_order(part, "auto")[0] == "quasi"
    order, reason = choose_order(Subset(large, [4, 1]), "auto")
    assert order == "random" and reason.endswith("its images are not in their order: slow")
    assert choose_order(fitting, "auto", fits=False)[0] == "quasi"  # another machine has less room
    assert choose_order(large, "auto", fits=True)[0] == "random"
    for asked in ("random", "quasi"):
        assert choose_order(large, asked) == choose_order(fitting, asked) == (asked, "as data.order says")
    for source in (plain, Subset(large, [4, 1])):
        with pytest.raises(
            DataError, match=r"data\.order=quasi needs images that lie together .* use data\.order=random"
        ):
            TrainLoader(source, DataConfig(order="quasi"), batch=2, seed=0, stop=1)


def test_a_loader_follows_its_settings() -> None:
    large = Blocks([3] * 8, fits=False)
    keys: dict[str, Any] = {"batch": 6, "seed": 0, "stop": 4}
    auto = TrainLoader(large, DataConfig(window=2), **keys)
    assert auto.order == "quasi"
    first = [{large.block(i) for i in ids.tolist()} for _, ids in auto.plan()]
    assert [len(blocks) for blocks in first] == [2] * 4  # a batch of six is a window of two blocks of three
    assert set.union(*first) == set(range(8))
    random = TrainLoader(large, DataConfig(order="random"), **keys)
    assert random.order == TrainLoader(Blocks([3] * 8), DataConfig(), **keys).order == "random"
    assert max(len({large.block(i) for i in ids.tolist()}) for _, ids in random.plan()) > 3
    with pytest.raises(ValueError, match=r"data\.window=0 must be 1 block or more"):
        DataConfig(window=0)


# ---- what is told to the source


def native(order: Literal["auto", "random", "quasi"], **keys: Any) -> DataConfig:
    return DataConfig(loader="native", threads=2, order=order, **keys)


@pytest.mark.parametrize("world", [1, 3])
def test_blocks_are_told_before_they_are_read_and_no_more_than_is_needed(world: int) -> None:
    sizes = [7, 0, 5, 9, 4, 8, 6, 3, 9, 9, 1, 8]
    batch, stop = 6, 2 * sum(sizes) // 6
    for rank in range(world):
        source = Blocks(sizes, fits=False)
        loader = TrainLoader(source, native("auto", window=2), batch=batch, seed=1, stop=stop, rank=rank, world=world)
        mine = [ids.tolist() for _, ids in loader.plan()]
        assert source.told == []  # a plan alone fetches nothing
        assert [batch.ids.tolist() for batch in loader] == mine
        assert source.read_unannounced == 0
        assert source.told[-1] == []
        told = source.told[:-1]
        assert len(told) == len(mine)
        blocks = [[source.block(i) for i in ids] for ids in told]
        assert all(len(set(some)) == len(some) for some in blocks)
        assert all(set(ids) <= {i for step in mine for i in step} for ids in told)  # of this rank, and of this run
        # In the order of need: the first told is that of the oldest batch in the making.
        assert blocks[0][0] == source.block(mine[0][0])
        # Beyond the batch that is planned, and 5 at most in the making: the rest of its window of 2, and one more.
        of = [{source.block(i) for i in ids} for ids in mine]
        for number, some in enumerate(blocks):
            assert of[number] <= set(some)
            later = set(some) - set().union(*of[max(0, number - 5) : number + 1])
            assert len(later) <= 2 + 2


def failing(index: int) -> bytes:
    raise FetchError("the line is cut")


def test_what_is_told_at_the_end_of_an_iteration() -> None:
    source = Blocks([4] * 6, fits=False)
    keys: dict[str, Any] = {"batch": 4, "seed": 0, "stop": 60}
    loader = TrainLoader(source, native("quasi", window=2), **keys)
    for _ in loader:
        break
    assert source.told[-1] == [] and len(source.told) > 1
    with loader:
        next(iteration := iter(loader))
        assert source.told[-1] != []
    assert source.told[-1] == []
    del iteration
    source.told.clear()
    source.__dict__["read"] = failing
    with pytest.raises(FetchError, match="the line is cut"):
        list(loader)
    assert source.told[-1] == []


def test_who_reads_nothing_or_everything_tells_nothing() -> None:
    keys: dict[str, Any] = {"batch": 4, "seed": 0, "stop": 9}
    source = Blocks([4] * 6)
    list(TrainLoader(source, native("random"), **keys))
    assert [told for told in source.told if told] == []
    source.told.clear()
    list(TrainLoader(source, DataConfig(loader="synthetic", order="quasi"), **keys))
    assert source.told == []
    bare = Subset(ArraySource("x", source.pixels, source.labels, ("a",)), np.arange(24))
    list(TrainLoader(bare, native("random"), **keys))  # a source that hears nothing


@pytest.mark.parametrize("world", [1, 2, 5])
def test_evaluation_tells_the_blocks_in_their_order(world: int) -> None:
    sizes = [0, 7, 0, 0, 5, 9, 4, 1, 1, 1, 8, 0]
    for rank in range(world):
        source = Blocks(sizes, fits=False)
        loader = EvalLoader(source, native("auto"), batch=3, rank=rank, world=world)
        ids = [i for batch in loader for i in batch.ids.tolist()]
        assert ids == list(loader.rank_ids)
        assert source.read_unannounced == 0
        assert source.told[-1] == []
        for told in source.told[:-1]:
            blocks = [source.block(i) for i in told]
            assert blocks == sorted(set(blocks))
            assert set(told) <= set(loader.rank_ids)
        filled = [k for k, size in enumerate(sizes) if size]
        here = [k for k in filled if set(range(source.blocks[k], source.blocks[k + 1])) & set(loader.rank_ids)]
        assert source.block(source.told[0][0]) == here[0]
        assert sorted({source.block(i) for told in source.told for i in told}) == here


# ---- real tars, natively


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardSource, dict[int, npt.NDArray[np.uint8]]]:
    """Five shards of 5 to 9 images, and the pixels of each id."""
    folder, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    pixels: dict[int, npt.NDArray[np.uint8]] = {}
    for k, size in enumerate((7, 5, 9, 8, 7)):
        files = []
        for _ in range(size):
            index = len(pixels)
            pixels[index] = random.integers(0, 256, (6 + index % 5, 9, 3), dtype=np.uint8)
            files += [(f"{index:03d}.png", png(pixels[index])), (f"{index:03d}.cls", b"%d" % (index % 3))]
        write_tar(folder / f"{k}.tar", files)
    return open_shards(str(folder), ShardCache(folder / "cache")), pixels


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    return encoded(Image.fromarray(pixels), "PNG")


def whole_batches(source: ShardSource, order: Asked, world: int, start: int, stop: int) -> list[list[Batch]]:
    """[steps][ranks] of native batches of 12 images over all ranks, one loader a rank, all at the same time."""
    keys: dict[str, Any] = {"batch": 12, "seed": 3, "start": start, "stop": stop, "world": world}
    loaders = [TrainLoader(source, native(order, window=2), rank=rank, **keys) for rank in range(world)]
    return [list(step) for step in zip(*loaders, strict=True)]


@pytest.mark.parametrize("order", ["random", "quasi"])
@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 3), (3, 2), (4, 1), (3, 4)])
def test_a_native_run_goes_on_at_another_number_of_ranks(
    shards: tuple[ShardSource, dict[int, npt.NDArray[np.uint8]]], order: Asked, before: int, after: int
) -> None:
    source, pixels = shards
    n = len(source)
    assert n == 36
    steps = whole_batches(source, order, before, 0, 4) + whole_batches(source, order, after, 4, 9)  # three epochs
    seen = [(e, i) for step in steps for b in step for e, i in zip(b.epochs.tolist(), b.ids.tolist(), strict=True)]
    assert sorted(seen) == [(epoch, i) for epoch in range(3) for i in range(n)]
    assert [epoch for epoch, _ in seen] == sorted(epoch for epoch, _ in seen)
    assert [len(batch) for step in steps for batch in step] == [12 // before] * 4 * before + [12 // after] * 5 * after
    for batch in (batch for step in steps for batch in step):
        for k, index in enumerate(batch.ids.tolist()):
            assert np.array_equal(batch.images.image(k).numpy(), pixels[index])
            assert int(batch.labels[k]) == index % 3
    alone = whole_batches(source, order, 1, 0, 9)
    assert seen == [(e, i) for (b,) in alone for e, i in zip(b.epochs.tolist(), b.ids.tolist(), strict=True)]


def test_quasi_reads_few_shards_at_a_time(shards: tuple[ShardSource, Any], tmp_path: Path) -> None:
    source, _ = shards
    ids = [i for (batch,) in whole_batches(source, "quasi", 1, 0, 3) for i in batch.ids.tolist()]
    of_shard = np.searchsorted(source.blocks, ids, side="right") - 1
    changes = [set(of_shard[a : a + 5].tolist()) for a in range(0, 36, 5)]
    assert max(map(len, changes)) <= 4  # two windows of two at most
    begun_and_not_ended = [len(set(of_shard[:k].tolist()) & set(of_shard[k:].tolist())) for k in range(1, 36)]
    assert max(begun_and_not_ended) <= 2


def test_pages_of_a_packed_file(whole: Path) -> None:
    source = BetonSource(whole)
    assert source.blocks is not None and len(source.blocks) > 4  # four pages or more
    config, keys = native("quasi", window=2), {"batch": 8, "seed": 0}
    assert TrainLoader(source, native("auto"), stop=1, **keys).order == "random"  # type: ignore[arg-type]
    n = len(source)
    ids = [i for batch in TrainLoader(source, config, stop=n // 8, **keys) for i in batch.ids.tolist()]  # type: ignore[arg-type]
    assert len(set(ids)) == n // 8 * 8
    pages = source.starts[ids] // source.page_bytes
    begun = [len(set(pages[:k].tolist()) & set(pages[k:].tolist())) for k in range(1, len(pages))]
    assert max(begun) == 2
