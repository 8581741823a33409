"""Memory that each thread uses again for one image after another: warm in its core's cache, and no new pages."""

from __future__ import annotations

from threading import local

import numpy as np
import numpy.typing as npt

MOST = 2**26  # bytes that a thread keeps


class Scratch(local):
    """Bytes of this thread's own."""

    def __init__(self) -> None:
        self._room = np.empty(0, dtype=np.uint8)

    def take(self, count: int) -> npt.NDArray[np.uint8]:
        """uint8 [count], uninitialised; the thread's next call takes the same memory."""
        if count > MOST:  # one huge image is not to take its memory in every thread for good
            return np.empty(count, dtype=np.uint8)
        if len(self._room) < count:
            self._room = np.empty(min(count + count // 4, MOST), dtype=np.uint8)
        return self._room[:count]
