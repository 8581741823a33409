"""Output files: written whole or not at all, never over another by accident; and packages that may be missing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from fastsimclr.runs.checkpoint import sync_folder


@contextlib.contextmanager
def atomic_outputs(*paths: Path, overwrite: bool, read: Path) -> Iterator[tuple[Path, ...]]:
    """FILE.part for each of `paths`, to be written in the block and renamed at its end; after an error none is left.

    read: what the content is made from, never replaced. Makes the folder; after an error it is not left empty.
    Raises FileExistsError for a path that exists, unless overwrite.
    """
    for path in paths:
        if path.is_dir() or path.resolve() == read.resolve():
            what = "is a folder" if path.is_dir() else "would replace what is read"
            raise FileExistsError(f"{path} {what}; give another --out")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; give another --out, or --overwrite")
    parts = tuple(path.with_name(path.name + ".part") for path in paths)
    made = [path.parent for path in paths if not path.parent.exists()]
    for folder in made:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield parts
        for part in parts:
            with part.open("rb") as file:
                os.fsync(file.fileno())
        for part, path in zip(parts, paths, strict=True):
            part.replace(path)
            sync_folder(path.parent)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def need(feature: str, extra: str, *packages: str) -> None:
    """ValueError with the install command where a package of the optional extra `extra` is missing."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ValueError(f'{feature} needs {" and ".join(missing)}; run: pip install "fastsimclr[{extra}]"')
