"""`fastsimclr pack`: what a packed file holds, what is left out, and what it is for a run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastsimclr.loaders.beton.origins import Origin, open_origin
from fastsimclr.loaders.beton.pack import Packing, pack
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.recode import Recoding
from fastsimclr.loaders.beton.sidecar import left_out_path, read_sidecar, sidecar_path
from fastsimclr.loaders.decode import decode
from fastsimclr.loaders.sets.basic import ArraySource
from fastsimclr.loaders.source import DataError
from tests.loaders.pictures import bytes_of, encoded, how, picture, put, run
from tests.loaders.pictures import folder_source as of


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_imagenet_verbatim_and_at_256(
    imagenet_samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(imagenet_samples.glob("*.JPEG"))[::step]:
        (folder / path.name).symlink_to(path)
    code, out, _ = run(capsys, "pack", folder, tmp_path / "o.beton", "--page_mib", "2")
    assert code == 0 and f"{400 // step} images in" in out
    source = BetonSource(tmp_path / "o.beton")
    files = sorted(folder.glob("*.JPEG"))
    assert source.names == tuple(path.name for path in files) and len(files) == 400 // step
    changed = [path.name for i, path in enumerate(files) if source.read(i) != path.read_bytes()]
    assert changed == ["n02814860_beacon.JPEG"] or len(changed) <= 1  # one has an orientation
    for i in [k for k, path in enumerate(files) if path.name in changed]:
        np.testing.assert_array_equal(decode(source.read(i), ""), decode(files[i].read_bytes(), ""))
    small = pack(of(folder), tmp_path / "r.beton", how(short_side=256))
    for i, path in enumerate(files):
        with Image.open(path) as opened:
            width, height = opened.size
        scale = min(1.0, 256 / min(width, height))
        want = np.array([height * scale, width * scale])
        assert (np.abs(small.pixel_sizes[i] - want).max() <= 0.5 and small.pixel_sizes[i].min() <= 256) or scale == 1
    assert small.lengths.mean() < 0.3 * source.lengths.mean()


def test_left_out_images_are_listed_with_the_reason(whole: Path, many: Path) -> None:
    source, card = BetonSource(whole), read_sidecar(sidecar_path(whole))
    assert len(source) == 148 and source.classes == ("a", "b")
    assert source.lengths.max() > 2**21 and source.page_bytes == 2**22
    assert source.names is not None
    assert [source.classes[label] for label in source.labels] == [name[0] for name in source.names]
    with left_out_path(whole).open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["name", "reason"] and [tuple(row) for row in rows[1:]] == list(card.left_out)
    assert [name for name, _ in card.left_out] == ["a/020.jpg", "b/075.jpg"]
    assert card.left_out[0][1].startswith("a/020.jpg is damaged: ") and "empty (0 bytes)" in card.left_out[1][1]
    assert card.stored == {"verbatim": 148}
    assert str(many.parent) not in sidecar_path(whole).read_text()  # nothing of this machine travels with the file
    assert sorted(path.name for path in whole.parent.iterdir()) == ["x.beton", "x.beton.json", "x.beton.left-out.csv"]


def test_too_many_damaged_images_are_an_error(many: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 of 150 images are damaged, over --max_bad_fraction=0.01; .*a/020.jpg"):
        pack(of(many), tmp_path / "x.beton", how())
    assert not (tmp_path / "x.beton").exists()
    again = Packing(recoding=Recoding(), threads=1, page_bytes=2**21, max_bad_fraction=0.02, resume=True)
    assert len(pack(of(many), tmp_path / "x.beton", again)) == 148


def test_overwriting(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("pack", many, tmp_path / "x.beton", "--max_bad_fraction", "0.05", "--short_side", "32")
    assert run(capsys, *words)[0] == 0
    code, _, err = run(capsys, *words)
    assert code == 1 and "x.beton exists; give another name, or --overwrite" in err
    first = bytes_of(tmp_path / "x.beton")
    assert run(capsys, *words, "--quality", "60", "--overwrite")[0] == 0
    assert bytes_of(tmp_path / "x.beton") != first


def test_decoded_sets_stay_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "pack", "digits", tmp_path / "d.beton")[0] == 0
    source, digits = BetonSource(tmp_path / "d.beton"), open_origin(Origin(src="digits"))["train"]
    assert len(source) == 1797 and source.raw.all() and source.classes == tuple("0123456789")
    assert source.labels.tolist() == digits.labels.tolist()
    assert all(np.array_equal(source.read(k), digits.read(k)) for k in range(0, 1797, 100))
    pack(source, tmp_path / "j.beton", how(store="jpeg"))
    again = BetonSource(tmp_path / "j.beton")
    assert not again.raw.any() and again.names == source.names
    assert np.abs(decode(again.read(9), "").astype(int) - source.read(9)).mean() < 12


def test_nothing_to_pack(tmp_path: Path) -> None:
    empty = ArraySource("none", np.zeros((0, 4, 4, 3), np.uint8), [], [])
    with pytest.raises(DataError, match="none has no image to pack"):
        pack(empty, tmp_path / "x.beton", how())


def test_a_folder_with_its_own_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{part}/{kind}/{k}.jpg" for part in ("train", "val") for kind in "ab" for k in (1, 2)]
    src = put(tmp_path / "src", {name: encoded(picture(seed=k)) for k, name in enumerate(names)})
    code, _, err = run(capsys, "pack", src, tmp_path / "x.beton")
    assert code == 1 and "has train and val images; give a folder for DST, or --split train" in err
    assert run(capsys, "pack", src, tmp_path / "both")[0] == 0
    assert run(capsys, "pack", src, tmp_path / "x.beton", "--split", "val")[0] == 0
    assert bytes_of(tmp_path / "both/val.beton") == bytes_of(tmp_path / "x.beton")
    train = BetonSource(tmp_path / "both/train.beton")
    assert train.names == ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg") and train.labels.tolist() == [0, 0, 1, 1]
    code, out, _ = run(capsys, "pack", src, tmp_path / "both", "--resume", "auto")
    assert code == 0 and out.count("4 images in") == 2


def test_two_epochs_from_a_packed_file(cifar_samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same losses as from the folder: the file has the same images in the same order."""
    assert run(capsys, "pack", cifar_samples, tmp_path / "packed")[0] == 0
    losses = {}
    for kind, root in (("folder", cifar_samples), ("beton", tmp_path / "packed")):
        words = ["--config", "digits", "--data.source", kind, "--data.root", root, "--data.loader", "native"]
        words += ["--device", "cpu", "--pretrain.epochs", "2", "--smoke", "--out", tmp_path / kind]
        code, _, err = run(capsys, "pretrain", *words)
        assert code == 0, err
        result = json.loads((tmp_path / kind / "result.json").read_text())
        rows = [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
        losses[kind] = [row["loss"] for row in rows if row["kind"] == "train"]
        assert kind == "folder" or result["data"]["source"] == "train.beton"
    assert losses["beton"] == losses["folder"] and losses["beton"]
