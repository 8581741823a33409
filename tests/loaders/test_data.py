"""Folders, lists, sets and splits: what counts as training and validation data, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from fastsimclr.loaders.data import DataConfig, label_subset, open_data
from fastsimclr.loaders.sets.basic import ArraySource, Subset, SyntheticSource, digits
from fastsimclr.loaders.source import DataError, Source


def put(root: Path, *names: str) -> Path:
    """Small images at root/NAME, each of a colour of its own."""
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4), (k, 2 * k, 255 - k)).save(root / name)
    return root


def classes(root: Path, counts: Mapping[str, int]) -> Path:
    return put(root, *[f"{name}/{k}.png" for name, count in counts.items() for k in range(count)])


def folder(root: Path, **keys: Any) -> DataConfig:
    return DataConfig(source="folder", root=str(root), **keys)


def names(source: Source) -> list[str]:
    return [Path(source.describe(i)).name for i in range(len(source))]


def paths(source: Source) -> set[str]:
    return {source.describe(i) for i in range(len(source))}


def test_class_folders_with_their_own_validation(tmp_path: Path) -> None:
    classes(tmp_path / "train", {"dog": 3, "cat": 2})
    classes(tmp_path / "val", {"dog": 1})
    splits = open_data(folder(tmp_path))
    assert splits.unlabelled is splits.train
    assert splits.train.classes == splits.val.classes == ("cat", "dog")
    assert splits.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert splits.val.labels.tolist() == [1]
    assert splits.train.read(2) == (tmp_path / "train/dog/0.png").read_bytes()


def test_extensions_hidden_files_and_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "a", "1.JPG", "2.jpeg", "deep/3.Png", "4.webp", "5.bmp", "6.tif", "7.TIFF", ".8.png", ".x/9.png")
    (tmp_path / "a/notes.txt").write_text("x")
    put(tmp_path / "b", "1.png")
    (tmp_path / "b/lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with caplog.at_level(logging.INFO, "fastsimclr"):
        splits = open_data(folder(tmp_path, val_fraction=0.01))
    whole = sorted(names(splits.unlabelled) + names(splits.val))
    assert whole == sorted(["1.JPG", "2.jpeg", "3.Png", "4.webp", "5.bmp", "6.tif", "7.TIFF", "1.png", "lost.jpg"])
    assert "left out 1 files that are not images: a/notes.txt" in caplog.text


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    put(tmp_path, "b.png", "a.png", "more/c.png", "test/d.png")
    splits = open_data(folder(tmp_path))
    assert names(splits.unlabelled) == ["a.png", "b.png", "c.png"]
    assert splits.unlabelled.labels.tolist() == [-1] * 3
    assert splits.unlabelled.classes == ()
    assert len(splits.train) == len(splits.val) == 0
    with pytest.raises(DataError, match="has no labels"):
        label_subset(splits.train, folder(tmp_path, labels_per_class=1))


def test_labels_csv(tmp_path: Path) -> None:
    put(tmp_path, *[f"pool/{k}.png" for k in range(8)])
    (tmp_path / "labels.csv").write_text(
        "path,label\npool/0.png,cat\n./pool/3.png,dog\npool/4.png,dog\npool/5.png,cat\n"
    )
    splits = open_data(folder(tmp_path))
    assert splits.train.classes == ("cat", "dog")
    assert len(splits.unlabelled) == 6  # one image of each class is held out
    assert sorted(splits.unlabelled.labels.tolist()) == [-1, -1, -1, -1, 0, 1]
    assert sorted(splits.val.labels.tolist()) == sorted(splits.train.labels.tolist()) == [0, 1]
    truth = {"0.png": 0, "3.png": 1, "4.png": 1, "5.png": 0}
    for source in (splits.train, splits.val):
        assert [truth[name] for name in names(source)] == source.labels.tolist()


def test_labels_csv_elsewhere_also_labels_val(tmp_path: Path) -> None:
    put(tmp_path / "set", "train/0.png", "train/1.png", "train/2.png", "val/9.png")
    (tmp_path / "mine.csv").write_text("path,label\nset/train/0.png,b\nset/train/2.png,a\nset/val/9.png,b\n")
    splits = open_data(folder(tmp_path / "set", labels=str(tmp_path / "mine.csv")))
    assert splits.unlabelled.labels.tolist() == [1, -1, 0]
    assert splits.val.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must begin with the line path,label"),
        ("file;label\n", "must begin with the line path,label; it begins 'file;label'"),
        ("path,label\n0.png,a\n0.png,b\n", r"labels.csv:3: 0.png is listed twice"),
        ("path,label\n0.png\n", r"labels.csv:2: '0.png' is not path,label"),
        ("path,label\n7.png,a\n", r"7.png, not among the images"),
    ],
)
def test_bad_labels_csv(tmp_path: Path, text: str, message: str) -> None:
    put(tmp_path, "0.png", "1.png")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        open_data(folder(tmp_path))


def test_labels_csv_must_be_text(tmp_path: Path) -> None:
    put(tmp_path, "0.png")
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as text"):
        open_data(folder(tmp_path))
    with pytest.raises(DataError, match=r"none.csv cannot be read as text"):
        open_data(folder(tmp_path, labels=str(tmp_path / "none.csv")))


def flat_val(tmp_path: Path, text: str) -> DataConfig:
    classes(tmp_path / "train", {"n01": 2, "n02": 2, "n10": 2})
    put(tmp_path / "val", "v1.JPEG", "v2.JPEG", "v3.JPEG")
    (tmp_path / "val.txt").write_text(text)
    return folder(tmp_path, val_labels=str(tmp_path / "val.txt"))


@pytest.mark.parametrize(
    "text",
    [
        "v1.JPEG n10\nv2.JPEG n01\nv3.JPEG n02\n",
        "v3.JPEG\tn02\nv1.JPEG\tn10\n\nv2.JPEG\tn01\n",
        "val/v1.JPEG 2\nval/v2.JPEG 0\nval/v3.JPEG 1\n",
        "ImageId,PredictionString\nv1,n10 85 1 499 272\nv2,n01 1 2 3 4 n01 5 6 7 8\nv3,n02 1 2 3 4\n",
        "\ufefffilename,class\r\nv1.JPEG, n10\r\nv2.JPEG,n01\r\nv3.JPEG,n02\r\n",
    ],
)
def test_flat_validation_folder(tmp_path: Path, text: str) -> None:
    splits = open_data(flat_val(tmp_path, text))
    assert names(splits.val) == ["v1.JPEG", "v2.JPEG", "v3.JPEG"]
    assert splits.val.labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v1.JPEG n10\nv2.JPEG n01\n", r"has no line for v3.JPEG; add 1 lines"),
        ("v1.JPEG n10\nv2.JPEG n01\nv3.JPEG n02\nv4.JPEG n02\n", r"names v4.JPEG, not in the folder"),
        ("v1.JPEG n10\nv2.JPEG n99\n", r"val.txt:2: 'n99' is no class; use a class name or 0..2"),
        ("v1.JPEG 3\n", r"val.txt:1: '3' is no class"),
        ("v1.JPEG n10\nv1.JPEG n01\n", r"val.txt:2: v1.JPEG is listed twice"),
        ("v1.JPEG\n", r"val.txt:1: 'v1.JPEG' is not a file's name and its class"),
    ],
)
def test_bad_validation_lists(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(flat_val(tmp_path, text))


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none is not a folder"):
        open_data(folder(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no image"):
        open_data(folder(tmp_path / "empty"))
    classes(tmp_path / "a", {"cat": 1, "dog": 1})
    (tmp_path / "a/fox").mkdir()
    with pytest.raises(DataError, match=r"a/fox is a class with no image"):
        open_data(folder(tmp_path / "a"))
    classes(tmp_path / "b/train", {"cat": 1})
    classes(tmp_path / "b/val", {"cow": 1})
    with pytest.raises(DataError, match=r"b/val has folders that are no class of the training images: cow"):
        open_data(folder(tmp_path / "b"))
    classes(tmp_path / "c/train", {"cat": 1})
    put(tmp_path / "c/val", "1.png")
    with pytest.raises(DataError, match=r"val/1.png has no label.*data.val_labels"):
        open_data(folder(tmp_path / "c"))


def test_held_out_split_is_stratified_seeded_and_apart(tmp_path: Path) -> None:
    classes(tmp_path, {"a": 20, "b": 10, "c": 2, "d": 1})
    splits = open_data(folder(tmp_path, val_fraction=0.2))
    assert np.bincount(splits.val.labels, minlength=4).tolist() == [4, 2, 1, 0]
    assert not paths(splits.unlabelled) & paths(splits.val)
    assert len(paths(splits.unlabelled) | paths(splits.val)) == 33
    assert paths(open_data(folder(tmp_path, val_fraction=0.2, label_seed=9)).val) == paths(splits.val)
    assert paths(open_data(folder(tmp_path, val_fraction=0.2, val_seed=1)).val) != paths(splits.val)


def test_label_subsets() -> None:
    train = ArraySource("x", np.zeros((230, 1, 1, 3), np.uint8), [0] * 200 + [1] * 27 + [2] * 3, "abc")

    def of(**keys: Any) -> Source:
        return label_subset(train, DataConfig(**keys))

    assert of() is train
    assert np.bincount(of(label_fraction=0.1).labels).tolist() == [20, 3, 1]
    assert np.bincount(of(labels_per_class=2).labels).tolist() == [2, 2, 2]
    assert paths(of(labels_per_class=1)) < paths(of(labels_per_class=2))
    assert paths(of(labels_per_class=2)) == paths(of(labels_per_class=2))
    assert paths(of(labels_per_class=2)) != paths(of(labels_per_class=2, label_seed=1))
    drawn = np.concatenate([of(labels_per_class=1, label_seed=s).indices[:1] for s in range(200)])  # type: ignore[attr-defined]
    assert len(set(drawn.tolist())) > 100  # 126 expected of 200 draws from 200
    with pytest.raises(
        DataError, match="labels_per_class=4, but class c has 3 labelled training images; use at most 3"
    ):
        of(labels_per_class=4)


def test_published_label_list(tmp_path: Path) -> None:
    root = classes(tmp_path / "set", {"a": 3, "b": 3})
    put(root, "a/x_1.png", "b/x_2.png", "val/a/9.png")
    train = open_data(folder(root)).train
    listed = tmp_path / "1percent.txt"

    def few(text: str) -> Source:
        listed.write_text(text)
        return label_subset(train, folder(root, label_list=str(listed)))

    subset = few("x_2.png\nx_1.png\n")
    assert names(subset) == ["x_1.png", "x_2.png"]
    assert subset.labels.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"1percent.txt: 1 labels for 2 classes, none for b"):
        few("x_1.png\n")
    with pytest.raises(DataError, match=r"names y.png, not among the labelled training images"):
        few("x_1.png\ny.png\nx_2.png\n")
    with pytest.raises(DataError, match=r"1percent.txt:2: x_1.png is listed twice"):
        few("x_1.png\nx_1.png\n")
    with pytest.raises(DataError, match=r"2.png could be .*a/2.png, .*b/2.png; write its folder too"):
        few("2.png\n")
    assert few("b/2.png\nset/a/2.png\n").labels.tolist() == [0, 1]
    assert few("elsewhere/x_1.png\nb/2.png\n").labels.tolist() == [0, 1]


def test_digits_are_those_of_scikit_learn() -> None:
    splits = open_data(DataConfig())
    images, labels = load_digits(return_X_y=True)
    assert (len(splits.unlabelled), len(splits.val)) == (1438, 359)
    for source in (splits.train, splits.val):
        assert isinstance(source, Subset)
        assert np.array_equal(source.labels, labels[source.indices])
        for i in (0, 100, len(source) - 1):
            pixels = source.read(i)
            assert isinstance(pixels, np.ndarray)
            expected = np.round(images[source.indices[i]].reshape(8, 8, 1) * 255 / 16)
            assert np.array_equal(pixels, np.repeat(expected, 3, axis=2))
    assert not paths(splits.train) & paths(splits.val)
    assert np.abs(np.bincount(splits.val.labels) - np.bincount(labels) * 0.2).max() <= 0.5


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_torchvision_sets(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=rf"no usable files in {tmp_path}: put \w.*gz there and set data.download=true"):
        open_data(DataConfig(source=name, root=str(tmp_path), download=False))

    def no_network(*args: Any, **keys: Any) -> None:
        raise OSError("no route to host")

    maker = name.upper()
    monkeypatch.setattr(datasets, maker, no_network)
    with pytest.raises(DataError, match=r"the download failed.*no route to host"):
        open_data(DataConfig(source=name, root=str(tmp_path)))

    def fake(root: str, download: bool, **which: Any) -> SimpleNamespace:
        n = 4 if which.get("train") or which.get("split") == "train+unlabeled" else 2
        pixels = np.arange(n * 4 * 5 * 3, dtype=np.uint8).reshape(n, 4, 5, 3)
        labels = np.array([0, 1, -1, -1][:n]) if name == "stl10" else [0, 1, 1, 0][:n]
        if name == "stl10":
            return SimpleNamespace(data=pixels.transpose(0, 3, 1, 2), labels=labels, classes=["a", "b"])
        return SimpleNamespace(data=pixels, targets=labels, classes=["a", "b"])

    monkeypatch.setattr(datasets, maker, fake)
    splits = open_data(DataConfig(source=name, root=str(tmp_path)))
    assert (len(splits.unlabelled), len(splits.train), len(splits.val)) == (4, 2 if name == "stl10" else 4, 2)
    pixels = splits.unlabelled.read(1)
    assert isinstance(pixels, np.ndarray)
    assert pixels.flags.c_contiguous
    assert np.array_equal(pixels, np.arange(60, 120).reshape(4, 5, 3))


def test_fingerprints_change_with_what_they_cover(tmp_path: Path) -> None:
    classes(tmp_path, {"a": 3, "b": 3})

    def now() -> str:
        return open_data(folder(tmp_path)).unlabelled.fingerprint

    seen = [now()]
    assert now() == seen[0]
    (tmp_path / "a/0.png").write_bytes(b"another size")
    seen.append(now())
    (tmp_path / "a/1.png").rename(tmp_path / "b/1b.png")
    seen.append(now())
    (tmp_path / "b").rename(tmp_path / "c")
    seen.append(now())
    pixels = np.zeros((4, 2, 2, 3), np.uint8)
    for array, labels in ((pixels, [0, 1, 0, 1]), (pixels, [0, 1, 1, 0]), (pixels + 1, [0, 1, 0, 1])):
        seen.append(ArraySource("x", array, labels, "ab").fingerprint)
    seen += [SyntheticSource(4, 8, 2).fingerprint, SyntheticSource(5, 8, 2).fingerprint]
    seen += [Subset(digits(), [0, 1]).fingerprint, Subset(digits(), [1, 0]).fingerprint]
    assert len(set(seen)) == len(seen)


def test_subsets_of_subsets_and_frozen_labels() -> None:
    whole = digits()
    part = Subset(Subset(whole, [5, 7, 9, 11]), [3, 1])
    assert part.base is whole
    assert part.indices.tolist() == [11, 7]
    assert part.labels.tolist() == whole.labels[[11, 7]].tolist()
    assert part.describe(0) == "digits[11]"
    with pytest.raises(ValueError, match="read-only"):
        part.labels[0] = 1


def test_synthetic() -> None:
    splits = open_data(DataConfig(source="synthetic", synthetic_images=50, synthetic_size=9, synthetic_classes=5))
    assert (len(splits.train), len(splits.val)) == (45, 5)
    images = [np.asarray(splits.train.read(i)) for i in range(45)]
    assert all(image.shape == (9, 9, 3) and image.dtype == np.uint8 for image in images)
    assert len({image.tobytes() for image in images}) == 45
    assert 100 < np.mean(images) < 155


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "folder"}, "data.source=folder needs data.root"),
        ({"label_fraction": 0.1, "labels_per_class": 1}, "data.label_fraction and data.labels_per_class exclude"),
        ({"label_fraction": 0.0}, r"data.label_fraction=0.0 must be above 0 and up to 1"),
        ({"labels_per_class": 0}, "data.labels_per_class=0 must be 1 or more"),
        ({"val_fraction": 1.0}, "data.val_fraction=1.0 must be between 0 and 1"),
        ({"val": "x"}, "data.val is for data.source=folder, not digits"),
        ({"threads": -1}, "data.threads=-1"),
        ({"max_bad_fraction": 1.0}, "data.max_bad_fraction=1.0"),
        ({"label_seed": -1}, "data.label_seed=-1"),
    ],
)
def test_config_refuses(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**keys)
