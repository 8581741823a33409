"""index.json and what the cache remembers of shards, against the tars themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastsimclr.loaders.shards.cache import ShardCache
from fastsimclr.loaders.shards.index import scan_shard
from fastsimclr.loaders.shards.index_files import write_index
from fastsimclr.loaders.shards.source import ShardSource, open_shards
from fastsimclr.loaders.source import DataError
from tests.loaders.tars import Files, write_tar


def opened(path: Path | str | Sequence[str], cache: ShardCache, **keys: Any) -> ShardSource:
    return open_shards(str(path) if isinstance(path, Path) else path, cache, **keys)


def three(folder: Path, **names: str) -> list[Path]:
    """Shards of 2, 0 and 3 images."""
    sizes = {"0.tar": 2, "1.tar": 0, "2.tar": 3}
    return [
        write_tar(
            folder / name,
            [f for k in range(n) for f in ((f"{name[0]}{k}.jpg", b"i" * (k + 1)), (f"{name[0]}{k}.cls", b"%d" % k))],
        )
        for name, n in sizes.items()
    ]


def test_blocks_are_the_shards(tmp_path: Path, cache: ShardCache) -> None:
    three(tmp_path / "d")
    source = opened(tmp_path / "d", cache)
    assert source.blocks.tolist() == [0, 2, 2, 5]
    assert source.labels.tolist() == [0, 1, 0, 1, 2]
    assert [source.describe(i).rpartition("/")[2] for i in range(5)] == [
        "00.jpg",
        "01.jpg",
        "20.jpg",
        "21.jpg",
        "22.jpg",
    ]
    assert [len(source.read(i)) for i in (4, 0, 3, 1, 2)] == [3, 1, 2, 2, 1]
    with pytest.raises(ValueError, match="read-only"):
        source.labels[0] = 1


def test_scanned_once(tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = three(tmp_path / "d")
    first = opened(tmp_path / "d", cache)
    scans: list[str] = []

    def counted(fd: int, size: int, location: str, label_key: str | None) -> Any:
        scans.append(os.path.basename(location))
        return scan_shard(fd, size, location, label_key)

    monkeypatch.setattr("fastsimclr.loaders.shards.index_files.scan_shard", counted)
    assert opened(tmp_path / "d", cache).fingerprint == first.fingerprint
    assert scans == []
    write_tar(paths[2], [("x.jpg", b"new")])
    assert len(opened(tmp_path / "d", cache)) == 3
    os.utime(paths[0], ns=(1, 1))
    opened(tmp_path / "d", cache)
    assert sorted(scans) == ["0.tar", "2.tar"]
    for file in (cache.folder / "index").iterdir():
        file.write_text('{"members": 3')
    opened(tmp_path / "d", cache)
    for file in (cache.folder / "index").iterdir():
        file.write_text("[]")
    opened(tmp_path / "d", cache)
    assert len(scans) == 2 + 3 + 3


def test_a_folder_that_cannot_hold_a_cache_costs_only_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    three(tmp_path / "d")
    (tmp_path / "file").write_text("")
    assert len(opened(tmp_path / "d", ShardCache(tmp_path / "file" / "cache"))) == 5
    assert "the index of a shard is not kept" in caplog.text


def test_index_json_says_the_same_as_the_tars(
    tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(tmp_path / "d")
    write_tar(tmp_path / "d" / "val.tar", [("v.jpg", b"v"), ("v.cls", b"1")])
    scanned = opened(f"{tmp_path}/d/{{0..2}}.tar", cache)
    assert write_index(f"{tmp_path}/d/{{0..2}}.tar", cache) == [f"{tmp_path}/d/index.json"]
    write_index(f"{tmp_path}/d/val.tar", cache)  # beside the others
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        "0.tar",
        "1.tar",
        "2.tar",
        "index.json",
        "val.tar",
    ]
    monkeypatch.setattr("fastsimclr.loaders.shards.index_files.scan_shard", None)
    source = opened(f"{tmp_path}/d/{{0..2}}.tar", cache)
    assert source.fingerprint == scanned.fingerprint
    assert source.labels.tolist() == scanned.labels.tolist()
    assert [source.read(i) for i in range(5)] == [scanned.read(i) for i in range(5)]
    assert opened(f"{tmp_path}/d/val.tar", cache, classes=source.classes).labels.tolist() == [1]


def test_index_json_with_class_names(tmp_path: Path, cache: ShardCache) -> None:
    three(tmp_path / "d")
    write_index(str(tmp_path / "d"), cache, classes=["ant", "bee", "cat", "dog"])
    source = opened(tmp_path / "d", cache)
    assert source.classes == ("ant", "bee", "cat", "dog")
    assert source.labels.tolist() == [0, 1, 0, 1, 2]
    with pytest.raises(DataError, match=r"index.json has label_key=cls and 4 class names, not label_key=cls and 2"):
        write_index(str(tmp_path / "d"), cache, classes=["ant", "bee"])
    with pytest.raises(DataError, match=r"labels of label_key=cls, not data.label_key=txt"):
        opened(tmp_path / "d", cache, label_key="txt")


def test_an_old_or_damaged_index_json(tmp_path: Path, cache: ShardCache) -> None:
    paths = three(tmp_path / "d")
    (place,) = write_index(str(tmp_path / "d"), cache)
    text = Path(place).read_text()
    write_tar(tmp_path / "d" / "3.tar", [("a.jpg", b"a")])
    with pytest.raises(DataError, match=r"3.tar is not listed in .*index.json; write it again"):
        opened(tmp_path / "d", cache)
    (tmp_path / "d" / "3.tar").unlink()
    with paths[0].open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"0.tar has 10752 bytes, not 10240 as .*index.json says"):
        opened(tmp_path / "d", cache)
    whole = json.loads(text)
    for change, message in [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"classes": "abc"}, "classes are not a list of names"),
        ({"label_key": "jpg"}, "label_key=jpg"),
        ({"shards": 5}, "not iterable"),
        ({"shards": [{"name": "0.tar"}]}, "no 'size'"),
    ]:
        Path(place).write_text(json.dumps({**whole, **change}))
        with pytest.raises(
            DataError, match=rf"index.json is damaged or not by fastsimclr: .*{message}.*; write it again"
        ):
            opened(tmp_path / "d", cache)
    for row, message in [
        ({"sizes": [1]}, "sizes is not a list of 2"),
        ({"sizes": [1, "2"]}, "sizes has values of another kind"),
        ({"offsets": [0, 512]}, "an image lies outside its shard of 10240 bytes"),
        ({"offsets": [512, 10240]}, "an image lies outside its shard"),
        ({"stamps": [-1, 0]}, "a stamp, that cannot be"),
        ({"labels": [True, 0]}, "labels has values of another kind"),
    ]:
        shards = [{**whole["shards"][0], **row}, *whole["shards"][1:]]
        Path(place).write_text(json.dumps({**whole, "shards": shards}))
        with pytest.raises(DataError, match=message):
            opened(tmp_path / "d", cache)
    for text in ("", "{", "[]", "null"):
        Path(place).write_text(text)
        with pytest.raises(DataError, match=r"index.json is damaged or not by fastsimclr"):
            opened(tmp_path / "d", cache)


def test_a_shard_changed_behind_the_index_is_noticed(tmp_path: Path, cache: ShardCache) -> None:
    path = write_tar(tmp_path / "d" / "a.tar", [("0.jpg", b"A"), ("0.cls", b"0"), ("1.jpg", b"B"), ("1.cls", b"1")])
    write_index(str(tmp_path / "d"), cache)
    source = opened(tmp_path / "d", cache)
    write_tar(path, [("1.jpg", b"B"), ("1.cls", b"1"), ("0.jpg", b"A"), ("0.cls", b"0")])  # as large, in another order
    for i in (0, 1):
        with pytest.raises(
            DataError, match=r"a.tar/\d.jpg is not where the index says, at byte \d+: the shard was changed"
        ):
            opened(tmp_path / "d", cache).read(i)
    os.truncate(path, 1000)
    with pytest.raises(DataError, match=r"the shard was changed"):
        source.read(1)


def test_a_full_disk_leaves_no_half_index(tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    three(tmp_path / "d")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match=r"index.json cannot be written: No space left on device"):
        write_index(str(tmp_path / "d"), cache)
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["0.tar", "1.tar", "2.tar"]


def test_the_fingerprint_covers_names_sizes_labels_and_classes(tmp_path: Path, cache: ShardCache) -> None:
    def made(name: str, shard: str, files: Files, **keys: Any) -> str:
        return opened(write_tar(tmp_path / name / shard, files), cache, **keys).fingerprint

    base = [("0.jpg", b"A"), ("0.cls", b"1"), ("1.jpg", b"B"), ("1.cls", b"0")]
    seen = [
        made("a", "t.tar", base),
        made("b", "u.tar", base),
        made("c", "t.tar", [("x.jpg", b"A"), *base[1:]]),
        made("d", "t.tar", [*base[:2], ("1.jpg", b"BB"), base[3]]),
        made("e", "t.tar", [base[0], ("0.cls", b"0"), *base[2:]]),
        made("f", "t.tar", base, classes=["a", "b"]),
        made("g", "t.tar", [*base[2:], *base[:2]]),
    ]
    assert len(set(seen)) == len(seen)
    assert made("moved", "t.tar", base) == seen[0]
