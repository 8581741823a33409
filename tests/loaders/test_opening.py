"""Packed files as the data of a run: labels, classes and validation images from other files."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.sidecar import Sidecar, sidecar_path, write_sidecar
from fastsimclr.loaders.beton.writer import BetonWriter
from fastsimclr.loaders.data import DataConfig, open_data
from fastsimclr.loaders.source import DataError
from tests.loaders.betons import PAGE, jpeg


def packed(path: Path, labels: list[int], names: list[str], classes: list[str]) -> Path:
    """A packed file of tiny images with a sidecar."""
    path.parent.mkdir(exist_ok=True)
    sidecar_path(path).unlink(missing_ok=True)
    blobs = [jpeg(6, 5, k) for k in range(len(labels))]
    writer = BetonWriter(path, len(labels), PAGE)
    for row, blob in enumerate(blobs):
        writer.add(row, blob, 5, 6, False)
    size = writer.finish(labels)
    writer.close()
    crcs = np.array([zlib.crc32(blob) for blob in blobs], dtype=np.uint32)
    facts = {"source": {"name": "", "fingerprint": ""}, "settings": {}, "stored": {}, "left_out": ()}
    card = Sidecar(images=len(labels), file_bytes=size, names=tuple(names), classes=tuple(classes), crc32=crcs, **facts)
    write_sidecar(sidecar_path(path), replace(card, fingerprint=BetonSource(path).fingerprint_with(card)))
    return path


def test_packed_files_as_the_data_of_a_run(tmp_path: Path) -> None:
    names = [f"{k}.jpg" for k in range(10)]
    one = packed(tmp_path / "one/train.beton", [0, 1] * 5, names, ["cat", "dog"])
    held = open_data(DataConfig(source="beton", root=str(one), val_fraction=0.2))
    assert (len(held.unlabelled), len(held.val), held.val.classes) == (8, 2, ("cat", "dog"))
    val = packed(tmp_path / "one/val.beton", [1, 1, 0], names[:3], ["bird", "dog"])
    with pytest.raises(DataError, match=r"val\.beton has classes that no training image has: bird"):
        open_data(DataConfig(source="beton", root=str(one.parent)))
    packed(val, [1, 1, 0], names[:3], ["dog", "cat"])
    both = open_data(DataConfig(source="beton", root=str(one.parent)))
    assert both.val.labels.tolist() == [0, 0, 1] and both.val.classes == ("cat", "dog")
    assert len(both.unlabelled) == 10 and both.train is both.unlabelled
    (tmp_path / "one/labels.csv").write_text("path,label\n3.jpg,owl\n4.jpg,dog\n")
    packed(val, [0, 1, 1], names[:3], ["dog", "owl"])
    few = open_data(DataConfig(source="beton", root=str(one.parent)))
    assert few.unlabelled.labels.tolist() == [-1, -1, -1, 1, 0, -1, -1, -1, -1, -1]
    assert few.train.classes == ("dog", "owl") and few.val.labels.tolist() == [0, 1, 1]
    (tmp_path / "v.csv").write_text("0.jpg,owl\n1.jpg,0\n2.jpg,1\n")
    listed = DataConfig(source="beton", root=str(one.parent), val=str(val), val_labels=str(tmp_path / "v.csv"))
    assert open_data(listed).val.labels.tolist() == [1, 0, 1]
    (tmp_path / "one/labels.csv").write_text("path,label\nnone.jpg,owl\n")
    with pytest.raises(DataError, match=r"labels.csv names none.jpg, not in .*train.beton"):
        open_data(DataConfig(source="beton", root=str(one.parent)))
    with pytest.raises(DataError, match=r"train.beton does not exist; pack into it: fastsimclr pack SRC"):
        open_data(DataConfig(source="beton", root=str(tmp_path)))
    with pytest.raises(ValueError, match=r"data\.source=beton needs data.root"):
        DataConfig(source="beton")
