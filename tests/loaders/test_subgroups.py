"""data.subgroup: which subgroup each validation image is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastsimclr.loaders import DataConfig, DataError, open_data


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no image is read")


def subgroups(root: Path, **settings: Any) -> dict[str, str]:
    """{file name: subgroup} of the validation images."""
    splits = open_data(DataConfig(**{"source": "folder", "root": str(root), "subgroup": "light"} | settings))
    names = [Path(splits.val.describe(i)).name for i in range(len(splits.val))]
    return dict(zip(names, splits.subgroups, strict=True))


def test_a_column_of_labels_csv_also_for_held_out_images(tmp_path: Path) -> None:
    put(tmp_path, *(f"{k}.png" for k in range(40)))
    lines = (f"{k}.png,{'ab'[k % 2]},{k},{'' if k % 3 == 0 else f'light {k % 3}'}\n" for k in range(40))
    (tmp_path / "labels.csv").write_text("path,label,number,light\n" + "".join(lines))
    found = subgroups(tmp_path, val_fraction=0.5)
    assert len(found) == 20
    assert found == {name: ("(none)", "light 1", "light 2")[int(Path(name).stem) % 3] for name in found}
    assert open_data(DataConfig(source="folder", root=str(tmp_path))).subgroups == ()


def test_validation_folders_with_lines_for_some(tmp_path: Path) -> None:
    put(tmp_path, "train/a/0.png", "train/b/1.png", "val/a/2.png", "val/b/3.png", "val/b/4.png")
    rows = ["train/a/0.png,a,day", "train/b/1.png,b,day", "val/a/2.png,a,night", "val/b/3.png,b,"]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,light", *rows]))
    assert subgroups(tmp_path) == {"2.png": "night", "3.png": "(none)", "4.png": "(none)"}


@pytest.mark.parametrize("mark", [",", "\t"])
def test_a_column_of_the_validation_list(tmp_path: Path, mark: str) -> None:
    put(tmp_path, "train/a b/0.png", "train/b/1.png", "val/2.png", "val/3.png", "val/4.png")
    rows = ["file,class,light", "3.png,a b,day", "val/2.png,b,night", "4,1,"]
    (tmp_path / "val.txt").write_text("\n".join(rows).replace(",", mark))
    settings = {"val": str(tmp_path / "val"), "val_labels": str(tmp_path / "val.txt")}
    assert subgroups(tmp_path, **settings) == {"2.png": "night", "3.png": "day", "4.png": "(none)"}
    splits = open_data(DataConfig(source="folder", root=str(tmp_path), **settings))
    assert splits.val.labels.tolist() == [1, 0, 1]
    with pytest.raises(
        DataError, match=r"data.subgroup=time: .*val.txt has 0 columns of that name, its header is file"
    ):
        subgroups(tmp_path, subgroup="time", **settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n0.png,a\n1.png,a\n", "has 0 columns of that name, its header is path,label; name one column"),
        ("path,label,light,light\n0.png,a,x,y\n1.png,a,x,y\n", "has 2 columns of that name"),
        ("path,label,light\n0.png,a\n", r"labels.csv:2: '0.png,a' is not path,label,light"),
        ("path,label,light\n0.png,a,\n1.png,b,\n2.png,a,\n3.png,b,\n", "gives none of the 2 validation images"),
    ],
)
def test_bad_columns(tmp_path: Path, text: str, message: str) -> None:
    put(tmp_path, *(f"{k}.png" for k in range(4)))
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        subgroups(tmp_path, val_fraction=0.5)


def test_sources_without_a_list(tmp_path: Path) -> None:
    put(tmp_path, "a/0.png", "a/1.png", "b/2.png", "b/3.png")
    with pytest.raises(DataError, match=r"labels.csv does not exist; name a CSV of path,label,light in data.labels"):
        subgroups(tmp_path)
    with pytest.raises(ValueError, match=r"data.subgroup=light is for data.source=folder, not cifar10; remove it"):
        DataConfig(source="cifar10", subgroup="light")
