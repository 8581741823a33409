"""Files that are whole or not there: written beside their name, brought to the disk, then renamed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """A file to write in; it gets the name `path` at the end of the block, once its bytes are on the disk.

    After an error nothing is left of it. A kill leaves PATH.tmp, which the next write of `path` replaces; shared: other
    processes may write the same file meanwhile, so that each has a temporary file of its own. Raises OSError.
    """
    mine = f".{os.getpid()}.{threading.get_ident()}" if shared else ""
    temporary = path.with_name(f"{path.name}{mine}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error says more
            temporary.unlink()
        raise
    sync_folder(path.parent)


def write_whole(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Write a file as `whole_file` does. Raises OSError."""
    with whole_file(path, shared=shared) as file:
        file.write(data)


def sync_folder(path: Path) -> None:
    """Make a rename in this folder last through a power cut. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
