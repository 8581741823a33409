"""What can be packed: ready-made sets, lists of files, shards, Hugging Face data; what cannot be."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torchvision import datasets

from fastsimclr.loaders.beton.origins import Origin, open_list, open_origin
from fastsimclr.loaders.beton.pack import Packing, pack
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.recode import Recoding
from fastsimclr.loaders.beton.sidecar import read_sidecar, sidecar_path
from fastsimclr.loaders.source import DataError
from tests.loaders.pictures import encoded, picture, put, run


def test_torchvision_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(root: str, train: bool, download: bool) -> SimpleNamespace:
        assert (root, download) == ("somewhere", False)
        data = np.full((3 if train else 2, 32, 32, 3), 7, dtype=np.uint8)
        return SimpleNamespace(data=data, targets=list(range(len(data))), classes=["x", "y", "z"])

    monkeypatch.setattr(datasets, "CIFAR10", make)
    found = open_origin(Origin(src="cifar10", root="somewhere"))
    assert {key: len(source) for key, source in found.items()} == {"train": 3, "val": 2}


def test_lists(tmp_path: Path) -> None:
    put(tmp_path, {name: encoded(picture()) for name in ("a.jpg", "b.jpg", "c,d.jpg", "sub/e.jpg")})
    (tmp_path / "list.txt").write_text("sub/e.jpg\tcat\nb.jpg,dog\nc,d.jpg\n\na.jpg\nc,d.jpgx,dog\n")
    source = open_list(tmp_path / "list.txt")
    assert source.names == ("a.jpg", "b.jpg", "c,d.jpg", "c,d.jpgx", "sub/e.jpg")
    assert source.classes == ("cat", "dog") and source.labels.tolist() == [-1, 1, -1, 1, 0]
    made = pack(source, tmp_path / "x.beton", Packing(recoding=Recoding(), threads=1, max_bad_fraction=0.5))
    assert made.labels.tolist() == [-1, 1, -1, 0]
    lost = ("c,d.jpgx", "c,d.jpgx cannot be read: No such file or directory")
    assert read_sidecar(sidecar_path(made.path)).left_out == (lost,)
    (tmp_path / "labels.csv").write_text("path,label\nsub/e.jpg,owl\n")
    assert open_list(tmp_path / "labels.csv").names == ("sub/e.jpg",)
    for text, said in (("a.jpg\na.jpg\n", "list.txt:2: a.jpg is listed twice"), ("\n", "list.txt names no image")):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(DataError, match=said):
            open_list(tmp_path / "list.txt")


def test_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    blobs = [encoded(picture(seed=k)) for k in range(6)]
    for shard in (0, 1):
        with tarfile.open(tmp_path / f"s-{shard}.tar", "w") as archive:
            for k in range(3 * shard, 3 * shard + 3):
                for name, data in ((f"{k}.jpg", blobs[k]), (f"{k}.cls", str(k % 2).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    code, _, err = run(capsys, "pack", f"{tmp_path}/s-{{0..1}}.tar", tmp_path / "x.beton")
    assert code == 0, err
    source = BetonSource(tmp_path / "x.beton")
    assert [source.read(k) for k in range(6)] == blobs and source.labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_hugging_face_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets as hugging

    blobs = [encoded(picture(seed=k)) for k in range(4)]
    cells = {"picture": [{"bytes": blob, "path": None} for blob in blobs], "label": [1, 0, 1, 1]}
    features = hugging.Features({"picture": hugging.Image(), "label": hugging.ClassLabel(names=["no", "yes"])})
    rows = hugging.Dataset.from_dict(cells, features=features)
    hugging.DatasetDict({"train": rows, "validation": rows.select([2, 0])}).save_to_disk(str(tmp_path / "set"))
    words = ("pack", tmp_path / "set", tmp_path / "out", "--column", "picture")
    code, _, err = run(capsys, *words)
    assert code == 0, err
    train, val = (BetonSource(tmp_path / f"out/{key}.beton") for key in ("train", "val"))
    assert [train.read(k) for k in range(4)] == blobs and [val.read(0), val.read(1)] == [blobs[2], blobs[0]]
    assert train.classes == ("no", "yes") and train.labels.tolist() == [1, 0, 1, 1] and val.labels.tolist() == [1, 1]
    rows.rename_column("label", "k").cast_column("k", hugging.Value("int64")).save_to_disk(str(tmp_path / "plain"))
    (only,) = open_origin(Origin(src=str(tmp_path / "plain"), column="picture", label_column="k")).values()
    assert only.classes == ("0", "1") and only.labels.tolist() == [1, 0, 1, 1]
    for column, said in (("nix", "no column nix, but picture, label"), ("label", "is ClassLabel.*not Image")):
        with pytest.raises(DataError, match=said):
            open_origin(Origin(src=str(tmp_path / "set"), column=column))
    with pytest.raises(DataError, match="is no data set that the package datasets opens"):
        open_origin(Origin(src=str(tmp_path), column="picture"))


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"run: pip install 'fastsimclr\[hugging\]'"):
        open_origin(Origin(src="anything", column="image"))


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        (Origin(src="nowhere"), "nowhere is no folder and no file; give one, FILE.beton, tars"),
        (Origin(src="digits", labels="x.csv"), "x.csv: labels and val are for a folder, and digits is none"),
    ],
)
def test_sources_that_cannot_be(origin: Origin, said: str) -> None:
    with pytest.raises(DataError, match=said):
        open_origin(origin)
