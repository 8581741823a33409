"""A web server on the loopback that commits the faults it is asked for, and shards that lie on it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fastsimclr.loaders.shards.cache import ShardCache
from fastsimclr.loaders.shards.index_files import write_index
from fastsimclr.loaders.shards.source import ShardSource, open_shards
from tests.loaders.tars import PER_SHARD, noise

Fault = Callable[[Any, bytes], None]
ALL = ["t-0.tar", "t-1.tar", "t-2.tar", "t-3.tar"]


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


def of(web: Web, cache: ShardCache, **keys: Any) -> ShardSource:
    """The four shards of the server."""
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
    """All images and labels of the four shards."""
    assert [source.read(i) for i in range(len(source))] == [noise(i) for i in range(4 * PER_SHARD)]
    assert source.labels.tolist() == [i % 5 for i in range(4 * PER_SHARD)]


def kept(cache: ShardCache) -> list[str]:
    """What lies in the cache, without the hashes."""
    return sorted(
        path.name.partition("-")[2] for path in cache.folder.iterdir() if path.is_file() and path.name[0] != "."
    )


def until(holds: Callable[[], bool]) -> None:
    """Wait."""
    while not holds():
        time.sleep(0.005)
