"""The functions of cut.c and jpeg.c where they were compiled, and the system's libturbojpeg where it is installed."""

from __future__ import annotations

import ctypes
import importlib.machinery
from collections.abc import Callable
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from fastsimclr.loaders.log import LOG

VERSION = 3  # as in cut.c: what the functions take


def _compiled() -> Any:
    """The library as setup.py compiles it, or None. A CDLL's functions run without the interpreter's lock."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (path := Path(__file__).with_name(f"_cut{suffix}")).is_file():
            try:
                library = ctypes.CDLL(str(path))
                current = library.fastsimclr_cut_version() == VERSION
            except (OSError, AttributeError):
                current = False
            if not current:
                LOG.warning("%s was compiled elsewhere or from other sources, torch cuts crops; install again", path)
                return None
            pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
            library.fastsimclr_cut.argtypes = [pointer, long, number, number, number, pointer]
            library.fastsimclr_cut_many.argtypes = [pointer, number, number, long, *[pointer] * 3, number, pointer]
            arguments: list[Any] = [pointer, number, number, *[pointer] * 6]  # the files, then the crops
            library.fastsimclr_jpegs.argtypes = [*arguments, number, long, pointer, number, *[pointer] * 3]
            library.fastsimclr_jpegs.restype = None
            library.fastsimclr_copy_many.argtypes = [pointer, number, *[pointer] * 4]
            library.fastsimclr_copy_many.restype = None
            return library
    return None


def _turbo_jpeg() -> Any:
    """Four functions of libturbojpeg (1.5 or later), as jpeg.c takes them, or None."""
    names = ("tjInitDecompress", "tjDecompressHeader3", "tjDecompress2", "tjDestroy")
    finders: tuple[Callable[[], str | None], ...] = (lambda: "libturbojpeg.so.0", lambda: find_library("turbojpeg"))
    for find in finders:  # the second starts processes
        try:
            library = ctypes.CDLL(find() or "libturbojpeg.so")
            functions = [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in names]
        except (OSError, AttributeError):
            continue
        return (ctypes.c_void_p * len(names))(*[function.value for function in functions])
    return None


LIBRARY = _compiled()
COMPILED = LIBRARY is not None
TURBO_JPEG = _turbo_jpeg() if COMPILED else None
