"""From any source to one .beton file: converted by many threads, laid down in the source's order, whole or not at all.

While it works there are FILE.partial and FILE.journal. The journal has a line for each 64 MiB of pages that are on the
disk, so that an interrupted run goes on there; the result is the same to the byte. FILE appears when it is
complete and every stored blob has been read again and has its checksum.
"""

# n images of the source

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastsimclr.loaders.beton.journal import Entry, Journal
from fastsimclr.loaders.beton.lossless import describe
from fastsimclr.loaders.beton.origins import image_names
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.recode import Recoding, Stored, recode
from fastsimclr.loaders.beton.sidecar import Sidecar, left_out_path, sidecar_path, write_left_out, write_sidecar
from fastsimclr.loaders.beton.verify import damaged_blobs
from fastsimclr.loaders.beton.writer import BetonWriter
from fastsimclr.loaders.sets.basic import FileSource, Subset
from fastsimclr.loaders.sets.lists import some
from fastsimclr.loaders.source import DataError, Source

CHECKPOINT_BYTES = 64 * 2**20
CHUNK = 8  # images converted by one task
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Interrupted(Exception):
    """Packing was asked to stop; what is done is kept. done, n: images."""

    def __init__(self, done: int, n: int) -> None:
        super().__init__(f"packed {done:,} of {n:,} images")
        self.done, self.n = done, n


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a source is packed. threads: that convert. page_bytes: a power of two. max_bad_fraction: of images left out.

    resume: go on with an interrupted pack. overwrite: replace the file, and what is left of an interrupted pack.
    """

    recoding: Recoding
    threads: int
    page_bytes: int = 2**23
    max_bad_fraction: float = 0.01
    resume: bool = False
    overwrite: bool = False

    def settings(self) -> dict[str, Any]:
        """What decides over the bytes of the file."""
        return {**asdict(self.recoding), "page_bytes": self.page_bytes, "progressive": describe()}


@dataclass(frozen=True)
class _Image:
    """One image in the partial file. id: in the source."""

    id: int
    start: int
    length: int
    height: int
    width: int
    raw: bool
    crc: int
    way: str


def pack(
    source: Source,
    target: Path,
    packing: Packing,
    *,
    progress: Callable[[int, int], None] = lambda done, n: None,
    stop: Callable[[], bool] = lambda: False,
) -> BetonSource:
    """Pack `source` into `target`, with FILE.json beside it and FILE.left-out.csv where images were left out.

    progress: called with (images done, n). stop: asked between images; Interrupted follows. Raises DataError for too
    many damaged images, a file that is there already, a full disk and settings that do not fit an interrupted pack.
    """
    if not len(source):
        raise DataError(f"{source.name} has no image to pack into {target}; name another source")
    if target.exists() and packing.resume and (done := _already(source, target, packing)) is not None:
        return done
    if target.exists() and not packing.overwrite:
        raise DataError(f"{target} exists; give another name, or --overwrite to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = _Work(source, target, packing)
    try:
        writer = work.begin()
        work.convert(writer, progress, stop)
        return work.finish(writer)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DataError(work.full(error)) from error
    finally:
        work.close()


def _already(source: Source, target: Path, packing: Packing) -> BetonSource | None:
    """The finished file, where it was packed from this source in this way."""
    try:
        there = BetonSource(target)
    except DataError:
        if packing.overwrite:
            return None
        raise
    card = there.sidecar
    same = card is not None and (card.source["fingerprint"], card.settings) == (source.fingerprint, packing.settings())
    if not same and not packing.overwrite:
        raise DataError(f"{target} was packed from another source or in another way; give --overwrite to replace it")
    return there if same else None


class _Work:
    """The state of one pack: the partial file, its journal, and the images in them."""

    def __init__(self, source: Source, target: Path, packing: Packing) -> None:
        self.source, self.target, self.packing = source, target, packing
        self.partial = target.with_name(target.name + ".partial")
        self.journal = Journal(target.with_name(target.name + ".journal"))
        self.names = image_names(source)
        if len(set(self.names)) < len(self.names):
            twice = [name for name, count in Counter(self.names).items() if count > 1]
            raise DataError(f"{source.name} has several images called {some(twice)}; give each its own name")
        self.images: list[_Image] = []
        self.left_out: list[tuple[int, str]] = []
        self.writer: BetonWriter | None = None
        if self.journal.path.exists() and not packing.resume and not packing.overwrite:
            raise DataError(
                f"{self.journal.path} is left of an interrupted pack; give --resume auto to go on with it, or"
                " --overwrite to start anew"
            )

    def begin(self) -> BetonWriter:
        """Open the partial file, where an interrupted pack left it or anew."""
        head = {"source": self.source.fingerprint, "images": len(self.source), **self.packing.settings()}
        entries = self.journal.entries if self.packing.resume else []
        reached = self._restore(head, entries) if len(entries) > 1 else None
        page_bytes = self.packing.page_bytes if reached is None else entries[-1]["page_bytes"]
        self._room()
        self.journal.start(keep=reached is not None)
        self.writer = writer = BetonWriter(self.partial, len(self.source), page_bytes, reached=reached)
        for row, image in enumerate(self.images):
            writer.restore(row, image.start, image.length, image.height, image.width, image.raw)
        self._kept, self._dropped = len(self.images), len(self.left_out)  # how many are in the journal
        self._synced = writer.reached
        if reached is None:
            self.journal.add(head)
        return writer

    def _restore(self, head: Entry, entries: list[Entry]) -> int | None:
        """Where the next page of the partial file begins; None to start anew."""
        changed = [key for key in head if entries[0].get(key) != head[key]]
        reached = int(entries[-1]["reached"])
        lost = not self.partial.is_file() or self.partial.stat().st_size < reached
        if (changed or lost) and self.packing.overwrite:
            return None
        if changed:
            raise DataError(
                f"{self.journal.path} is of a pack with another {', '.join(changed)}; give the settings and the source"
                " that it was begun with, or --overwrite to start anew"
            )
        if lost:
            raise DataError(
                f"{self.partial} lacks what {self.journal.path} says is in it; give --overwrite to start anew"
            )
        for entry in entries[1:]:
            self.images += [_Image(*row) for row in entry["images"]]
            self.left_out += [(index, reason) for index, reason in entry["left_out"]]
        return reached

    @property
    def done(self) -> int:
        """Images of the source seen so far."""
        return len(self.images) + len(self.left_out)

    def convert(self, writer: BetonWriter, progress: Callable[[int, int], None], stop: Callable[[], bool]) -> None:
        n = len(self.source)
        for index, result in self._results(self.done):
            try:
                self._lay(writer, index, result)
            except DataError as error:
                self.left_out.append((index, str(error)))
                if len(self.left_out) > self.packing.max_bad_fraction * n:
                    raise self._too_many() from error
            if writer.reached - self._synced >= CHECKPOINT_BYTES:
                self._checkpoint(writer)
            progress(self.done, n)
            if stop():
                self._checkpoint(writer)
                raise Interrupted(self.done, n)

    def _lay(self, writer: BetonWriter, index: int, result: Stored | DataError) -> None:
        if isinstance(result, DataError):
            raise result
        try:
            start = writer.add(len(self.images), result.blob, result.height, result.width, result.raw)
        except DataError as error:
            raise DataError(f"{self.names[index]}: {error}") from error
        shape = (result.height, result.width, result.raw)
        self.images.append(_Image(index, start, len(result.blob), *shape, zlib.crc32(result.blob), result.way))

    def _too_many(self) -> DataError:
        first = "; ".join(reason for _, reason in self.left_out[:3])
        return DataError(
            f"{self.source.name}: {len(self.left_out)} of {len(self.source)} images are damaged, over"
            f" --max_bad_fraction={self.packing.max_bad_fraction}; repair or remove them, or raise it and give --resume"
            f" auto. The first: {first}"
        )

    def _results(self, first: int) -> Iterator[tuple[int, Stored | DataError]]:
        """(id, the stored image or why it is left out), in the order of the ids."""
        running: deque[tuple[int, Future[list[Stored | DataError]]]] = deque()
        starts = iter(range(first, len(self.source), CHUNK))
        with ThreadPoolExecutor(self.packing.threads, thread_name_prefix="pack") as pool:
            try:
                for start in starts:
                    running.append((start, pool.submit(self._convert, start)))
                    if len(running) > 2 * self.packing.threads:
                        start, future = running.popleft()
                        yield from enumerate(future.result(), start)
                while running:
                    start, future = running.popleft()
                    yield from enumerate(future.result(), start)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _convert(self, start: int) -> list[Stored | DataError]:
        results: list[Stored | DataError] = []
        for index in range(start, min(start + CHUNK, len(self.source))):
            try:
                results.append(recode(self.source.read(index), self.names[index], self.packing.recoding))
            except OSError as error:  # named as in the source, so that a packed file tells nothing of this machine
                results.append(DataError(f"{self.names[index]} cannot be read: {error.strerror or error}"))
            except DataError as error:
                results.append(error)
        return results

    def _checkpoint(self, writer: BetonWriter) -> None:
        """Note in the journal what lies in whole pages, once these are on the disk. The page begun counts as not done.

        An image left out counts as done where one that is kept after it is.
        """
        reached = writer.reached
        kept = len(self.images)
        while kept > self._kept and self.images[kept - 1].start >= reached:
            kept -= 1
        if kept == self._kept:
            return
        last = self.images[kept - 1].id
        dropped = sum(index < last for index, _ in self.left_out)
        writer.sync()
        entry = {
            "reached": reached,
            "page_bytes": writer.page_bytes,
            "images": [astuple(image) for image in self.images[self._kept : kept]],
            "left_out": self.left_out[self._dropped : dropped],
        }
        self.journal.add(entry)
        self._kept, self._dropped, self._synced = kept, dropped, reached

    def finish(self, writer: BetonWriter) -> BetonSource:
        """Tables, sidecar, a check of it all, then the final names."""
        if not self.images:
            raise DataError(f"none of the {len(self.source)} images of {self.source.name} could be packed")
        ids = [image.id for image in self.images]
        names = self.names
        size = writer.finish(self.source.labels[ids])
        card = Sidecar(
            images=len(ids),
            file_bytes=size,
            names=tuple(names[index] for index in ids),
            classes=tuple(self.source.classes),
            crc32=np.array([image.crc for image in self.images], dtype=np.uint32),
            source={"name": self.source.name, "fingerprint": self.source.fingerprint},
            settings=self.packing.settings(),
            stored=dict(Counter(image.way for image in self.images)),
            left_out=tuple((names[index], reason) for index, reason in self.left_out),
        )
        beside = self.partial.with_name(self.partial.name + ".json")
        beside.unlink(missing_ok=True)
        card = replace(card, fingerprint=BetonSource(self.partial, beside).fingerprint_with(card))
        write_sidecar(beside, card)
        written = BetonSource(self.partial, beside)
        for row, reason in damaged_blobs(written, self.packing.threads, decoding=False):
            raise DataError(
                f"{self.partial}: what was written is not what is read: {card.names[row]}: {reason}; give --overwrite"
            )
        if card.left_out:
            listed = self.partial.with_name(self.partial.name + ".csv")
            write_left_out(listed, card.left_out)
            listed.replace(left_out_path(self.target))
        else:
            left_out_path(self.target).unlink(missing_ok=True)
        # The sidecar first: a crash between the two leaves a sidecar that is refused, not a file without names.
        beside.replace(sidecar_path(self.target))
        self.partial.replace(self.target)
        _sync_folder(self.target.parent)
        self.journal.path.unlink()
        return BetonSource(self.target)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.journal.close()

    def _room(self) -> None:
        """DataError where the files alone are more than the disk has free and are kept at their size."""
        files = self.source.base if isinstance(self.source, Subset) else self.source
        if (
            self.packing.recoding.short_side
            or self.packing.recoding.store == "raw"
            or not isinstance(files, FileSource)
        ):
            return
        sizes = files.sizes[self.source.indices] if isinstance(self.source, Subset) else files.sizes
        free = shutil.disk_usage(self.target.parent).free
        free += self.partial.stat().st_size if self.partial.exists() else 0
        if (needed := int(sizes.sum())) > free:
            raise DataError(
                f"{self.target} needs about {needed:,} bytes, but {self.target.parent} has {free:,} free; free some, or"
                " give --short_side 256"
            )

    def full(self, error: OSError) -> str:
        """What to say of a full disk."""
        free = shutil.disk_usage(self.target.parent).free
        here = 1 if self.writer is None else self.writer.reached
        needed = here * len(self.source) // max(self.done, 1) - here
        return (
            f"{self.target.parent}: {os.strerror(error.errno or 0)} at image {self.done:,} of {len(self.source):,} of"
            f" {self.source.name}: {free:,} bytes are free and about {needed:,} more are needed; free them and give the"
            f" same command with --resume auto, or remove {self.partial.name} and {self.journal.path.name}"
        )


def _sync_folder(path: Path) -> None:
    """Make a rename in this folder last through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
