"""Where the samples of shards are read from: index.json beside them, the cache, or the tars; and writing index.json."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fastsimclr.loaders.log import LOG
from fastsimclr.loaders.shards.cache import ShardCache
from fastsimclr.loaders.shards.index import (
    INDEX,
    IndexFile,
    ShardIndex,
    dump_index,
    label_member,
    labels_of,
    parse_shard,
    read_index,
    scan_shard,
)
from fastsimclr.loaders.shards.places import expand
from fastsimclr.loaders.shards.remote import Remote, describe, filesystem, is_remote, read_small, retry
from fastsimclr.loaders.source import DataError
from fastsimclr.loaders.whole import write_whole

T = TypeVar("T")

AT_ONCE = 8  # shards scanned or fetched at once at the start
NOTE_S = 10.0  # how often the log tells how far that is


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar: its path or URL, its bytes, and the version to fetch where it is remote."""

    location: str
    size: int
    remote: Remote | None

    @property
    def name(self) -> str:
        """The base name, which stays the same when a set moves."""
        return base_name(self.location)


def base_name(location: str) -> str:
    """The file name of a path or URL, without a URL's query."""
    return (location.partition("?")[0] if is_remote(location) else location).rpartition("/")[2]


def folder_of(location: str) -> str:
    """The folder of a path or URL, without a slash at the end."""
    return (location.partition("?")[0] if is_remote(location) else location).rpartition("/")[0]


def listed(folder: str, cache: ShardCache, label_key: str | None) -> IndexFile | None:
    """The index.json of a folder, None where there is none. DataError where it is damaged or of another label_key."""
    location = f"{folder}/{INDEX}"
    if is_remote(folder):
        data = read_small(location, cache.retries)
    else:
        data = Path(location).read_bytes() if os.path.isfile(location) else None
    if data is None:
        return None
    file = read_index(data, location)
    if label_key is not None and label_key != file.label_key:
        raise DataError(
            f"{location} has the labels of label_key={file.label_key}, not data.label_key={label_key};"
            " leave that out, or write the index again"
        )
    return file


def load_shards(
    locations: Sequence[str], lists: Mapping[str, IndexFile | None], cache: ShardCache, label_key: str | None
) -> list[tuple[Shard, ShardIndex]]:
    """Each shard with its samples: of `lists`, the index.json for its folder, else scanned, which the cache remembers.

    Remote shards without index.json are fetched for it. Raises DataError for a shard that its list lacks or has with
    another size.
    """
    label_member(label_key)

    def load(location: str) -> tuple[Shard, ShardIndex]:
        file = lists[folder_of(location)]
        if file is None:
            return _scanned(location, cache, label_key)
        if base_name(location) not in file.shards:
            raise DataError(f"{location} is not listed in {file.location}; write it again")
        size, digest, index = file.shards[base_name(location)]
        if is_remote(location):
            return Shard(location=location, size=size, remote=Remote(location, size, sha256=digest)), index
        if (found := _state(location).st_size) != size:
            raise DataError(
                f"{location} has {found} bytes, not {size} as {file.location} says; copy it again, or write the index"
                " again"
            )
        return Shard(location=location, size=size, remote=None), index

    return _all(locations, load, "indexed")


def _scanned(location: str, cache: ShardCache, label_key: str | None) -> tuple[Shard, ShardIndex]:
    if is_remote(location):
        remote = describe(location, cache.retries)
        shard, version = Shard(location=location, size=remote.size, remote=remote), remote.tag
    else:
        state = _state(location)
        shard, version = Shard(location=location, size=state.st_size, remote=None), str(state.st_mtime_ns)
    text = f"{location}\n{shard.size}\n{version}\n{label_key}"
    key = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    if version and (kept := cache.get_index(key)) is not None:
        try:
            return shard, parse_shard(kept, shard.size)
        except (ValueError, KeyError, TypeError):
            LOG.warning("%s: the index kept for it is damaged; scanned again", location)
    with _reading(shard, cache) as fd:
        index = scan_shard(fd, shard.size, location, label_key)
    cache.put_index(key, vars(index))
    return shard, index


def _state(location: str) -> os.stat_result:
    try:
        return os.stat(location)
    except OSError as error:
        raise DataError(f"{location} cannot be read: {error.strerror}; correct the path or the range") from error


@contextmanager
def _reading(shard: Shard, cache: ShardCache) -> Iterator[int]:
    if shard.remote is not None:
        with cache.use(shard.remote) as fd:
            yield fd
        return
    try:
        fd = os.open(shard.location, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{shard.location} cannot be read: {error.strerror}; correct the path or the rights") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _all(locations: Sequence[str], work: Callable[[str], T], done: str) -> list[T]:
    """work(place) of each place, in order, several at once; the first error ends it."""
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="index")
    results: list[T] = []
    noted = time.monotonic()
    try:
        for result in pool.map(work, locations):
            results.append(result)
            if time.monotonic() - noted > NOTE_S:
                noted = time.monotonic()
                LOG.info("%s %d of %d shards", done, len(results), len(locations))
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def write_index(
    urls: str | Sequence[str],
    cache: ShardCache,
    *,
    label_key: str | None = None,
    classes: Sequence[str] | None = None,
    out: str | None = None,
) -> list[str]:
    """Write index.json into the folder of the shards, or into each of their folders; returns where.

    It holds samples, labels, sizes and SHA-256 of the shards, and `classes`, the names of the class numbers. What an
    index there lists already stays listed. Each shard is read whole, remote ones through the cache. out: another folder
    or URL for one index of all shards, which data.index names. Raises DataError for labels that `labels_of` refuses,
    where an index of another label_key or other classes stands there, for two shards of one name in one index, and for
    web servers, which take no files.
    """
    label_member(label_key)
    locations = expand(urls, cache.retries)
    homes = _homes(locations, out)
    key, named = label_key or "cls", None if classes is None else tuple(classes)
    before = {home: listed(home, cache, None) for home in dict.fromkeys(homes)}
    for file in before.values():
        if file and (file.label_key, file.classes) != (key, named):
            raise DataError(
                f"{file.location} has label_key={file.label_key} and {len(file.classes or ())} class names, not"
                f" label_key={key} and {len(named or ())}; give the same, or remove it"
            )
    indexed = _all(locations, lambda location: _read_whole(location, cache, label_key), "read")
    rows = list(zip(homes, locations, indexed, strict=True))
    files = []
    for home, old in before.items():
        shards = dict(old.shards) if old else {}
        shards |= {base_name(location): row for to, location, row in rows if to == home}
        labels_of([(f"{home}/{name}", index) for name, (_, _, index) in shards.items()], label_key, named)
        files.append(IndexFile(location=f"{home}/{INDEX}", label_key=key, classes=named, shards=shards))
    return [_write(file.location, dump_index(file), cache.retries) for file in files]


def _homes(locations: Sequence[str], out: str | None) -> list[str]:
    """The folder in which each shard is to be listed. DataError where it takes no files, or for two of one name."""
    if out is not None:
        out = out.rstrip("/") if is_remote(out) else os.path.abspath(out.removeprefix("file://"))
    homes = [folder_of(location) if out is None else out for location in locations]
    if web := next((home for home in homes if home.startswith(("http://", "https://"))), None):
        raise DataError(
            f"{web}: a web server takes no files; write {INDEX} where it has its files from, or into a folder of yours"
            " (--out), which data.index then names"
        )
    first: dict[tuple[str, str], str] = {}
    for home, location in zip(homes, locations, strict=True):
        if (other := first.setdefault((home, base_name(location)), location)) != location:
            raise DataError(f"{other} and {location} have one name, by which {INDEX} knows shards; write one a folder")
    return homes


def _read_whole(location: str, cache: ShardCache, label_key: str | None) -> tuple[int, str, ShardIndex]:
    remote = describe(location, cache.retries) if is_remote(location) else None
    shard = Shard(location=location, size=remote.size if remote else _state(location).st_size, remote=remote)
    whole, at = hashlib.sha256(), 0
    with _reading(shard, cache) as fd:
        index = scan_shard(fd, shard.size, location, label_key)
        while data := os.pread(fd, 1 << 22, at):
            whole.update(data)
            at += len(data)
    return shard.size, whole.hexdigest(), index


def _write(location: str, data: bytes, retries: int) -> str:
    if is_remote(location):
        retry(location, retries, lambda: filesystem(location).pipe_file(location, data))
        return location
    try:
        Path(location).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(location), data, shared=True)
    except OSError as error:
        raise DataError(f"{location} cannot be written: {error.strerror}; free space or allow it") from error
    return location
