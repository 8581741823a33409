"""WebDataset shards as a source: tars of KEY.jpg and KEY.cls, on a disk, a web server or an object store."""

# n images, S shards

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fastsimclr.loaders.arrays import Ints
from fastsimclr.loaders.log import LOG
from fastsimclr.loaders.sets.basic import Subset
from fastsimclr.loaders.sets.lists import some
from fastsimclr.loaders.shards.cache import GIB, ShardCache
from fastsimclr.loaders.shards.handles import Handles
from fastsimclr.loaders.shards.index import INDEX, ShardIndex, labels_of
from fastsimclr.loaders.shards.index_files import Shard, folder_of, listed, load_shards
from fastsimclr.loaders.shards.places import expand
from fastsimclr.loaders.shards.tar import BLOCK
from fastsimclr.loaders.source import DataError, Source

OPEN = 64  # local shards that stay open


class ShardSource(Source):
    """The n images of S shards, in the order of the shards and of the images in them.

    blocks: int64 [S + 1], the first id of each shard and n at the end: for a quasi-random order.
    sizes: int64 [n], encoded bytes. whole_fits: whether all shards can be at hand at once (local ones,
    or a cache that takes all); where not, any but a quasi-random order fetches shards again and again.
    Reads are os.pread from any thread; of a remote shard that is not in the cache they wait until it is fetched.
    """

    def __init__(
        self, name: str, shards: Sequence[Shard], indexes: Sequence[ShardIndex], labels: npt.ArrayLike,
        classes: Sequence[str], cache: ShardCache,
    ) -> None:  # fmt: skip
        self.name = name
        self.shards = tuple(shards)
        self.classes = tuple(classes)
        self.labels: Ints = np.array(labels, dtype=np.int64)
        self.blocks: Ints = np.cumsum([0, *(len(index) for index in indexes)]).astype(np.int64)
        self.sizes: Ints = np.array([size for index in indexes for size in index.sizes], dtype=np.int64)
        for array in (self.labels, self.blocks, self.sizes):
            array.setflags(write=False)
        self._offsets = np.array([at for index in indexes for at in index.offsets], dtype=np.int64)
        self._stamps = np.array([stamp for index in indexes for stamp in index.stamps], dtype=np.uint32)
        # One string a shard: a million short ones would take four times the memory, in each rank.
        self._names = ["\0".join(index.members) for index in indexes]
        self._last: tuple[int, list[str]] = (-1, [])
        self._cache = cache
        self._files = Handles(OPEN)
        self._remote = any(shard.remote for shard in self.shards)
        self._told = False  # that the cache is small

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """Covers names and sizes of shards and images, labels and classes, but no folder: a copy has the same."""
        whole = hashlib.sha256()
        for shard, names in zip(self.shards, self._names, strict=True):
            whole.update(f"{shard.name}\0{shard.size}\n{names}\n".encode(errors="surrogatepass"))
        whole.update("\0".join(self.classes).encode(errors="surrogatepass"))
        for array in (self.blocks, self.sizes, self.labels):
            whole.update(array.tobytes())
        return whole.hexdigest()

    @cached_property
    def whole_fits(self) -> bool:
        """Whether every shard can be at hand at the same time."""
        remote = sum(shard.size for shard in self.shards if shard.remote)
        return not self._cache.limit or remote <= self._cache.limit

    def read(self, index: int) -> bytes:
        """The image's bytes. Raises DataError where the tar is another one than was indexed, FetchError, OSError."""
        shard = self._shard(index)
        at, size = int(self._offsets[index]), int(self.sizes[index])
        with self._open(self.shards[shard]) as fd:
            header = os.pread(fd, BLOCK, at - BLOCK)
            data = os.pread(fd, size, at)
        if zlib.crc32(header) != self._stamps[index] or len(data) != size:
            raise DataError(
                f"{self.describe(index)} is not where the index says, at byte {at}: the shard was changed;"
                f" write {INDEX} again, or start again where there is none"
            )
        return data

    def describe(self, index: int) -> str:
        """SHARD/MEMBER, with the path or URL of the shard."""
        shard = self._shard(index)
        last, names = self._last
        if last != shard:
            names = self._names[shard].split("\0")
            self._last = shard, names
        return f"{self.shards[shard].location}/{names[index - int(self.blocks[shard])]}"

    def expect(self, ids: npt.ArrayLike) -> None:
        """Say which images come next, in order: their remote shards are fetched ahead, and kept until the next call."""
        if not self._remote:
            return
        shards, first = np.unique(self._shards(np.asarray(ids, dtype=np.int64)), return_index=True)
        remotes = [remote for k in shards[np.argsort(first)].tolist() if (remote := self.shards[k].remote)]
        self._cache.expect(remotes)
        needed = sum(remote.size for remote in remotes)
        # Up to half of the room more is the window after the one that is read, which can wait.
        if 0 < 1.5 * self._cache.limit < needed and len(remotes) > 1 and not self._told:
            self._told = True
            LOG.warning(
                "%s: the %d shards that come next take %.2f GiB, far more than data.cache_gib=%.2f: some may be fetched"
                " several times; raise it, or lower data.window",
                *(self.name, len(remotes), needed / GIB, self._cache.limit / GIB),
            )

    def _shards(self, ids: Ints) -> Ints:
        return np.searchsorted(self.blocks, ids, side="right").astype(np.int64) - 1

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.blocks, index, side="right")) - 1

    @contextmanager
    def _open(self, shard: Shard) -> Iterator[int]:
        if shard.remote is not None:
            with self._cache.use(shard.remote) as fd:
                yield fd
        else:
            with self._files.use(shard.location, lambda: os.open(shard.location, os.O_RDONLY)) as fd:
                yield fd


def open_shards(
    urls: str | Sequence[str],
    cache: ShardCache,
    *,
    label_key: str | None = None,
    classes: Sequence[str] | None = None,
    index: str | None = None,
) -> ShardSource:
    """The shards that `urls` name (`expand`: paths, http(s)://, s3://, gs://; {000..127}, {a,b}, *, a folder).

    Their samples come from index.json in the shards' folder, else from the tars: scanned once, remote ones fetched for
    it, the result kept in the cache under size and time or ETag. label_key: see `scan_shard`; None takes the index's,
    else KEY.cls. classes: see `labels_of`. index: the folder or URL whose index.json is to hold for all shards in place
    of their own folders'. A sample without a label among labelled ones has -1, and is counted in the log, as are keys
    without an image. Raises DataError, FetchError.
    """
    locations = expand(urls, cache.retries)
    folders = list(dict.fromkeys(map(folder_of, locations)))
    if index is None:
        lists = {folder: listed(folder, cache, label_key) for folder in folders}
    else:
        lists = dict.fromkeys(folders, listed(index.removeprefix("file://").rstrip("/"), cache, label_key))
        if None in lists.values():
            raise DataError(f"data.index={index} holds no {INDEX}; fastsimclr index SHARDS --out {index} writes it")
    found = load_shards(locations, lists, cache, label_key)
    shards, indexes = [shard for shard, _ in found], [samples for _, samples in found]
    what = urls if isinstance(urls, str) else urls[0]
    name = f"shards:{what.partition('?')[0].rstrip('/').rpartition('/')[2]}"
    if classes is None:
        named = {entry.classes for entry in lists.values() if entry and entry.classes is not None}
        if len(named) > 1:
            raise DataError(f"{' and '.join(lists)} have an {INDEX} with other classes each; write them with the same")
        classes = next(iter(named), None)
    labels, classes = labels_of([(shard.location, samples) for shard, samples in found], label_key, classes)
    if not labels:
        raise DataError(f"{what}: no image in {len(shards)} shards; they need KEY.jpg, .jpeg, .png or .webp")
    left_out = [f"{shard.location}/{key}" for shard, samples in found for key in samples.left_out]
    if left_out:
        LOG.warning("%s: left out %d keys that have no image: %s", name, len(left_out), some(left_out))
    source = ShardSource(name, shards, indexes, labels, classes, cache)
    bare = np.flatnonzero(source.labels < 0)
    if 0 < len(bare) < len(source):
        first = some([source.describe(int(number)) for number in bare[:3]])
        LOG.warning("%s: %d of %d images have no label, as %s", name, len(bare), len(source), first)
    _look_at_the_disk(source.name, shards, cache)
    return source


def _look_at_the_disk(name: str, shards: Sequence[Shard], cache: ShardCache) -> None:
    """Warn of a cache without limit on a disk that the shards still to be fetched would fill: days later, perhaps."""
    missing = sum(shard.size for shard in shards if shard.remote is not None and not cache.holds(shard.remote))
    if missing and not cache.limit:
        there = next(folder for folder in (cache.folder, *cache.folder.absolute().parents) if folder.is_dir())
        if missing > (free := shutil.disk_usage(there).free):
            LOG.warning(
                "%s: %.1f GiB of shards are still to be fetched, data.cache=%s has %.1f GiB free; set data.cache_gib"
                " to what they may take, or name a larger disk",
                *(name, missing / GIB, cache.folder, free / GIB),
            )


def open_shard_splits(
    root: str, val: str | None, cache: ShardCache, label_key: str | None, index: str | None = None
) -> tuple[Source, Source]:
    """(training images, validation images) of data.root and data.val; no validation images where val is None.

    The classes of the training images and index (see `open_shards`) hold for both. Raises DataError for a validation
    image without a label.
    """
    training = open_shards(root, cache, label_key=label_key, index=index)
    if val is None or not training.classes:
        return training, Subset(training, ())
    validation = open_shards(val, cache, label_key=label_key, classes=training.classes, index=index)
    if (validation.labels < 0).any():
        first = validation.describe(int(np.argmin(validation.labels)))
        raise DataError(f"{first} has no label, which validation images need; add it, or correct data.val")
    return training, validation
