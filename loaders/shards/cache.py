"""A folder of fetched shards: one download a host, kept whole, the least recently used given up under a size limit."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastsimclr.loaders.log import LOG
from fastsimclr.loaders.shards.handles import Handles
from fastsimclr.loaders.shards.remote import CacheError, FetchError, Remote, download, unwritable
from fastsimclr.loaders.source import DataError
from fastsimclr.loaders.whole import write_whole

GIB = 2**30
POLL_S = 0.05  # how often a process looks whether another one has finished a download
THREADS = 4  # shards fetched ahead at once


def default_cache() -> Path:
    """fastsimclr/shards below $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsimclr" / "shards"


class _NoRoom(Exception):
    """A shard that nobody waits for does not fit without giving up one in use, or is not expected any more."""


class ShardCache:
    """Fetched shards in `folder`, which several processes and data sets may share; it should be on a local disk.

    limit: most bytes of all shards, 0 for no limit; it is exceeded, with one warning, where all shards are in use.
    A shard in use is open under a shared flock, a download under an exclusive one, which end with their process.
    """

    def __init__(self, folder: Path, limit: int = 0, retries: int = 5) -> None:
        self.folder, self.limit, self.retries = folder, limit, retries
        self.handles = Handles(0)
        self._over, self._told = limit > 0, False  # what a killed process left behind is not known yet
        self._failures: dict[str, tuple[float, FetchError]] = {}
        self._wanted: frozenset[str] = frozenset()
        self._ahead = threading.Lock()
        self._wishes: deque[Remote] = deque()
        self._workers = 0

    def __reduce__(self) -> tuple[type[ShardCache], tuple[Path, int, int]]:
        return ShardCache, (self.folder, self.limit, self.retries)

    @contextmanager
    def use(self, remote: Remote) -> Iterator[int]:
        """A descriptor of the shard, fetched first where it is not here. Raises FetchError, DataError."""
        with self.handles.use(remote.key, lambda: self._open(remote)) as fd:
            yield fd
        self._come_down()

    def holds(self, remote: Remote) -> bool:
        """Whether the shard is here now."""
        return (self.folder / remote.key).is_file()

    def expect(self, remotes: Sequence[Remote]) -> None:
        """Fetch these shards ahead, in this order, as many as fit the limit, and keep them until the next call."""
        wishes, total = list[Remote](), 0
        for remote in remotes:
            total += remote.size
            if self.limit and wishes and total > self.limit:
                break
            wishes.append(remote)
        self._wanted = frozenset(remote.key for remote in wishes)
        self.handles.want(self._wanted)
        if not wishes:
            self._come_down()
        missing = [remote for remote in wishes if remote.key not in self.handles]
        with self._ahead:
            # Those that are here are only to be held, first, or making room for the others would take them.
            self._wishes = deque(sorted(missing, key=self.holds, reverse=True))
            start = min(THREADS, len(self._wishes)) - self._workers
            self._workers += max(0, start)
        for _ in range(start):
            threading.Thread(target=self._work, name="fetch", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._ahead:
                if not self._wishes:
                    self._workers -= 1
                    return
                remote = self._wishes.popleft()
            try:
                with self.handles.use(remote.key, lambda remote=remote: self._open(remote, ahead=True)):  # type: ignore[misc]
                    pass
                self._come_down()
            except _NoRoom:
                continue
            except Exception as error:  # whoever needs the shard will try again, and raise
                LOG.warning("not fetched ahead: %s", error)

    def _open(self, remote: Remote, *, ahead: bool = False) -> int:
        begun = time.monotonic()
        while (fd := self._there(remote)) is None:
            if ahead and remote.key not in self._wanted:  # another thread fetched it, it was used and given up
                raise _NoRoom
            failed_at, failure = self._failures.get(remote.key, (begun, None))
            if failure is not None and failed_at > begun:  # the thread that this one waited for has tried it all
                raise failure
            try:
                fd = self._fetch(remote, ahead)
            except FetchError as error:
                self._failures[remote.key] = time.monotonic(), error
                raise
            if fd is not None:
                return fd
            time.sleep(POLL_S)  # another thread or process is fetching it
        return fd

    def _there(self, remote: Remote) -> int | None:
        path = self.folder / remote.key
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unwritable(remote, self.folder, error) from error
        if os.fstat(fd).st_size != remote.size:  # cut off by a crash of the machine
            os.close(fd)
            path.unlink(missing_ok=True)
            return None
        _lock(fd, fcntl.LOCK_SH, self.folder)
        with suppress(OSError):
            os.utime(fd)
        return fd

    def _fetch(self, remote: Remote, ahead: bool) -> int | None:
        """A descriptor of the fetched shard; None where another thread or process is at it, or was just now."""
        part, final = self.folder / f"{remote.key}.{remote.size}.part", self.folder / remote.key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(remote, self.folder, error) from error
        keep = True
        try:
            if not _lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, self.folder) or not _same(fd, part):
                return None
            if final.exists():
                part.unlink()
                return None
            self._make_room(remote, part, ahead)
            started, had = time.monotonic(), os.fstat(fd).st_size
            download(remote, fd, part, self.retries)
            os.fsync(fd)
            part.replace(final)
            LOG.debug("%s: %d bytes in %.1f s", remote.url, remote.size - had, time.monotonic() - started)
            _lock(fd, fcntl.LOCK_SH, self.folder)
            keep = False
            return fd
        except OSError as error:
            part.unlink(missing_ok=True)
            raise unwritable(remote, self.folder, error) from error
        except BaseException as error:
            # What was cut off stays, to go on from there; but not on a full disk.
            if isinstance(error, CacheError) or not os.fstat(fd).st_size:
                part.unlink(missing_ok=True)
            raise
        finally:
            if keep:
                os.close(fd)

    def _make_room(self, remote: Remote | None, partial: Path | None, ahead: bool) -> None:
        """Give up what was not used for longest, until `remote` fits; its own `partial` file does not count."""
        if not self.limit:
            return
        with open(self.folder / ".lock", "a") as lock:
            _lock(lock.fileno(), fcntl.LOCK_EX, self.folder)
            entries = sorted(self._entries(partial))
            excess = sum(size for _, size, _ in entries) + (remote.size if remote else 0) - self.limit
            for _, size, path in entries:
                if excess > 0 and _give_up(path):
                    excess -= size
            if excess > 0 and ahead:
                raise _NoRoom
            self._over = excess > 0  # under the lock: an older finding must not replace a newer one
        if self._over and not self._told:
            self._told = True
            LOG.warning(
                "%s: the shards in use take %.2f GiB more than data.cache_gib=%.2f; raise it, or lower the window",
                *(self.folder, excess / GIB, self.limit / GIB),
            )

    def _come_down(self) -> None:
        """Go back below the limit where it was exceeded: what was in use then may not be any more."""
        if self._over:
            with suppress(OSError):
                self._make_room(None, None, ahead=False)

    def _entries(self, without: Path | None) -> Iterator[tuple[int, int, Path]]:
        """(last use, bytes, path) of each shard; a download counts with the size that it will have."""
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            with suppress(OSError, ValueError):
                if path == without or not entry.is_file() or entry.name.startswith("."):
                    continue
                if entry.name.endswith(".part"):
                    size, used = int(entry.name.split(".")[-2]), time.time_ns()
                    with suppress(FileNotFoundError):  # it has become a shard since it was listed, and still counts
                        used = entry.stat().st_mtime_ns
                    yield used, size, path
                else:
                    state = entry.stat()
                    yield state.st_mtime_ns, state.st_size, path

    def get_index(self, key: str) -> Any:
        """What `put_index` kept under `key`; None where there is nothing that can be read."""
        try:
            return json.loads((self.folder / "index" / f"{key}.json").read_bytes())
        except (OSError, ValueError):
            return None

    def put_index(self, key: str, value: Any) -> None:
        """Keep a JSON value under `key`; a folder that cannot be written to costs the next start time, no more."""
        folder = self.folder / "index"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / f"{key}.json", json.dumps(value).encode(), shared=True)
        except OSError as error:
            LOG.warning("%s: the index of a shard is not kept: %s", folder, error.strerror)


def _lock(fd: int, how: int, folder: Path) -> bool:
    """flock; False where another holder is in the way of an attempt that does not wait."""
    try:
        fcntl.flock(fd, how)
    except BlockingIOError:
        return False
    except OSError as error:
        raise DataError(f"data.cache={folder} has no file locks ({error.strerror}); name a local disk") from error
    return True


def _same(fd: int, path: Path) -> bool:
    """Whether `path` still is the open file: another process may have renamed or removed it before our lock."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _give_up(path: Path) -> bool:
    """Remove a shard that nobody uses; False where it is in use, or another user's."""
    went = path.suffix != ".part"  # a part that is gone has become a shard, most likely
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError as error:
        return went and isinstance(error, FileNotFoundError)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _same(fd, path):
            return went
        path.unlink()
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
