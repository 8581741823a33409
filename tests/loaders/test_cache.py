"""The cache of fetched shards: its limit, reading ahead, full disks, other threads, processes and kills."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsimclr.loaders.faults import Damage, Reader
from fastsimclr.loaders.order import Order
from fastsimclr.loaders.shards import cache as cache_module
from fastsimclr.loaders.shards.cache import ShardCache, default_cache
from fastsimclr.loaders.shards.remote import CacheError, FetchError, describe
from fastsimclr.loaders.shards.source import open_shards
from fastsimclr.loaders.source import DataError
from tests.loaders.tars import PER_SHARD, SIZE, noise, shard
from tests.loaders.web import ALL, Web, assert_whole, kept, listed, of, status, until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick")


def test_the_least_recently_used_are_given_up(web: Web, tmp_path: Path) -> None:
    listed(web, tmp_path)
    cache = ShardCache(tmp_path / "cache", limit=2 * SIZE + 100)
    source = of(web, cache)
    assert not source.whole_fits
    for number, expected in [(0, "0"), (1, "01"), (0, "01"), (2, "02"), (3, "23"), (2, "23"), (1, "12")]:
        assert source.read(number * PER_SHARD) == noise(number * PER_SHARD)
        assert kept(cache) == [f"t-{k}.tar" for k in expected]
        time.sleep(0.002)  # so that times of use differ on any file system
    assert [len(web.gets(f"/t-{k}.tar")) for k in range(4)] == [1, 2, 1, 1]


def test_shards_in_use_stay(web: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed(web, tmp_path)
    cache = ShardCache(tmp_path / "cache", limit=2 * SIZE)
    source = of(web, cache)
    first, second, *_ = (entry.remote for entry in source.shards)
    assert first is not None and second is not None
    with cache.use(first) as fd, cache.use(second):
        assert source.read(2 * PER_SHARD) == noise(2 * PER_SHARD)  # more than the limit allows, while it is in use
        assert "the shards in use take 0.00 GiB more than data.cache_gib" in caplog.text
        assert source.read(3 * PER_SHARD) == noise(3 * PER_SHARD)
        assert kept(cache) == ["t-0.tar", "t-1.tar"]
        assert os.pread(fd, 5, 0) == b"0000."
    source.read(2 * PER_SHARD)
    assert len(kept(cache)) == 2
    assert "t-2.tar" in kept(cache)
    assert caplog.text.count("the shards in use take") == 1


def test_many_threads_and_room_for_one_shard(web: Web, tmp_path: Path) -> None:
    listed(web, tmp_path)
    cache = ShardCache(tmp_path / "cache", limit=SIZE)
    source = of(web, cache)
    ids = np.random.default_rng(0).integers(0, 4 * PER_SHARD, 150).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, ids)) == [noise(i) for i in ids]
    assert set(kept(cache)) <= set(ALL)


def test_expected_shards_are_fetched_ahead_and_kept(web: Web, tmp_path: Path) -> None:
    listed(web, tmp_path)
    cache = ShardCache(tmp_path / "cache", limit=3 * SIZE)
    source = of(web, cache)
    source.expect([25, 24, 1, 8, 26, 16])  # shards 3, 0, 1, 2, of which three fit
    until(lambda: len(cache.handles) == 3)
    assert kept(cache) == ["t-0.tar", "t-1.tar", "t-3.tar"]
    assert source.read(25) == noise(25)
    source.expect([0, 16])  # 3 and 1 are not needed any more
    until(lambda: kept(cache) == ["t-0.tar", "t-2.tar"] or len(kept(cache)) == 3)
    until(lambda: len(cache.handles) == 2)
    assert {"t-0.tar", "t-2.tar"} < set(kept(cache))
    assert [len(web.gets(f"/t-{k}.tar")) for k in range(4)] == [1] * 4
    source.expect([])
    assert len(cache.handles) == 0
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "fetch"])


def test_in_quasi_random_order_a_small_cache_fetches_each_shard_once_an_epoch(web: Web, tmp_path: Path) -> None:
    web.files = {f"/t-{k:02d}.tar": shard(k) for k in range(12)}
    listed(web, tmp_path)
    source = open_shards(f"{web.url}/t-{{00..11}}.tar", ShardCache(tmp_path / "cache", limit=4 * SIZE))
    order = Order(len(source), 1, source.blocks, window=2)
    seen: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, 2 * len(source), 8):
            source.expect(order.coming(start))
            ids = order.at(start, start + 8)[1].tolist()
            assert list(pool.map(source.read, ids)) == [noise(i) for i in ids]
            seen += ids
    assert sorted(seen) == sorted(2 * list(range(96)))
    # Two epochs of 12 shards, and the first window of the third, which is fetched ahead.
    assert sum(len(web.gets(path)) for path in web.files if path != "/index.json") <= 26
    source.expect([])


def test_the_limit_holds_again_once_nothing_is_in_use(web: Web, tmp_path: Path) -> None:
    listed(web, tmp_path)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads meet in every order
    for turn in range(12):
        cache = ShardCache(tmp_path / f"cache{turn}", limit=3 * SIZE)
        source = of(web, cache)
        ids = np.random.default_rng(turn).permutation(4 * PER_SHARD).tolist()
        with ThreadPoolExecutor(2) as pool:
            for start in range(0, len(ids), 8):
                source.expect(ids[start : start + 16])
                assert list(pool.map(source.read, ids[start : start + 8])) == [noise(i) for i in ids[start : start + 8]]
        until(lambda: not [thread for thread in threading.enumerate() if thread.name == "fetch"])
        assert len(kept(cache)) <= 3
        source.expect([])
    sys.setswitchinterval(before)


def test_fetching_ahead_takes_no_room_from_another_process(web: Web, tmp_path: Path) -> None:
    listed(web, tmp_path)
    ours, theirs = (ShardCache(tmp_path / "cache", limit=2 * SIZE) for _ in range(2))
    of(web, theirs).expect([0, 8])
    until(lambda: len(theirs.handles) == 2)
    source = of(web, ours)
    source.expect([16])
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "fetch"])
    assert kept(ours) == ["t-0.tar", "t-1.tar"]
    assert source.read(16) == noise(16)  # who needs it gets it all the same


def test_a_failure_ahead_is_raised_where_the_shard_is_read(
    web: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed(web, tmp_path)
    source = of(web, ShardCache(tmp_path / "cache", retries=0))
    web.always["/t-1.tar"] = status(500)
    source.expect([8])
    until(lambda: "not fetched ahead" in caplog.text)
    with pytest.raises(FetchError, match="HTTP 500"):
        source.read(8)
    web.always.clear()
    assert source.read(8) == noise(8)


def test_threads_that_wait_for_one_failing_download_fail_with_it(web: Web, tmp_path: Path) -> None:
    listed(web, tmp_path)
    source = of(web, ShardCache(tmp_path / "cache", retries=2))

    def slowly(handler: Any, data: bytes) -> None:
        time.sleep(0.2)
        status(500)(handler, data)

    web.always["/t-0.tar"] = slowly
    together = threading.Barrier(6)

    def read(index: int) -> bytes:
        together.wait()
        return source.read(index)

    with ThreadPoolExecutor(6) as pool:
        failures = [future.exception() for future in [pool.submit(read, i) for i in range(6)]]
    assert all(isinstance(failure, FetchError) for failure in failures)
    assert len(web.gets("/t-0.tar")) == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk(web: Web, cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    listed(web, tmp_path)
    source = of(web, cache)
    pwrite = os.pwrite

    def full(fd: int, data: bytes, at: int) -> int:
        if at + len(data) > 30_000:
            if at < 30_000:
                return pwrite(fd, data[: 30_000 - at], at)
            raise OSError(number, os.strerror(number))
        return pwrite(fd, data, at)

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(CacheError) as caught:
        source.read(0)
    assert f"{web.url}/t-0.tar (61440 bytes) cannot be kept in {cache.folder}: {os.strerror(number)}" in str(
        caught.value
    )
    assert "free space there, lower data.cache_gib, or name another folder in data.cache" in str(caught.value)
    assert kept(cache) == []
    assert len(web.gets("/t-0.tar")) == 1
    with pytest.raises(CacheError):
        Reader(source, Damage(source.name, len(source), 0.9), 10**6).open_next(0)
    monkeypatch.undo()
    assert_whole(source)


def test_a_full_disk_by_the_kernel(
    web: Web, cache: ShardCache, tmp_path: Path, files_up_to: Callable[[int], AbstractContextManager[None]]
) -> None:
    listed(web, tmp_path)
    source = of(web, cache)
    with files_up_to(30_000), pytest.raises(CacheError, match=r"t-0.tar .* cannot be kept in .*: File too large; free"):
        source.read(0)
    assert kept(cache) == []
    assert_whole(source)


def test_a_disk_that_is_full_at_the_last_moment(
    web: Web, cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed(web, tmp_path)
    source = of(web, cache)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CacheError, match="cannot be kept"):
        source.read(0)
    assert kept(cache) == []


def test_a_cache_that_cannot_be_made(web: Web, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot be kept in .*/file/cache: Not a directory"):
        of(web, ShardCache(tmp_path / "file" / "cache"))


def test_file_systems_without_locks_are_named(web: Web, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache_module.fcntl, "flock", none)
    with pytest.raises(DataError, match=r"cache has no file locks \(No locks available\); name a local disk"):
        of(web, cache)


def test_a_shard_cut_off_in_the_cache_is_fetched_again(web: Web, cache: ShardCache, tmp_path: Path) -> None:
    listed(web, tmp_path)
    source = of(web, cache)
    source.read(0)
    (path,) = cache.folder.glob("*t-0.tar")
    os.truncate(path, 1000)
    assert source.read(0) == noise(0)


def test_what_another_process_has_just_fetched_is_not_fetched_again(
    web: Web, cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed(web, tmp_path)
    source = of(web, cache)
    there, looks = ShardCache._there, list[int]()

    def late(self: ShardCache, remote: Any) -> int | None:
        looks.append(1)
        if len(looks) == 1:  # the other one ends between this look and the attempt to fetch
            of(web, ShardCache(cache.folder)).read(0)
            return None
        return there(self, remote)

    monkeypatch.setattr(ShardCache, "_there", late)
    assert source.read(0) == noise(0)
    assert len(web.gets("/t-0.tar")) == 1
    assert kept(cache) == ["t-0.tar"]


def test_a_part_of_no_known_version_is_not_gone_on_with(web: Web, cache: ShardCache) -> None:
    web.tags = False
    remote = describe(f"{web.url}/t-0.tar", 0)
    assert remote.tag == ""
    cache.folder.mkdir()
    (cache.folder / f"{remote.key}.{SIZE}.part").write_bytes(b"x" * 20_000)
    with cache.use(remote) as fd:
        assert os.pread(fd, SIZE, 0) == shard(0)
    assert web.gets("/t-0.tar") == [""]


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache() == Path("/x/fastsimclr/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache/fastsimclr/shards"
