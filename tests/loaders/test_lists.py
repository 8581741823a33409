"""Google's lists of labelled ImageNet images, in their own format, on a tree train/SYNSET/NAME.JPEG."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastsimclr.loaders import DataConfig, DataError, Source, label_subset, open_data

SYNSETS = {"n01440764": (10026, 10027, 39), "n01443537": (2, 10007, 16), "n15075141": (1, 2, 3)}


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Nine images of three classes and a validation folder; the files are listed by name, not read."""
    for synset, numbers in SYNSETS.items():
        for split, names in (("train", [f"{synset}_{i}" for i in numbers]), ("val", ["ILSVRC2012_val_00000001"])):
            place = tmp_path / split / synset
            place.mkdir(parents=True)
            for name in names:
                (place / f"{name}.JPEG").write_bytes(b"")
    return tmp_path


def few(imagenet: Path, text: str) -> Source:
    listed = imagenet / "1percent.txt"
    listed.write_bytes(text.encode())
    config = DataConfig(source="folder", root=str(imagenet), label_list=str(listed))
    return label_subset(open_data(config).train, config)


WHOLE = ("n15075141_2.JPEG", "n01440764_10026.JPEG", "n01443537_2.JPEG", "n01440764_39.JPEG")


@pytest.mark.parametrize(
    "text",
    ["\n".join(WHOLE), "\r\n".join(WHOLE) + "\r\n", "\n\n" + "\n \n".join(WHOLE) + "\n\n", "\ufeff" + "\n".join(WHOLE)],
    ids=["plain", "crlf", "blank lines", "mark"],
)
def test_googles_format(imagenet: Path, text: str) -> None:
    subset = few(imagenet, text)
    assert sorted(Path(subset.describe(i)).name for i in range(len(subset))) == sorted(WHOLE)
    names = [Path(subset.describe(i)).name for i in range(len(subset))]
    assert [subset.classes[label] for label in subset.labels] == [name.partition("_")[0] for name in names]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [*WHOLE, "", "n01440764_77.JPEG", "n01440764_78.JPEG"],
            r"1percent.txt:6: the list names n01440764_77.JPEG, n01440764_78.JPEG, not among .* remove 2 lines",
        ),
        ([*WHOLE, "n01440764_39"], r"1percent.txt:5: the list names n01440764_39, not among"),
        ([*WHOLE, WHOLE[1]], r"1percent.txt:5: n01440764_10026.JPEG is listed twice, first at .*1percent.txt:2;"),
        (WHOLE[:2], r"1percent.txt: 2 labels for 3 classes, none for n01443537"),
        (["", " "], r"1percent.txt names no image; write one name a line"),
    ],
    ids=["absent", "without extension", "twice", "class without", "empty"],
)
def test_what_does_not_fit_is_named_with_its_line(imagenet: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        few(imagenet, "\r\n".join(lines))
