"""Open files that the threads of a process share, closed when nobody reads them."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class _File:
    fd: int
    users: int = 0


class Handles:
    """Open files by name, shared by the threads of a process: `idle` of them stay open unused, and those `wanted`.

    A file is closed when no thread reads it. Forked and pickled copies begin empty.
    """

    def __init__(self, idle: int) -> None:
        self.idle = idle
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._wanted: frozenset[str] = frozenset()

    def __reduce__(self) -> tuple[type[Handles], tuple[int]]:
        return Handles, (self.idle,)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    @contextmanager
    def use(self, name: str, opener: Callable[[], int]) -> Iterator[int]:
        """The descriptor of `name`, opened by `opener` where it is not open; os.pread from it in any thread."""
        if self._pid != os.getpid():  # a lock that a thread of the parent held would stay held for ever
            self._begin()
        with self._lock:
            file = self._files.get(name)
            if file is not None:
                file.users += 1
                self._files.move_to_end(name)
        if file is None:
            fd = opener()  # may take minutes: other names go on
            with self._lock:
                file = self._files.get(name)
                if file is None:
                    file = self._files[name] = _File(fd)
                else:
                    os.close(fd)
                file.users += 1
        try:
            yield file.fd
        finally:
            with self._lock:
                file.users -= 1
                self._trim()

    def want(self, names: frozenset[str]) -> None:
        """Keep these open once they are; let the others go."""
        with self._lock:
            self._wanted = names
            self._trim()

    def _trim(self) -> None:
        idle = [name for name, file in self._files.items() if not file.users and name not in self._wanted]
        for name in idle[: max(0, len(idle) - self.idle)]:
            os.close(self._files.pop(name).fd)
