"""Shards in object stores: S3 by moto, Google's by its emulator, both on the loopback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastsimclr.loaders.shards import remote as remote_module
from fastsimclr.loaders.shards.cache import ShardCache
from fastsimclr.loaders.shards.index_files import write_index
from fastsimclr.loaders.shards.places import expand
from fastsimclr.loaders.shards.remote import FetchError, describe
from fastsimclr.loaders.shards.source import open_shards
from fastsimclr.loaders.source import DataError
from tests.loaders.tars import noise, shard
from tests.loaders.web import assert_whole, kept

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """The bucket `bucket` as URLs begin with it, and its files by fsspec."""
    return f"{request.param}://bucket", request.getfixturevalue({"gs": "gcs"}.get(request.param, request.param))


def test_shards_in_a_store(
    store: tuple[str, Any], cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, files = store
    for k in range(4):
        files.pipe_file(f"bucket/set/t-{k}.tar", shard(k))
    source = open_shards(f"{bucket}/set/t-*.tar", cache)
    assert_whole(source)
    assert source.describe(9) == f"{bucket}/set/t-1.tar/0009.jpg"
    assert write_index(f"{bucket}/set/t-{{0..3}}.tar", cache) == [f"{bucket}/set/index.json"]
    fresh = ShardCache(tmp_path / "fresh", retries=1)
    monkeypatch.setattr("fastsimclr.loaders.shards.index_files.scan_shard", None)
    again = open_shards(f"{bucket}/set/t-{{0..3}}.tar", fresh)
    assert kept(fresh) == [] if fresh.folder.exists() else True
    assert_whole(again)
    assert again.fingerprint == source.fingerprint


def test_downloads_go_on_by_pieces_and_notice_changes(
    store: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, files = store
    files.pipe_file("bucket/one.tar", shard(0))
    monkeypatch.setattr(remote_module, "PIECE", 20_000)
    asked: list[tuple[int, int]] = []
    opened = remote_module._open

    def breaking(remote: Any, start: int) -> Any:
        file, begin = opened(remote, start)
        read = file.read

        def once(size: int) -> bytes:
            asked.append((file.loc, size))
            if len(asked) == 2:
                raise ConnectionResetError("the line broke")
            return bytes(read(size))

        file.read = once
        return file, begin

    monkeypatch.setattr(remote_module, "_open", breaking)
    source = open_shards(f"{bucket}/one.tar", ShardCache(tmp_path / "a", retries=2))
    assert [source.read(i) for i in range(8)] == [noise(i) for i in range(8)]
    assert asked == [(0, 20_000), (20_000, 20_000), (20_000, 20_000), (40_000, 20_000), (60_000, 1_440)]
    asked.clear()
    before = describe(f"{bucket}/one.tar", 0)
    files.pipe_file("bucket/one.tar", shard(1))
    assert describe(f"{bucket}/one.tar", 0).tag != before.tag
    with (
        pytest.raises(FetchError, match=rf"{bucket}/one.tar changed since it was listed"),
        ShardCache(tmp_path / "b").use(before),
    ):
        pass


def test_what_a_store_does_not_have(store: tuple[str, Any], cache: ShardCache) -> None:
    bucket, _ = store
    with pytest.raises(FetchError, match=rf"{bucket}/none.tar cannot be fetched \(.*correct the URL, or your rights"):
        open_shards(f"{bucket}/none.tar", cache)
    with pytest.raises(DataError, match=rf"{bucket}/none-\*.tar matches no file"):
        expand(f"{bucket}/none-*.tar")
