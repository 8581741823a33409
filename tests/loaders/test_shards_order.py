"""Remote shards in a quasi-random order: each fetched once an epoch, by any number of ranks, through a small cache."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from fastsimclr.loaders import DataConfig, DataError, EvalLoader, Subset, TrainLoader, open_data, write_index
from fastsimclr.loaders.batch import Batch
from fastsimclr.loaders.shards.cache import ShardCache
from fastsimclr.loaders.shards.source import ShardSource, open_shards
from tests.loaders.pictures import encoded
from tests.loaders.tars import tar
from tests.loaders.web import Web, kept, listed, until

pytestmark = pytest.mark.usefixtures("quick")

SHARDS, PER_SHARD, SIZE = 12, 24, 51200
N = SHARDS * PER_SHARD
PATTERN = f"t-{{00..{SHARDS - 1:02d}}}.tar"


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Twelve shards of 24 images of 8 x 8 pixels, all of one size."""
    random, made = np.random.default_rng(0), {}
    for k in range(SHARDS):
        images = [Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(PER_SHARD)]
        pictures = [(f"{k:02d}-{i:02d}.png", encoded(image, "PNG")) for i, image in enumerate(images)]
        made[f"/t-{k:02d}.tar"] = tar([f for f in pictures for f in (f, (f[0][:5] + ".cls", b"%d" % (k % 2)))])
    assert {len(data) for data in made.values()} == {SIZE}
    return made


@pytest.fixture
def shop(web: Web, files: dict[str, bytes], tmp_path: Path) -> Web:
    """The web server with these shards and their index."""
    web.files = dict(files)
    listed(web, tmp_path)
    return web


def opened(web: Web, folder: Path, room: int) -> ShardSource:
    """The shards, with a cache for `room` of them."""
    return open_shards(f"{web.url}/{PATTERN}", ShardCache(folder, limit=room * SIZE))


def loader(source: Any, order: Literal["auto", "random"] = "auto", batch: int = 8, **keys: Any) -> TrainLoader:
    """Two epochs, in windows of 2 shards."""
    config = DataConfig(loader="native", threads=2, order=order, window=2)
    return TrainLoader(source, config, batch=batch, seed=5, **{"stop": 2 * len(source) // batch, **keys})


def fetches(web: Web) -> Counter[str]:
    return Counter(path for method, path, _, _ in web.asked if method == "GET" and path != "/index.json")


def assert_fetched(web: Web, times: int) -> None:
    """Each shard so often, or once less an epoch: some of the four that are there at its end may come next."""
    found = fetches(web)
    assert max(found.values()) <= times
    assert len(found) == SHARDS and found.total() >= (SHARDS - 4) * times


def ids(batches: list[Batch]) -> list[int]:
    return [i for batch in batches for i in batch.ids.tolist()]


def test_each_shard_is_fetched_once_an_epoch(shop: Web, tmp_path: Path) -> None:
    source = opened(shop, tmp_path / "cache", room=4)
    train = loader(source)
    assert train.order == "quasi"
    seen = ids(list(train))
    assert sorted(seen[:N]) == sorted(seen[N:]) == list(range(N))
    assert_fetched(shop, 2)
    assert len(list((tmp_path / "cache").glob("*.tar"))) <= 4
    assert len(source._cache.handles) == 0  # nothing is kept from other processes any more


def test_a_full_permutation_fetches_them_again_and_again(shop: Web, tmp_path: Path) -> None:
    list(loader(opened(shop, tmp_path / "cache", room=4), "random", stop=6))
    assert fetches(shop).total() > 2 * SHARDS  # for 48 images of 288


@pytest.mark.parametrize("hosts", [1, 2])
def test_ranks_of_a_machine_share_what_is_fetched(
    shop: Web, tmp_path: Path, hosts: int, caplog: pytest.LogCaptureFixture
) -> None:
    sources = [opened(shop, tmp_path / f"cache-{rank % hosts}", room=4) for rank in range(4)]
    loaders = [loader(source, rank=rank, world=4) for rank, source in enumerate(sources)]
    seen = [i for step in zip(*loaders, strict=True) for i in ids(list(step))]
    assert sorted(seen[:N]) == sorted(seen[N:]) == list(range(N))
    assert_fetched(shop, 2 * hosts)  # each machine fetches all, once an epoch
    assert "come next" not in caplog.text


def test_a_part_of_the_images_is_read_in_the_order_of_its_shards(shop: Web, tmp_path: Path) -> None:
    source = Subset(opened(shop, tmp_path / "cache", room=4), np.arange(1, N, 3))
    train = loader(source, batch=2)  # small, or the batches in the making would need more shards than there is room for
    assert train.order == "quasi"
    assert sorted(ids(list(train))) == sorted(2 * list(range(len(source))))
    assert_fetched(shop, 2)


def test_evaluation_fetches_each_shard_once(shop: Web, tmp_path: Path) -> None:
    config = DataConfig(loader="native", threads=2)
    sources = [opened(shop, tmp_path / "cache", room=8) for _ in range(2)]
    both = [EvalLoader(source, config, batch=10, rank=rank, world=2) for rank, source in enumerate(sources)]
    assert sorted(i for step in zip(*both, strict=True) for i in ids(list(step))) == list(range(N))
    assert set(fetches(shop).values()) == {1}


def test_an_iteration_left_early_fetches_no_more(shop: Web, tmp_path: Path) -> None:
    source = opened(shop, tmp_path / "cache", room=6)
    for number, _ in enumerate(train := loader(source)):
        if number == 3:
            break
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "fetch"])
    assert len(source._cache.handles) == 0
    before = fetches(shop).total()
    assert 2 <= before <= 6
    train.close()
    assert fetches(shop).total() == before


def test_a_cache_too_small_for_the_windows_is_told_of(
    shop: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    list(loader(opened(shop, tmp_path / "cache", room=2), stop=10))
    told = [record for record in caplog.messages if "shards that come next" in record]
    assert len(told) == 1
    assert told[0].startswith(
        f"shards:{PATTERN}: the 4 shards that come next take 0.00 GiB, far more than data.cache_gib=0.00"
    )
    assert told[0].endswith("some may be fetched several times; raise it, or lower data.window")


def test_a_cache_left_too_full_comes_down(shop: Web, tmp_path: Path) -> None:
    whole = opened(shop, tmp_path / "cache", room=0)
    assert [whole.read(i) for i in whole.blocks[:-1].tolist()]
    assert len(kept(whole._cache)) == SHARDS
    small = opened(shop, tmp_path / "cache", room=4)
    small.read(N - 1)  # is there: nothing is fetched
    assert kept(small._cache) == [f"t-{k:02d}.tar" for k in range(8, 12)]  # the last that were used
    whole.read(0)
    assert len(kept(whole._cache)) == 5
    opened(shop, tmp_path / "cache", room=4).expect([])
    assert len(kept(whole._cache)) == 4


def test_a_disk_that_the_shards_would_fill_is_told_of(
    shop: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "not" / "there" / "yet"
    asked = list[Path]()

    def usage(path: Path) -> Any:
        asked.append(path)
        return type("Usage", (), {"free": SHARDS * SIZE - 1})

    monkeypatch.setattr(shutil, "disk_usage", usage)
    source = opened(shop, cache, room=0)
    assert asked == [tmp_path]
    assert (
        f"GiB of shards are still to be fetched, data.cache={cache} has 0.0 GiB free; set data.cache_gib" in caplog.text
    )
    caplog.clear()
    source.read(0)
    opened(shop, cache, room=0)  # a shard less to fetch
    opened(shop, cache, room=4)
    assert "still to be fetched" not in caplog.text


# ---- an index that lies elsewhere


def test_an_index_elsewhere_serves_training_and_validation(
    shop: Web, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del shop.files["/index.json"]
    for name, data in files.items():
        place = tmp_path / ("val" if name == "/t-11.tar" else "train") / name[1:]
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(data)
    folders = [str(tmp_path / "train"), str(tmp_path / "val")]
    (place,) = write_index(folders, ShardCache(tmp_path / "c0"), out=str(tmp_path / "new" / "index"))
    assert place == f"{tmp_path}/new/index/index.json"
    write_index(folders[0], ShardCache(tmp_path / "c0"))
    monkeypatch.setattr("fastsimclr.loaders.shards.index_files.scan_shard", None)
    keys = {
        "root": f"{shop.url}/t-{{00..10}}.tar",
        "val": f"{shop.url}/t-11.tar",
        "cache": str(tmp_path / "c1"),
        "index": str(tmp_path / "new" / "index"),
    }
    splits = open_data(DataConfig(source="shards", **keys))  # type: ignore[arg-type]
    assert (len(splits.unlabelled), len(splits.val)) == (11 * PER_SHARD, PER_SHARD)
    assert fetches(shop).total() == 0
    here = open_data(DataConfig(source="shards", **keys | {"root": folders[0], "val": folders[1]}))  # type: ignore[arg-type]
    assert here.unlabelled.fingerprint == splits.unlabelled.fingerprint
    assert here.unlabelled.read(30) == splits.unlabelled.read(30)
    with pytest.raises(DataError, match=r"t-11\.tar is not listed in .*/train/index\.json; write it again"):
        open_shards(folders[1], ShardCache(tmp_path / "c0"), index=folders[0] + "/")
    with pytest.raises(DataError, match=r"data\.index=.*/val holds no index\.json; fastsimclr index SHARDS --out"):
        open_shards(folders[1], ShardCache(tmp_path / "c0"), index=folders[1])
    with pytest.raises(ValueError, match=r"data\.index=here must be left out: it is for data\.source=shards"):
        DataConfig(index="here")


def test_shards_that_an_index_could_not_tell_apart(files: dict[str, bytes], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.tar").write_bytes(files["/t-00.tar"])
    both, cache = f"{tmp_path}/{{a,b}}/t.tar", ShardCache(tmp_path / "c")
    with pytest.raises(DataError, match=r"a/t\.tar and .*/b/t\.tar have one name, by which index\.json knows shards"):
        write_index(both, cache, out=str(tmp_path))
    assert not (tmp_path / "index.json").exists()
    assert write_index(both, cache) == [f"{tmp_path}/a/index.json", f"{tmp_path}/b/index.json"]


def test_labels_that_no_run_could_use_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for name, label in (("0", b"1"), ("1", b"ant")):
        (tmp_path / f"{name}.tar").write_bytes(tar([(f"{name}.jpg", b"x"), (f"{name}.cls", label)]))
    with pytest.raises(DataError, match=r"labels mix class numbers and names \(.*/0\.tar: 0\.jpg has the label 1;"):
        write_index(str(tmp_path), ShardCache(tmp_path / "c"))
    write_index(f"{tmp_path}/0.tar", ShardCache(tmp_path / "c"))
    with pytest.raises(DataError, match="labels mix"):  # with what is listed already
        write_index(f"{tmp_path}/1.tar", ShardCache(tmp_path / "c"))
    with pytest.raises(DataError, match=r"has the label 1, which is none of the 1 classes"):
        write_index(f"{tmp_path}/0.tar", ShardCache(tmp_path / "c"), classes=["ant"], out=str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
