"""Pictures, folders of them, and the command line that packs them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastsimclr.cli.main import main
from fastsimclr.loaders.beton.pack import Packing
from fastsimclr.loaders.beton.recode import Recoding
from fastsimclr.loaders.beton.sidecar import sidecar_path
from fastsimclr.loaders.sets.folder import open_folder
from fastsimclr.loaders.source import Source


def picture(height: int = 60, width: int = 80, seed: int = 0) -> Image.Image:
    """Soft colours, as a photograph has."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **how: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def oriented(value: int) -> Image.Exif:
    """EXIF with this orientation."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def put(root: Path, images: dict[str, bytes]) -> Path:
    """Write files below `root`."""
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def folder_source(root: Path) -> Source:
    """The training images of a folder."""
    return open_folder(root, labels=None, val=None, val_labels=None)[0]


def how(**recoding: Any) -> Packing:
    """Pages of 2 MiB and two threads."""
    return Packing(recoding=Recoding(**recoding), threads=2, page_bytes=2**21)


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and errors of the command."""
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


def bytes_of(path: Path) -> tuple[bytes, bytes]:
    """Those of a packed file and of its sidecar."""
    return path.read_bytes(), sidecar_path(path).read_bytes()
