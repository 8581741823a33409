"""An append-only list of JSON objects on disk, each with its own CRC-32: what a crash leaves of the last is dropped."""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from fastsimclr.loaders.source import DataError

Entry = dict[str, Any]


class Journal:
    """The journal at `path`. entries: those that were in it when it was opened, up to the first that is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self._file: BinaryIO | None = None
        self._whole = 0  # bytes
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
            crc, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
                break
            self.entries.append(json.loads(text))
            self._whole += len(line)

    def start(self, keep: bool) -> None:
        """Make it ready for `add`, after its whole entries or empty. OSError; DataError where another process adds."""
        self._file = self.path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{self.path} is in use by another process that packs; wait for it") from error
        self._file.truncate(self._whole if keep else 0)

    def add(self, entry: Entry) -> None:
        """Append one entry and wait until it is on the disk. Raises OSError."""
        assert self._file is not None
        text = json.dumps(entry, separators=(",", ":")).encode()
        line = b"%08x " % zlib.crc32(text) + text + b"\n"
        if self._file.write(line) < len(line):  # a disk that is nearly full takes a part; the rest says why
            self._file.write(line)
        os.fsync(self._file.fileno())

    def discard(self) -> None:
        """Remove it, unless another process adds to it. Raises OSError."""
        if self.path.exists():
            with suppress(DataError):
                self.start(keep=True)
                self.path.unlink()
        self.close()

    def close(self) -> None:
        """Close the file; its entries stay."""
        if self._file is not None:
            self._file.close()
