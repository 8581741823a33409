"""Shards from a web server with faults and from an S3 server, the cache between, and runs cut off in the middle."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from fastsimclr.cli import main
from fastsimclr.loaders.faults import Reader
from fastsimclr.loaders.order import Order
from fastsimclr.loaders.shards import cache as cache_module
from fastsimclr.loaders.shards import remote as remote_module
from fastsimclr.loaders.shards.cache import ShardCache, default_cache
from fastsimclr.loaders.shards.index_files import write_index
from fastsimclr.loaders.shards.places import expand
from fastsimclr.loaders.shards.remote import CacheError, FetchError, describe
from fastsimclr.loaders.shards.source import ShardSource, open_shards
from fastsimclr.loaders.source import DataError
from fastsimclr.runlog import read_records

ROOT = Path(__file__).parents[2]
SIZE = 61440  # bytes of a shard of `web`
PER_SHARD = 8
Fault = Callable[[Any, bytes], None]


def tar(files: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def noise(index: int, size: int = 5000) -> bytes:
    return np.random.default_rng(index).bytes(size)


def shard(number: int) -> bytes:
    """Eight images of noise with labels."""
    ids = range(PER_SHARD * number, PER_SHARD * (number + 1))
    data = tar([f for i in ids for f in ((f"{i:04d}.jpg", noise(i)), (f"{i:04d}.cls", b"%d" % (i % 5)))])
    assert len(data) == SIZE
    return data


class Web:
    """A web server on the loopback: files {path: bytes}, faults to commit at the next GETs of a path, what was asked.

    asked: (method, path, Range header or "", status). Switches: parts (Range is honoured), tags (ETag is sent).
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.always: dict[str, Fault] = {}
        self.asked: list[tuple[str, str, str, int]] = []
        self.extra: dict[str, dict[str, str]] = {}
        self.parts = self.tags = True
        self.sending, self.most_sending = 0, 0
        self.pause_s = 0.0
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                web.answer(self, body=False)

            def do_GET(self) -> None:
                web.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def gets(self, path: str) -> list[str]:
        """The Range headers of the GETs of a path."""
        return [part for method, asked, part, _ in self.asked if method == "GET" and asked == path]

    def answer(self, handler: Any, body: bool) -> None:
        path, part = handler.path, handler.headers.get("Range", "")
        data = self.files.get(path)
        fault = None
        if body:
            queue = self.faults.get(path)
            fault = queue.pop(0) if queue else self.always.get(path)
        if data is None:
            self.send(handler, 404, b"", {})
        elif fault is not None:
            self.asked.append(("GET", path, part, 0))
            fault(handler, data)
            return
        else:
            start = int(part[6:].partition("-")[0]) if part and self.parts else 0
            headers = dict(self.extra.get(path, {}))
            if self.tags:
                headers["ETag"] = '"' + hashlib.sha1(data).hexdigest() + '"'
            if part and self.parts:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status = 206 if part and self.parts else 200
            self.asked.append((handler.command, path, part, status))
            handler.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data) - start)}.items():
                handler.send_header(name, value)
            handler.end_headers()
            if body:
                self.write_slowly(handler, data[start:])
            return
        self.asked.append((handler.command, path, part, 404))

    def write_slowly(self, handler: Any, data: bytes) -> None:
        try:
            for at in range(0, len(data), 8192):
                handler.wfile.write(data[at : at + 8192])
                if self.pause_s:
                    time.sleep(self.pause_s)
        except OSError:  # the reader is gone
            handler.close_connection = True

    @staticmethod
    def send(handler: Any, status: int, data: bytes, headers: dict[str, str]) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(data)


def status(code: int) -> Fault:
    """Answer with this status."""
    return lambda handler, data: Web.send(handler, code, b"no", {})


def cut(after: int, cache: ShardCache | None = None, stated: int | None = None) -> Fault:
    """State the whole length, or another one, and end the connection after some bytes; once `cache` has them."""

    def commit(handler: Any, data: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data) if stated is None else stated))
        handler.end_headers()
        handler.wfile.write(data[:after])
        name = handler.path[1:]
        if cache is not None and after:
            until(lambda: any(path.stat().st_size >= after for path in cache.folder.glob(f"*{name}*")))
        handler.close_connection = True

    return commit


def flipped(handler: Any, data: bytes) -> None:
    """One bit is another one."""
    Web.send(handler, 200, data[:700] + bytes([data[700] ^ 1]) + data[701:], {})


@pytest.fixture
def web() -> Iterator[Web]:
    """Four shards at /t-0.tar to /t-3.tar."""
    server = Web()
    server.files = {f"/t-{k}.tar": shard(k) for k in range(4)}
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", retries=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "FIRST_S", 0.01)


def of(web: Web, cache: ShardCache, **keys: Any) -> ShardSource:
    return open_shards(f"{web.url}/t-{{0..3}}.tar", cache, **keys)


def listed(web: Web, tmp_path: Path) -> None:
    """Put the index.json of the shards beside them."""
    folder = tmp_path / "listed"
    folder.mkdir()
    for path, data in web.files.items():
        (folder / path[1:]).write_bytes(data)
    write_index(str(folder), ShardCache(tmp_path / "other"))
    web.files["/index.json"] = (folder / "index.json").read_bytes()


def assert_whole(source: ShardSource) -> None:
    assert [source.read(i) for i in range(len(source))] == [noise(i) for i in range(4 * PER_SHARD)]
    assert source.labels.tolist() == [i % 5 for i in range(4 * PER_SHARD)]


def kept(cache: ShardCache) -> list[str]:
    """What lies in the cache, without the hashes."""
    return sorted(
        path.name.partition("-")[2] for path in cache.folder.iterdir() if path.is_file() and path.name[0] != "."
    )


def until(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(0.005)


ALL = ["t-0.tar", "t-1.tar", "t-2.tar", "t-3.tar"]

# ---- web servers


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
        Reader(source, 0.9, 10**6).open_next(PER_SHARD)


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


# ---- the cache


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
        Reader(source, 0.9, 10**6).open_next(0)
    monkeypatch.undo()
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


READ_ALL = """
import hashlib, sys
from pathlib import Path
from fastsimclr.loaders.shards.cache import ShardCache
from fastsimclr.loaders.shards.source import open_shards
source = open_shards(sys.argv[1] + "/t-{0..3}.tar", ShardCache(Path(sys.argv[2])))
print("open", flush=True)
print(hashlib.sha256(b"".join(source.read(i) for i in range(len(source)))).hexdigest())
"""


def reader(web: Web, cache: ShardCache) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", READ_ALL, web.url, str(cache.folder)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_killed_download_is_gone_on_with_and_shared(web: Web, cache: ShardCache, tmp_path: Path) -> None:
    listed(web, tmp_path)
    web.pause_s = 0.05  # 0.4 s a shard
    first = reader(web, cache)
    half = "*t-1.tar.*.part"
    until(lambda: any(path.stat().st_size >= 16384 for path in cache.folder.glob(half)) or first.poll() is not None)
    first.kill()
    _, said = first.communicate()
    assert first.returncode == -signal.SIGKILL, said
    (part,) = cache.folder.glob("*.part")
    assert 0 < (had := part.stat().st_size) < SIZE
    web.asked.clear()
    second = reader(web, cache)
    assert second.stdout is not None
    assert second.stdout.readline() == "open\n"
    assert_whole(of(web, cache))  # here, at the same time
    out, said = second.communicate(timeout=60)
    assert out.strip() == hashlib.sha256(b"".join(noise(i) for i in range(4 * PER_SHARD))).hexdigest(), said
    assert web.gets("/t-0.tar") == []
    assert web.gets("/t-1.tar") == [f"bytes={had}-"]
    assert web.gets("/t-2.tar") == web.gets("/t-3.tar") == [""]
    assert kept(cache) == ALL


# ---- S3


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """moto's S3 server on the loopback with the bucket `bucket`; the environment of whoever is to use it."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        files = fsspec.filesystem("s3")
        files.mkdir("bucket")
        yield files
    server.stop()


def test_shards_in_s3(s3: Any, cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(4):
        s3.pipe_file(f"bucket/set/t-{k}.tar", shard(k))
    source = open_shards("s3://bucket/set/t-*.tar", cache)
    assert_whole(source)
    assert source.describe(9) == "s3://bucket/set/t-1.tar/0009.jpg"
    assert write_index("s3://bucket/set/t-{0..3}.tar", cache) == ["s3://bucket/set/index.json"]
    fresh = ShardCache(tmp_path / "fresh", retries=1)
    monkeypatch.setattr("fastsimclr.loaders.shards.index_files.scan_shard", None)
    again = open_shards("s3://bucket/set/t-{0..3}.tar", fresh)
    assert kept(fresh) == [] if fresh.folder.exists() else True
    assert_whole(again)
    assert again.fingerprint == source.fingerprint


def test_s3_downloads_go_on_by_pieces_and_notice_changes(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.pipe_file("bucket/one.tar", shard(0))
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
    source = open_shards("s3://bucket/one.tar", ShardCache(tmp_path / "a", retries=2))
    assert [source.read(i) for i in range(8)] == [noise(i) for i in range(8)]
    assert asked == [(0, 20_000), (20_000, 20_000), (20_000, 20_000), (40_000, 20_000), (60_000, 1_440)]
    asked.clear()
    before = describe("s3://bucket/one.tar", 0)
    s3.pipe_file("bucket/one.tar", shard(1))
    assert describe("s3://bucket/one.tar", 0).tag != before.tag
    with (
        pytest.raises(FetchError, match=r"s3://bucket/one.tar changed since it was listed"),
        ShardCache(tmp_path / "b").use(before),
    ):
        pass


def test_what_s3_does_not_have(s3: Any, cache: ShardCache) -> None:
    with pytest.raises(FetchError, match=r"s3://bucket/none.tar cannot be fetched \(.*correct the URL, or your rights"):
        open_shards("s3://bucket/none.tar", cache)
    with pytest.raises(DataError, match=r"s3://bucket/none-\*.tar matches no file"):
        expand("s3://bucket/none-*.tar")


# ---- runs


def images() -> dict[str, bytes]:
    """Four shards of 24 images of 12 x 12 pixels."""
    rng = np.random.default_rng(0)
    shards = {}
    for k in range(4):
        files = []
        for i in range(24):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(buffer, "PNG")
            files += [(f"{k}{i:02d}.png", buffer.getvalue()), (f"{k}{i:02d}.cls", b"%d" % (i % 2))]
        shards[f"i-{k}.tar"] = tar(files)
    return shards


def pretrain(root: str, out: Path, cache: Path, *options: str) -> list[str]:
    """The command."""
    words = (
        "pretrain --config folder.yaml --device cpu --trainer.precision fp32 --views.size 8 --model.arch resnet18"
        " --model.width 0.125 --data.source shards --data.loader native --data.val_fraction 0.01"
        f" --data.root {root} --data.cache {cache} --pretrain.batch 16 --pretrain.epochs 3"
        " --pretrain.optim.warmup_epochs 0 --trainer.log_every_steps 1 --trainer.checkpoint_every_steps 3"
    )
    return [*words.split(), "--out", str(out), *options]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_records(run / "metrics.jsonl") if r["kind"] == "train"]


def killed_after(step: int, words: list[str], run: Path) -> None:
    """The command in its own process, until it has logged `step`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastsimclr", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = run / "metrics.jsonl"
    until(lambda: (metrics.is_file() and f'"step": {step},' in metrics.read_text()) or process.poll() is not None)
    process.kill()
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, said


def test_a_run_over_http_and_s3_killed_and_resumed_is_the_run_from_the_disk(
    web: Web, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have: the order of every sum is given
    shards = images()
    (tmp_path / "disk").mkdir()
    for name, data in shards.items():
        (tmp_path / "disk" / name).write_bytes(data)
        s3.pipe_file(f"bucket/run/{name}", data)
    web.files = {f"/{name}": data for name, data in shards.items()}
    web.faults = {f"/{name}": [cut(9_000), status(500)] for name in shards}
    assert main(pretrain(f"{tmp_path}/disk/i-*.tar", tmp_path / "alone", tmp_path / "c0")) == 0
    run = tmp_path / "run"
    # Room for three shards of four, so that some are fetched again and again.
    options = ["--data.cache_gib", str(3 * len(shards["i-0.tar"]) / 2**30), "--resume", "auto"]
    http, in_s3 = f"{web.url}/i-{{0..3}}.tar", "s3://bucket/run/i-{0..3}.tar"
    killed_after(4, pretrain(http, run, tmp_path / "c1", *options), run)
    assert 4 <= losses(run)[-1][0] < len(losses(tmp_path / "alone"))
    killed_after(10, pretrain(in_s3, run, tmp_path / "c2", *options), run)
    assert 10 <= losses(run)[-1][0] < len(losses(tmp_path / "alone"))
    assert main(pretrain(http, run, tmp_path / "c1", *options)) == 0
    assert losses(run) == losses(tmp_path / "alone")
    assert [step for step, _ in losses(run)] == list(range(1, 94 * 3 // 16 + 2))
    assert len(kept(ShardCache(tmp_path / "c1"))) <= 3
    torch.set_num_threads(threads)
