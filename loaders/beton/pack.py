"""From any source to one .beton file: converted by many threads, laid down in the source's order, whole or not at all.

While it works there are FILE.partial and FILE.journal, from which an interrupted run goes on; the result is the same to
the byte.
"""

# n images of the source

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastsimclr.loaders.ahead import ahead
from fastsimclr.loaders.beton.journal import Journal
from fastsimclr.loaders.beton.lossless import describe
from fastsimclr.loaders.beton.origins import image_names
from fastsimclr.loaders.beton.partial import Partial, journal_path, partial_path
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.recode import Recoding, Stored, recode
from fastsimclr.loaders.faults import unexpected
from fastsimclr.loaders.sets.basic import FileSource, Subset
from fastsimclr.loaders.sets.lists import some
from fastsimclr.loaders.shards.remote import FetchError
from fastsimclr.loaders.source import DataError, Source

CHECKPOINT_BYTES = 64 * 2**20  # of whole pages between two lines of the journal
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


def pack(
    source: Source,
    target: Path,
    packing: Packing,
    *,
    progress: Callable[[int, int], None] = lambda done, n: None,
    stop: Callable[[], bool] = lambda: False,
) -> BetonSource:
    """Pack `source` into `target`, with FILE.json beside it and FILE.left-out.csv where images were left out.

    progress: called with (images done, n). stop: asked between images, also while the finished file is checked;
    Interrupted follows. Raises DataError for too many damaged images, a file that is there already, a full or failing
    disk and settings that do not fit an interrupted pack, FetchError as the source does, and RuntimeError, naming the
    image, where a thread fails otherwise.
    """
    if not len(source):
        raise DataError(f"{source.name} has no image to pack into {target}; name another source")
    if target.exists() and packing.resume and (done := _already(source, target, packing)) is not None:
        return done
    if target.exists() and not packing.overwrite:
        raise DataError(f"{target} exists; give another name, or --overwrite to replace it")
    names = image_names(source)
    if len(set(names)) < len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        raise DataError(f"{source.name} has several images called {some(twice)}; give each its own name")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Partial(source, names, target, packing.settings(), resume=packing.resume, overwrite=packing.overwrite)

    def tick() -> None:
        if stop():
            partial.checkpoint()
            raise Interrupted(partial.done, len(source))

    try:
        _check_room(source, partial, packing.recoding)
        partial.begin()
        for index, result in _converted(source, names, packing, partial.done):
            _take(source, partial, packing, index, result)
            progress(partial.done, len(source))
            tick()
        return partial.finish(packing.threads, tick)
    except OSError as error:
        raise DataError(_unwritable(source, partial, error)) from error
    finally:
        partial.close()


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
    if same and not partial_path(target).exists():  # a crash after the last rename leaves the journal
        Journal(journal_path(target)).discard()
    return there if same else None


def _take(source: Source, partial: Partial, packing: Packing, index: int, result: Stored | DataError) -> None:
    try:
        if isinstance(result, DataError):
            raise result
        partial.add(index, result)
    except DataError as error:
        partial.leave_out(index, str(error))
        if len(partial.left_out) > packing.max_bad_fraction * len(source):
            raise _too_many(source, partial, packing) from error
    partial.checkpoint(CHECKPOINT_BYTES)


def _converted(
    source: Source, names: Sequence[str], packing: Packing, first_image: int
) -> Iterator[tuple[int, Stored | DataError]]:
    """(id, the stored image or why it is left out) from `first_image` on, in the order of the ids, by many threads."""

    def convert(start: int) -> list[Stored | DataError]:
        ids = range(start, min(start + CHUNK, len(source)))
        return [_stored(source, index, names[index], packing.recoding) for index in ids]

    pool = ThreadPoolExecutor(packing.threads, thread_name_prefix="pack")
    begun = ((start, pool.submit(convert, start)) for start in range(first_image, len(source), CHUNK))
    with ahead(pool, begun, 2 * packing.threads) as chunks:
        for start, chunk in chunks:
            yield from enumerate(chunk.result(), start)


def _stored(source: Source, index: int, name: str, recoding: Recoding) -> Stored | DataError:
    """Image `index`, called `name`, as it is to be stored; the error where it is damaged."""
    try:
        return recode(source.read(index), name, recoding)
    except OSError as error:  # named as in the source, so that a packed file tells nothing of this machine
        return DataError(f"{name} cannot be read: {error.strerror or error}")
    except DataError as error:
        return error
    except FetchError:
        raise
    except Exception as error:
        raise unexpected(source.describe(index), error) from error


def _too_many(source: Source, partial: Partial, packing: Packing) -> DataError:
    first = "; ".join(reason for _, reason in partial.left_out[:3])
    return DataError(
        f"{source.name}: {len(partial.left_out)} of {len(source)} images are damaged, over"
        f" --max_bad_fraction={packing.max_bad_fraction}; repair or remove them, or raise it and give --resume"
        f" auto. The first: {first}"
    )


def _check_room(source: Source, partial: Partial, recoding: Recoding) -> None:
    """DataError where the files alone are more than the disk has free and are kept at their size."""
    files = source.base if isinstance(source, Subset) else source
    if recoding.short_side or recoding.store == "raw" or not isinstance(files, FileSource):
        return
    sizes = files.sizes[source.indices] if isinstance(source, Subset) else files.sizes
    folder = partial.target.parent
    free = shutil.disk_usage(folder).free + (partial.path.stat().st_size if partial.path.exists() else 0)
    if (needed := int(sizes.sum())) > free:
        raise DataError(
            f"{partial.target} needs about {needed:,} bytes, but {folder} has {free:,} free; free some, or give"
            " --short_side 256"
        )


def _unwritable(source: Source, partial: Partial, error: OSError) -> str:
    """What to say of a disk that does not take the file."""
    folder, what = partial.target.parent, os.strerror(error.errno) if error.errno else str(error)
    where = f"at image {partial.done:,} of {len(source):,} of {source.name}"
    if error.errno not in _FULL:
        return (
            f"{error.filename or partial.path}: {what} {where}; see to the disk or the rights, then give the same"
            " command with --resume auto"
        )
    more = partial.bytes_done * (len(source) - partial.done) // max(partial.done, 1)
    needed = f" and about {more:,} more are needed" if partial.done else ""
    return (
        f"{folder}: {what} {where}: {shutil.disk_usage(folder).free:,} bytes are free{needed}; free some and give the"
        f" same command with --resume auto, or remove {partial.path.name} and {partial.journal.path.name}"
    )
