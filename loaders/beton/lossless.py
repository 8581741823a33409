"""Progressive and arithmetic-coded JPEGs made baseline, coefficient by coefficient, where libturbojpeg is installed.

simplejpeg holds that library without this function. The system's own (Debian: libturbojpeg0) is asked through ctypes:
tjTransform with no operation writes the same coefficients in one scan and leaves comments and EXIF out.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import threading
from functools import cache

_COPY_NONE = 64  # TJXOPT_COPYNONE, turbojpeg.h
_HOW = "libturbojpeg"


class _Transform(ctypes.Structure):
    """tjtransform, turbojpeg.h; all zero but the options: no operation on the whole image."""

    _fields_ = (
        *[(name, ctypes.c_int) for name in ("x", "y", "w", "h", "op", "options")],
        ("data", ctypes.c_void_p),
        ("filter", ctypes.c_void_p),
    )


@cache
def _library() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("turbojpeg")
    if name is None:
        return None
    library = ctypes.CDLL(name)
    library.tjInitTransform.restype = ctypes.c_void_p
    pointer = ctypes.POINTER(ctypes.c_void_p)
    sizes = ctypes.POINTER(ctypes.c_ulong)
    library.tjTransform.argtypes = (
        *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_int),
        *(pointer, sizes, ctypes.POINTER(_Transform), ctypes.c_int),
    )
    library.tjFree.argtypes = (ctypes.c_void_p,)
    library.tjDestroy.argtypes = (ctypes.c_void_p,)
    return library


_of_thread = threading.local()


class _Handle:
    """A transformer, which serves one thread at a time."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.number = library.tjInitTransform()

    def __del__(self) -> None:
        if self.number:
            self.library.tjDestroy(self.number)


def to_baseline(data: bytes) -> bytes | None:
    """`data`, a sound JPEG, with the same coefficients in a baseline file; None where the library is missing or fails.

    From any thread; the interpreter's lock is released.
    """
    library = _library()
    if library is None:
        return None
    if not hasattr(_of_thread, "handle"):
        _of_thread.handle = _Handle(library)
    target, length = ctypes.c_void_p(), ctypes.c_ulong()
    order = _Transform(options=_COPY_NONE)
    failed = library.tjTransform(
        _of_thread.handle.number, data, len(data), 1, ctypes.byref(target), ctypes.byref(length), ctypes.byref(order), 0
    )
    try:
        return None if failed or not target.value else ctypes.string_at(target.value, length.value)
    finally:
        library.tjFree(target)


def describe() -> str:
    """How a progressive JPEG is made baseline here, for the record."""
    return "re-encoded" if _library() is None else f"lossless ({_HOW})"
