"""Shards from a web server with faults: attempts, parts, lengths, digests, and what is said of them."""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fastsimclr.loaders.faults import Damage, Reader
from fastsimclr.loaders.shards import remote as remote_module
from fastsimclr.loaders.shards.cache import ShardCache
from fastsimclr.loaders.shards.remote import FetchError, describe
from fastsimclr.loaders.shards.source import open_shards
from fastsimclr.loaders.source import DataError
from tests.loaders.tars import PER_SHARD, SIZE, noise, shard
from tests.loaders.web import ALL, Web, assert_whole, cut, flipped, kept, listed, of, status

pytestmark = pytest.mark.usefixtures("quick")


def test_shards_of_a_web_server(web: Web, cache: ShardCache, tmp_path: Path) -> None:
    source = of(web, cache)
    assert_whole(source)
    assert kept(cache) == ALL
    assert source.describe(9) == f"{web.url}/t-1.tar/0009.jpg"
    web.asked.clear()
    again = of(web, ShardCache(cache.folder))
    assert_whole(again)
    assert [method for method, path, _, _ in web.asked if path != "/index.json"] == ["HEAD"] * 4
    for path, data in web.files.items():
        (tmp_path / path[1:]).write_bytes(data)
    local = open_shards(f"{tmp_path}/t-*.tar", cache)
    assert local.fingerprint == again.fingerprint == source.fingerprint


def test_with_index_json_nothing_is_fetched_before_it_is_read(web: Web, cache: ShardCache, tmp_path: Path) -> None:
    listed(web, tmp_path)
    source = of(web, cache)
    assert [path for _, path, _, _ in web.asked] == ["/index.json"]
    assert source.read(17) == noise(17)
    assert kept(cache) == ["t-2.tar"]
    assert_whole(source)
    assert [len(web.gets(f"/t-{k}.tar")) for k in range(4)] == [1] * 4
    web.files = {"/index.json": web.files["/index.json"]}
    assert_whole(of(web, ShardCache(cache.folder)))  # the shards need not be there any more


def test_answers_of_500_are_tried_again(web: Web, cache: ShardCache, caplog: pytest.LogCaptureFixture) -> None:
    web.faults = {"/t-1.tar": [status(500), status(503)], "/t-2.tar": [status(429)]}
    assert_whole(of(web, cache))
    assert len(web.gets("/t-1.tar")) == 3
    assert re.search(r"t-1.tar: attempt 2 of 4 failed \(HTTP 503, .*\); again in 0.0 s", caplog.text)


@pytest.mark.parametrize("code", [500, 404, 403, 401, 410])
def test_what_cannot_be_fetched_is_named(web: Web, cache: ShardCache, tmp_path: Path, code: int) -> None:
    listed(web, tmp_path)
    source = of(web, cache)
    web.always["/t-1.tar"] = status(code)
    attempts = 4 if code == 500 else 1
    with pytest.raises(FetchError) as caught:
        source.read(PER_SHARD)
    assert len(web.gets("/t-1.tar")) == attempts
    assert f"{web.url}/t-1.tar" in str(caught.value)
    if code == 500:
        assert "could not be fetched in 4 attempts, the last ended with HTTP 500" in str(caught.value)
        assert "raise data.fetch_retries" in str(caught.value)
    else:
        assert "cannot be fetched" in str(caught.value)
        assert "correct the URL, or your rights" in str(caught.value)
    assert kept(cache) == []
    # No image is at fault, so none may be replaced by another one: the run stops.
    with pytest.raises(FetchError):
        Reader(source, Damage(source.name, len(source), 0.9), 10**6).open_next(PER_SHARD)


def test_a_missing_shard_is_named_at_the_start(web: Web, cache: ShardCache) -> None:
    del web.files["/t-3.tar"]
    with pytest.raises(FetchError, match=r"t-3.tar cannot be fetched \(HTTP 404"):
        of(web, cache)


def test_no_server(cache: ShardCache) -> None:
    with pytest.raises(
        FetchError, match=r"http://127.0.0.1:9/index.json could not be fetched in 4 attempts.*check the network"
    ):
        open_shards("http://127.0.0.1:9/a.tar", cache)


def test_a_broken_download_goes_on_where_it_ended(web: Web, cache: ShardCache) -> None:
    web.faults = {"/t-0.tar": [cut(20_000, cache)], "/t-1.tar": [cut(0)], "/t-2.tar": [cut(30_000, cache), status(500)]}
    assert_whole(of(web, cache))
    assert web.gets("/t-0.tar") == ["", "bytes=20000-"]
    assert web.gets("/t-1.tar") == ["", ""]
    assert web.gets("/t-2.tar") == ["", "bytes=30000-", "bytes=30000-"]


def test_servers_without_parts_begin_anew(web: Web, cache: ShardCache) -> None:
    web.parts = False
    web.faults = {"/t-0.tar": [cut(20_000, cache), cut(40_000, cache)]}
    assert_whole(of(web, cache))
    assert web.gets("/t-0.tar") == ["", "bytes=20000-", "bytes=40000-"]


def test_servers_without_tags(web: Web, cache: ShardCache) -> None:
    web.tags = False
    web.faults = {"/t-0.tar": [cut(20_000, cache)]}
    assert_whole(of(web, cache))


def test_wrong_lengths(web: Web, cache: ShardCache, tmp_path: Path) -> None:
    listed(web, tmp_path)
    source = of(web, cache)
    web.always = {"/t-0.tar": cut(SIZE, cache, SIZE + 100), "/t-1.tar": cut(SIZE - 512, cache, SIZE - 512)}
    assert source.read(0) == noise(0)  # all that was listed came, with the right digest
    with pytest.raises(FetchError, match=rf"t-1.tar .*the connection ended after {SIZE - 512} of {SIZE} bytes"):
        source.read(PER_SHARD)
    web.files["/t-2.tar"] = shard(2) + bytes(512)
    assert source.read(2 * PER_SHARD) == noise(2 * PER_SHARD)


def test_a_server_that_gives_another_part_is_not_believed(web: Web, cache: ShardCache) -> None:
    def elsewhere(handler: Any, data: bytes) -> None:
        Web.send(handler, 206, data[100:], {"Content-Range": f"bytes 100-{SIZE - 1}/{SIZE}"})

    web.faults = {"/t-0.tar": [cut(20_000, cache), elsewhere]}
    assert_whole(of(web, cache))


def test_digests(web: Web, cache: ShardCache, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed(web, tmp_path)
    web.faults = {"/t-0.tar": [flipped]}
    source = of(web, cache)
    assert_whole(source)
    assert "its sha256 is" in caplog.text
    web.files["/t-0.tar"] = shard(1)  # the list is older than the shard
    with pytest.raises(FetchError, match=r"t-0.tar could not.*its sha256 is \w{64}, not \w{64} as index.json"):
        of(web, ShardCache(tmp_path / "fresh", retries=1)).read(0)


def test_md5_of_the_server(web: Web, cache: ShardCache, tmp_path: Path) -> None:
    web.extra = {
        path: {"Content-MD5": base64.b64encode(hashlib.md5(data).digest()).decode()} for path, data in web.files.items()
    }
    web.faults = {"/t-0.tar": [flipped]}
    assert_whole(of(web, cache))
    assert len(web.gets("/t-0.tar")) == 2
    web.extra["/t-1.tar"]["Content-MD5"] = base64.b64encode(bytes(16)).decode()
    with pytest.raises(FetchError, match=r"t-1.tar could not.*its md5 is"):
        of(web, ShardCache(tmp_path / "fresh", retries=1))


def test_a_shard_replaced_while_it_is_fetched(web: Web, cache: ShardCache) -> None:
    def replace(handler: Any, data: bytes) -> None:
        cut(20_000, cache)(handler, data)
        web.files["/t-0.tar"] = shard(7)

    web.faults = {"/t-0.tar": [replace]}
    with pytest.raises(FetchError, match=r"t-0.tar changed since it was listed: 61440 bytes"):
        of(web, cache)
    assert "t-0.tar" not in kept(cache)
    source = of(web, cache)
    assert source.read(0) == noise(7 * PER_SHARD)


def test_servers_that_say_no_size(web: Web, cache: ShardCache) -> None:
    def unsized(handler: Any, body: bool) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True

    web.answer = unsized  # type: ignore[method-assign]
    with pytest.raises(DataError, match="the server does not say its size"):
        describe(f"{web.url}/t-0.tar", 0)


def test_back_off_doubles_with_jitter_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "FIRST_S", 0.5)
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)

    def fail() -> None:
        raise TimeoutError

    with pytest.raises(FetchError, match="x could not be fetched in 11 attempts, the last ended with TimeoutError"):
        remote_module.retry("x", 10, fail)
    for number, wait in enumerate(waits):
        assert 0.5 <= wait / min(30.0, 0.5 * 2**number) <= 1.5
    assert len({wait / min(30.0, 0.5 * 2**number) for number, wait in enumerate(waits)}) == 10


@pytest.mark.parametrize(
    ("url", "module", "command"),
    [
        ("http://h/a.tar", "aiohttp", r'pip install "fsspec\[http\]"'),
        ("s3://b/a*.tar", "s3fs", "pip install s3fs"),
        ("gs://b/a*.tar", "gcsfs", "pip install gcsfs"),
    ],
)
def test_missing_packages(
    monkeypatch: pytest.MonkeyPatch, cache: ShardCache, url: str, module: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, url.partition(":")[0], raising=False)
    with pytest.raises(
        DataError, match=rf"{re.escape(url[:5])}.* needs a package that is not installed.*run: {command}$"
    ):
        open_shards(url, cache)
