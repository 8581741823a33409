"""A .beton in the making: FILE.partial, its journal, and the images in it; begun anew or where it was interrupted.

The journal has a line for each stretch of pages that are on the disk. FILE appears when it is complete and every
stored blob has been read again and has its checksum.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastsimclr.loaders.beton.journal import Entry, Journal
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.recode import Stored
from fastsimclr.loaders.beton.sidecar import Sidecar, left_out_path, sidecar_path, write_left_out, write_sidecar
from fastsimclr.loaders.beton.verify import damaged_blobs
from fastsimclr.loaders.beton.writer import BetonWriter
from fastsimclr.loaders.source import DataError, Source
from fastsimclr.loaders.whole import sync_folder


@dataclass(frozen=True)
class Image:
    """One image in the partial file. id: in the source."""

    id: int
    start: int
    length: int
    height: int
    width: int
    raw: bool
    crc: int
    way: str


def partial_path(target: Path) -> Path:
    """FILE.beton.partial."""
    return target.with_name(target.name + ".partial")


def journal_path(target: Path) -> Path:
    """FILE.beton.journal."""
    return target.with_name(target.name + ".journal")


class Partial:
    """What is packed so far of `source` into `target`: images in the order of the source, and those left out.

    names: of each image in the source. settings: what decides over the bytes of the file. resume: go on with what an
    interrupted pack left. overwrite: do not mind what it left. Raises DataError for what is there and is not of this
    pack, or in use by another process, and OSError.
    """

    def __init__(
        self, source: Source, names: Sequence[str], target: Path, settings: dict[str, Any], *, resume: bool,
        overwrite: bool,
    ) -> None:  # fmt: skip
        self.source, self.names, self.target, self.settings = source, names, target, settings
        self.path = partial_path(target)
        self.journal = Journal(journal_path(target))
        self.images: list[Image] = []
        self.left_out: list[tuple[int, str]] = []
        self._resume, self._overwrite = resume, overwrite
        self._writer: BetonWriter | None = None
        if self.journal.path.exists() and not resume and not overwrite:
            raise DataError(
                f"{self.journal.path} is left of an interrupted pack; give --resume auto to go on with it, or"
                " --overwrite to start anew"
            )

    @property
    def done(self) -> int:
        """Images of the source seen so far."""
        return len(self.images) + len(self.left_out)

    @property
    def bytes_done(self) -> int:
        """Bytes of whole pages so far."""
        return 0 if self._writer is None else self._writer.reached

    def begin(self) -> None:
        """Open the file, where an interrupted pack left it or anew."""
        head = {"source": self.source.fingerprint, "images": len(self.source), **self.settings}
        entries = self.journal.entries if self._resume else []
        reached = self._restore(head, entries) if len(entries) > 1 else None
        page_bytes = self.settings["page_bytes"] if reached is None else entries[-1]["page_bytes"]
        self.journal.start(keep=reached is not None)
        self._writer = writer = BetonWriter(self.path, len(self.source), page_bytes, reached=reached)
        for row, image in enumerate(self.images):
            writer.restore(row, image.start, image.length, image.height, image.width, image.raw)
        self._kept, self._dropped = len(self.images), len(self.left_out)  # how many are in the journal
        self._synced = writer.reached
        if reached is None:
            self.journal.add(head)

    def _restore(self, head: Entry, entries: list[Entry]) -> int | None:
        """Where the next page of the partial file begins; None to start anew."""
        changed = [key for key in head if entries[0].get(key) != head[key]]
        reached = int(entries[-1]["reached"])
        lost = not self.path.is_file() or self.path.stat().st_size < reached
        if (changed or lost) and self._overwrite:
            return None
        if changed:
            raise DataError(
                f"{self.journal.path} is of a pack with another {', '.join(changed)}; give the settings and the source"
                " that it was begun with, or --overwrite to start anew"
            )
        if lost:
            raise DataError(f"{self.path} lacks what {self.journal.path} says is in it; give --overwrite to start anew")
        for entry in entries[1:]:
            self.images += [Image(*row) for row in entry["images"]]
            self.left_out += [(index, reason) for index, reason in entry["left_out"]]
        return reached

    def add(self, index: int, stored: Stored) -> None:
        """Lay down image `index` of the source, the next one. DataError for one that the format cannot hold."""
        assert self._writer is not None
        row, shape = len(self.images), (stored.height, stored.width, stored.raw)
        try:
            start = self._writer.add(row, stored.blob, *shape)
        except DataError as error:
            raise DataError(f"{self.names[index]}: {error}") from error
        self.images.append(Image(index, start, len(stored.blob), *shape, zlib.crc32(stored.blob), stored.way))

    def leave_out(self, index: int, reason: str) -> None:
        """Note that image `index` of the source, the next one, is not packed."""
        self.left_out.append((index, reason))

    def checkpoint(self, least: int = 1) -> None:
        """Note in the journal what lies in whole pages, once these are on the disk, if it is `least` bytes more.

        The page begun counts as not done. An image left out counts as done where one that is kept after it is.
        """
        assert self._writer is not None
        reached = self._writer.reached
        kept = len(self.images)
        if reached - self._synced < least:
            return
        while kept > self._kept and self.images[kept - 1].start >= reached:
            kept -= 1
        if kept == self._kept:
            return
        last = self.images[kept - 1].id
        dropped = sum(index < last for index, _ in self.left_out)
        self._writer.sync()
        entry = {
            "reached": reached,
            "page_bytes": self._writer.page_bytes,
            "images": [astuple(image) for image in self.images[self._kept : kept]],
            "left_out": self.left_out[self._dropped : dropped],
        }
        self.journal.add(entry)
        self._kept, self._dropped, self._synced = kept, dropped, reached

    def finish(self, threads: int, tick: Callable[[], None]) -> BetonSource:
        """Tables, sidecar, a check of it all by `threads` threads, then the final names. tick: see `damaged_blobs`."""
        assert self._writer is not None
        if not self.images:
            raise DataError(f"none of the {len(self.source)} images of {self.source.name} could be packed")
        ids = [image.id for image in self.images]
        size = self._writer.finish(self.source.labels[ids])
        card = Sidecar(
            images=len(ids),
            file_bytes=size,
            names=tuple(self.names[index] for index in ids),
            classes=tuple(self.source.classes),
            crc32=np.array([image.crc for image in self.images], dtype=np.uint32),
            source={"name": self.source.name, "fingerprint": self.source.fingerprint},
            settings=self.settings,
            stored=dict(Counter(image.way for image in self.images)),
            left_out=tuple((self.names[index], reason) for index, reason in self.left_out),
        )
        beside = sidecar_path(self.path)
        beside.unlink(missing_ok=True)
        card = replace(card, fingerprint=BetonSource(self.path).fingerprint_with(card))
        write_sidecar(beside, card)
        written = BetonSource(self.path)
        for row, reason in damaged_blobs(written, threads, decoding=False, tick=tick):
            raise DataError(
                f"{self.path}: what was written is not what is read: {card.names[row]}: {reason}; give --overwrite"
            )
        if card.left_out:
            write_left_out(left_out_path(self.target), card.left_out)
        else:
            left_out_path(self.target).unlink(missing_ok=True)
        # The sidecar first: a crash between the two leaves a sidecar that is refused, not a file without names.
        beside.replace(sidecar_path(self.target))
        self.path.replace(self.target)
        sync_folder(self.target.parent)
        self.journal.path.unlink()
        return BetonSource(self.target)

    def close(self) -> None:
        """Close what is open; all that is done stays."""
        if self._writer is not None:
            self._writer.close()
        self.journal.close()
