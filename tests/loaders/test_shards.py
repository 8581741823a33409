"""Shards: tars of every dialect against tarfile and bytes written by hand, groups, labels, index.json, reads."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import tarfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsimclr.loaders.data import DataConfig, open_data
from fastsimclr.loaders.decode import decode
from fastsimclr.loaders.shards.cache import ShardCache
from fastsimclr.loaders.shards.index import scan_shard
from fastsimclr.loaders.shards.index_files import write_index
from fastsimclr.loaders.shards.places import expand
from fastsimclr.loaders.shards.source import ShardSource, open_shard_splits, open_shards
from fastsimclr.loaders.shards.tar import Member, members
from fastsimclr.loaders.source import DataError

Files = Sequence[tuple[str, bytes]]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def pack(path: Path, files: Files, dialect: str = "pax") -> Path:
    """A tar of these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[dialect]) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def listed(path: Path) -> list[Member]:
    with path.open("rb") as file:
        return list(members(file.fileno(), path.stat().st_size, path.name))


def scan(path: Path, label_key: str | None = None) -> Any:
    with path.open("rb") as file:
        return scan_shard(file.fileno(), path.stat().st_size, path.name, label_key)


def content(path: Path, member: Member) -> bytes:
    return path.read_bytes()[member.offset : member.offset + member.size]


def header(name: bytes, size: bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000", prefix: bytes = b"") -> bytes:
    """A tar header by the table of POSIX.1-1988, written out by hand."""
    fields = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"00000000000\0"
    rest = kind + bytes(100) + magic + bytes(64) + bytes(16) + prefix.ljust(155, b"\0") + bytes(12)
    total = sum(fields) + 8 * ord(" ") + sum(rest)
    return fields + b"%06o\0 " % total + rest


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


END = bytes(1024)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache")


def of(path: Path | str | Sequence[str], cache: ShardCache, **keys: Any) -> ShardSource:
    return open_shards(str(path) if isinstance(path, Path) else path, cache, **keys)


# ---- tars


@pytest.mark.parametrize("dialect", FORMATS)
def test_members_are_those_of_tarfile(tmp_path: Path, dialect: str) -> None:
    long = "d" * 90 + "/" + "n" * 80 + ".jpg"  # ustar: by its prefix
    files = [("a.jpg", b"x" * 511), ("b/ü.cls", b"7"), ("c.jpg", b""), (long, b"y" * 512), ("e.png", b"z" * 1537)]
    if dialect != "ustar":
        files += [("f" * 300 + ".jpg", b"long")]
    path = pack(tmp_path / "a.tar", files, dialect)
    found = listed(path)
    assert [member.name for member in found] == [name for name, _ in files]
    assert [content(path, member) for member in found] == [data for _, data in files]
    with tarfile.open(path) as archive:
        assert [(m.name, m.offset_data, m.size) for m in archive] == [(m.name, m.offset, m.size) for m in found]


def test_headers_by_hand(tmp_path: Path) -> None:
    big = b"\x80" + (5).to_bytes(11, "big")  # GNU: base 256
    records = b"19 path=new/long.jpg\n"
    records = b"%d%s" % (len(records), records[2:])
    blocks = [
        header(b"v7.jpg", b"00000000003 ", magic=bytes(8)) + padded(b"abc"),
        header(b"folder/", b"0", kind=b"5"),
        header(b"v7folder/", b"0", kind=b"\0", magic=bytes(8)),
        header(b"base.jpg", b"00000000001\0", prefix=b"pre/fix") + padded(b"d"),
        header(b"b256.jpg", big, magic=b"ustar  \0") + padded(b"efghi"),
        header(b"././@LongLink", b"%o" % 6, kind=b"L", magic=b"ustar  \0") + padded(b"l.jpg\0"),
        header(b"cut", b"2", magic=b"ustar  \0", prefix=b"not a prefix") + padded(b"jk"),
        header(b"x", b"%o" % len(records), kind=b"x") + padded(records),
        header(b"old", b"1") + padded(b"m"),
        header(b"plain.jpg", b"1", kind=b"7") + padded(b"n"),
        header(b"hard.jpg", b"00000001000\0", kind=b"1"),  # a link's size means nothing
        header(b"last.jpg", b"") + b"",
    ]
    path = tmp_path / "a.tar"
    path.write_bytes(b"".join(blocks) + END)
    found = listed(path)
    assert [(member.name, member.kind) for member in found] == [
        ("v7.jpg", "file"),
        ("folder/", "other"),
        ("v7folder/", "other"),
        ("pre/fix/base.jpg", "file"),
        ("b256.jpg", "file"),
        ("l.jpg", "file"),
        ("new/long.jpg", "file"),
        ("plain.jpg", "file"),
        ("hard.jpg", "link"),
        ("last.jpg", "file"),
    ]
    assert [content(path, m) for m in found if m.kind == "file"] == [b"abc", b"d", b"efghi", b"jk", b"m", b"n", b""]


def test_pax_sizes_and_global_records(tmp_path: Path) -> None:
    def pax(kind: bytes, text: bytes) -> bytes:
        length = next(k for k in range(len(text), len(text) + 5) if k == len(b"%d %s\n" % (k, text)))
        record = b"%d %s\n" % (length, text)
        return header(b"pax", b"%o" % len(record), kind=kind) + padded(record)

    path = tmp_path / "a.tar"
    path.write_bytes(
        pax(b"g", b"comment=all of them")
        + (pax(b"x", b"size=4") + header(b"a.jpg", b"0") + padded(b"abcd"))
        + (header(b"b.jpg", b"1") + padded(b"e") + END)
    )
    assert [content(path, member) for member in listed(path)] == [b"abcd", b"e"]


ONE = header(b"a.jpg", b"3") + padded(b"abc")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"a.tar is truncated: it ends without the end mark of a tar at byte 0; copy it again"),
        (ONE, r"truncated: it ends without the end mark of a tar at byte 1024"),
        (ONE + ONE[:100], r"truncated: it ends inside a header at byte 1124"),
        (ONE[:512], r"truncated: a.jpg ends at byte 515 of 512"),
        (ONE + END + ONE, r"data behind its end mark.*archives put together by cat"),
        (ONE + b"x" + ONE[1:], r"damaged: the header at byte 1024 has a wrong checksum"),
        (ONE + header(b"a", b"3")[:300] + b"x" + bytes(211) + END, r"header at byte 1024 has a wrong checksum"),
        (header(b"a", b"12x") + END, r"the header at byte 0 has no size"),
        (header(b"a", b"7", kind=b"L") + padded(b"toolong") * 0, r"truncated"),
        (header(b"a", b"77777777", kind=b"L") + bytes(1 << 25), r"a name of 16777215 bytes"),
        (header(b"x", b"4", kind=b"x") + padded(b"9 a=") + END, r"a pax record at byte 512 is malformed"),
        (header(b"x", b"6", kind=b"x") + padded(b"6 ab.\n") + END, r"a pax record at byte 512 is malformed"),
        (header(b"s", b"0", kind=b"S") + END, r"s is a sparse file"),
        (b"\x1f\x8b" + bytes(600), r"is a gzip file; unpack it to a plain .tar"),
        (b"\xfd7zXZ\x00" + bytes(600), r"is a xz file"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), r"is a zstd file"),
        (b"BZh9" + bytes(600), r"is a bzip2 file"),
        (b"\xff\xd8\xff" + bytes(600), r"is not a tar: it begins b'\\xff\\xd8"),
    ],
)
def test_bad_tars(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        listed(path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    whole = pack(
        tmp_path / "whole.tar", [("a.jpg", b"x" * 700), ("b.cls", b"1"), ("c" * 150, b"y")], "gnu"
    ).read_bytes()
    end = len(whole.rstrip(b"\0"))
    mark = -(-end // 512) * 512 + 512
    path = tmp_path / "a.tar"
    for cut in [*range(0, mark, 37), mark - 1, mark - 512]:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="truncated"):
            listed(path)
    path.write_bytes(whole[:mark])  # one block of zeros is mark enough
    assert len(listed(path)) == 3


def test_flipped_header_bytes_are_noticed(tmp_path: Path) -> None:
    whole = bytearray(ONE + header(b"b.jpg", b"1") + padded(b"z") + END)
    path = tmp_path / "a.tar"
    for at in [*range(0, 512, 5), *range(1024, 1536, 5)]:
        damaged = bytearray(whole)
        damaged[at] ^= 0x15
        path.write_bytes(damaged)
        if 148 <= at % 1024 < 156:  # the checksum's own field; what is behind its NUL does not count
            continue
        with pytest.raises(DataError, match=r"checksum|not a tar"):
            listed(path)


# ---- samples


def test_groups_labels_and_what_is_left_out(
    tmp_path: Path, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    files = [
        ("./0.jpg", b"A"),
        ("0.cls", b" 2\n"),
        ("dir.v2/1.JPEG", b"B"),
        ("dir.v2/1.json", b"{}"),
        ("dir.v2/1.cls", b"0"),
        ("2.cls", b"1"),  # its image comes later, after another key
        ("3.png", b"C"),
        ("2.webp", b"D"),
        ("2.seg.png", b"not an image of the set"),
        (".hidden.jpg", b"-"),
        ("._0.jpg", b"-"),
        ("4.cls", b"5"),
        ("README", b"-"),
    ]
    with caplog.at_level(logging.INFO, "fastsimclr"):
        source = of(pack(tmp_path / "a.tar", files), cache)
    assert [source.read(i) for i in range(4)] == [b"A", b"B", b"C", b"D"]
    assert source.labels.tolist() == [2, 0, -1, 1]
    assert source.classes == ("0", "1", "2")
    assert source.describe(1) == f"{tmp_path}/a.tar/dir.v2/1.JPEG"
    assert source.name == "shards:a.tar"
    assert f"left out 2 keys that have no image: {tmp_path}/a.tar/4, {tmp_path}/a.tar/README" in caplog.text
    assert f"1 of 4 images have no label, as {tmp_path}/a.tar/3.png" in caplog.text
    assert source.encoded_bytes == 4
    assert source.whole_fits


@pytest.mark.parametrize(
    ("label_key", "extra", "labels", "classes"),
    [
        ("cls", [("0.cls", b"1"), ("1.cls", b"-1")], [1, -1], ("0", "1")),
        ("txt", [("0.txt", "größe".encode()), ("1.txt", b"\xef\xbb\xbfant ")], [1, 0], ("ant", "größe")),
        ("index", [("0.index", b"3"), ("1.INDEX", b"0")], [3, 0], ("0", "1", "2", "3")),
        ("json.label", [("0.json", b'{"label": 1}'), ("1.json", b'{"label": "0"}')], [1, 0], ("0", "1")),
        ("json.a.b", [("0.json", b'{"a": {"b": "x"}}'), ("1.json", b'{"a": 3}')], [0, -1], ("x",)),
        ("json.a", [("0.json", b'{"a": null}'), ("1.json", b'{"a": "7x"}')], [-1, 0], ("7x",)),
    ],
)
def test_label_keys(
    tmp_path: Path, cache: ShardCache, label_key: str, extra: Files, labels: list[int], classes: tuple[str, ...]
) -> None:
    source = of(pack(tmp_path / "a.tar", [("0.jpg", b"A"), ("1.jpg", b"B"), *extra]), cache, label_key=label_key)
    assert source.labels.tolist() == labels
    assert source.classes == classes


@pytest.mark.parametrize(
    ("files", "label_key", "message"),
    [
        ([("0.jpg", b"a"), ("0.jpg", b"b")], None, r"a.tar: 0.jpg is the second image of its key, after 0.jpg"),
        ([("0.jpg", b"a"), ("0.PNG", b"b")], None, r"0.PNG is the second image of its key, after 0.jpg"),
        ([("0.jpg", b"a"), ("0.cls", b"1"), ("0.cls", b"1")], None, r"0.cls is the second label of its key"),
        ([("0.jpg", b"a"), ("0.cls", b"")], None, r"0.cls has the label ''; write a class number or a class name"),
        ([("0.jpg", b"a"), ("0.cls", b"\xff\xfe")], None, r"0.cls is not UTF-8 text"),
        ([("0.jpg", b"a"), ("0.cls", b"1" * (2 << 20))], None, r"0.cls has 2097152 bytes, too many for a label"),
        ([("0.jpg", b"a"), ("0.json", b"{")], "json.a", r"0.json is not JSON"),
        ([("0.jpg", b"a"), ("0.json", b'{"a": 1.5}')], "json.a", r"0.json has the label 1.5"),
        ([("0.jpg", b"a"), ("0.json", b'{"a": true}')], "json.a", r"0.json has the label True"),
        ([("0.jpg", b"a")], "cls", r"no sample has the label that data.label_key=cls names"),
        ([("0.jpg", b"a"), ("0.cls", b"-3")], None, r"0.jpg has the label -3, which is none of the \d classes"),
        ([("0.jpg", b"a"), ("0.cls", b"99999999")], None, r"0.jpg has the label 99999999; class numbers go up to"),
        (
            [("0.jpg", b"a"), ("0.cls", b"1"), ("1.jpg", b"a"), ("1.cls", b"cat")],
            None,
            "mix class numbers and names .*cat",
        ),
        ([("0.txt", b"a")], None, r"no image in 1 shards; they need KEY.jpg"),
        ([], None, r"no image in 1 shards"),
    ],
)
def test_bad_samples(tmp_path: Path, cache: ShardCache, files: Files, label_key: str | None, message: str) -> None:
    path = pack(tmp_path / "a.tar", files)
    with pytest.raises(DataError, match=message):
        of(path, cache, label_key=label_key)


def test_links_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo("0.jpg")
            info.type, info.linkname = kind, "other.jpg"
            archive.addfile(info)
        with pytest.raises(DataError, match=r"a.tar: 0.jpg is a link; pack the files themselves"):
            scan(path)


@pytest.mark.parametrize("label_key", ["jpg", "json", "cls.a", "", "json.", ".cls"])
def test_label_keys_that_cannot_be(label_key: str) -> None:
    with pytest.raises(ValueError, match=f"data.label_key={label_key} must be the extension"):
        DataConfig(source="shards", root="x", label_key=label_key)


def test_no_labels_at_all(tmp_path: Path, cache: ShardCache) -> None:
    source = of(pack(tmp_path / "a.tar", [("0.jpg", b"A"), ("1.jpg", b"B")]), cache)
    assert source.labels.tolist() == [-1, -1]
    assert source.classes == ()


# ---- places


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("http://h/t-{08..11}.tar", [f"http://h/t-{k}.tar" for k in ("08", "09", "10", "11")]),
        ("http://h/t-{8..11}.tar", [f"http://h/t-{k}.tar" for k in (8, 9, 10, 11)]),
        ("http://h/{a,b}-{0..1}.tar?x=1", [f"http://h/{k}.tar?x=1" for k in ("a-0", "a-1", "b-0", "b-1")]),
        (["http://h/b.tar", "http://h/a.tar"], ["http://h/b.tar", "http://h/a.tar"]),
        ("http://h/a.tar?sig=[b]", ["http://h/a.tar?sig=[b]"]),
    ],
)
def test_patterns(pattern: Any, expected: list[str]) -> None:
    assert expand(pattern) == expected


def test_local_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.tar", "a.tar", "c.txt", "deep/d.tar"):
        pack(tmp_path / name, [])
    a, b, d = (str(tmp_path / name) for name in ("a.tar", "b.tar", "deep/d.tar"))
    assert expand(str(tmp_path)) == expand(f"{tmp_path}/*.tar") == expand(f"file://{tmp_path}/?.tar") == [a, b]
    assert expand(f"{tmp_path}/**/*.tar") == [a, b, d]
    monkeypatch.chdir(tmp_path)
    assert expand(["b.tar", "deep"]) == [b, d]
    (tmp_path / "none").mkdir()
    for pattern, message in [
        ("none", r"none/\*.tar matches no file"),
        ("x*.tar", r"x\*.tar matches no file"),
        ("{3..1}.tar", r"the range \{3..1\} must rise"),
        ("{0..9999999}.tar", r"over at most 1000000 files"),
        ("{a}.tar", r"\{a\} is neither a range"),
        ("{a,a}.tar", r"a.tar is named twice"),
        ("http://h/*.tar", r"a web server has no listing"),
        ([], r"no shard is named"),
        ("ftpx://h/a*.tar", r"ftpx://h/a\*.tar: .*use a path, http"),
    ]:
        with pytest.raises(DataError, match=message):
            expand(pattern)  # type: ignore[arg-type]


def test_a_shard_that_is_not_there(tmp_path: Path, cache: ShardCache) -> None:
    pack(tmp_path / "0.tar", [("0.jpg", b"A")])
    with pytest.raises(DataError, match=r"1.tar cannot be read: No such file or directory; correct the path"):
        of(f"{tmp_path}/{{0..1}}.tar", cache)


# ---- index.json and the cache


def three(folder: Path, **names: str) -> list[Path]:
    """Shards of 2, 0 and 3 images."""
    sizes = {"0.tar": 2, "1.tar": 0, "2.tar": 3}
    return [
        pack(
            folder / name,
            [f for k in range(n) for f in ((f"{name[0]}{k}.jpg", b"i" * (k + 1)), (f"{name[0]}{k}.cls", b"%d" % k))],
        )
        for name, n in sizes.items()
    ]


def test_blocks_are_the_shards(tmp_path: Path, cache: ShardCache) -> None:
    three(tmp_path / "d")
    source = of(tmp_path / "d", cache)
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
    first = of(tmp_path / "d", cache)
    scans: list[str] = []

    def counted(fd: int, size: int, what: str, label_key: str | None) -> Any:
        scans.append(os.path.basename(what))
        return scan_shard(fd, size, what, label_key)

    monkeypatch.setattr("fastsimclr.loaders.shards.index_files.scan_shard", counted)
    assert of(tmp_path / "d", cache).fingerprint == first.fingerprint
    assert scans == []
    pack(paths[2], [("x.jpg", b"new")])
    assert len(of(tmp_path / "d", cache)) == 3
    os.utime(paths[0], ns=(1, 1))
    of(tmp_path / "d", cache)
    assert sorted(scans) == ["0.tar", "2.tar"]
    for file in (cache.folder / "index").iterdir():
        file.write_text('{"members": 3')
    of(tmp_path / "d", cache)
    for file in (cache.folder / "index").iterdir():
        file.write_text("[]")
    of(tmp_path / "d", cache)
    assert len(scans) == 2 + 3 + 3


def test_a_folder_that_cannot_hold_a_cache_costs_only_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    three(tmp_path / "d")
    (tmp_path / "file").write_text("")
    assert len(of(tmp_path / "d", ShardCache(tmp_path / "file" / "cache"))) == 5
    assert "the index of a shard is not kept" in caplog.text


def test_index_json_says_the_same_as_the_tars(
    tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(tmp_path / "d")
    pack(tmp_path / "d" / "val.tar", [("v.jpg", b"v"), ("v.cls", b"1")])
    scanned = of(f"{tmp_path}/d/{{0..2}}.tar", cache)
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
    source = of(f"{tmp_path}/d/{{0..2}}.tar", cache)
    assert source.fingerprint == scanned.fingerprint
    assert source.labels.tolist() == scanned.labels.tolist()
    assert [source.read(i) for i in range(5)] == [scanned.read(i) for i in range(5)]
    assert of(f"{tmp_path}/d/val.tar", cache, classes=source.classes).labels.tolist() == [1]


def test_index_json_with_class_names(tmp_path: Path, cache: ShardCache) -> None:
    three(tmp_path / "d")
    write_index(str(tmp_path / "d"), cache, classes=["ant", "bee", "cat", "dog"])
    source = of(tmp_path / "d", cache)
    assert source.classes == ("ant", "bee", "cat", "dog")
    assert source.labels.tolist() == [0, 1, 0, 1, 2]
    with pytest.raises(DataError, match=r"index.json has label_key=cls and 4 class names, not label_key=cls and 2"):
        write_index(str(tmp_path / "d"), cache, classes=["ant", "bee"])
    with pytest.raises(DataError, match=r"labels of label_key=cls, not data.label_key=txt"):
        of(tmp_path / "d", cache, label_key="txt")


def test_an_old_or_damaged_index_json(tmp_path: Path, cache: ShardCache) -> None:
    paths = three(tmp_path / "d")
    (place,) = write_index(str(tmp_path / "d"), cache)
    text = Path(place).read_text()
    pack(tmp_path / "d" / "3.tar", [("a.jpg", b"a")])
    with pytest.raises(DataError, match=r"3.tar is not listed in .*index.json; write it again"):
        of(tmp_path / "d", cache)
    (tmp_path / "d" / "3.tar").unlink()
    with paths[0].open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"0.tar has 10752 bytes, not 10240 as .*index.json says"):
        of(tmp_path / "d", cache)
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
            of(tmp_path / "d", cache)
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
            of(tmp_path / "d", cache)
    for text in ("", "{", "[]", "null"):
        Path(place).write_text(text)
        with pytest.raises(DataError, match=r"index.json is damaged or not by fastsimclr"):
            of(tmp_path / "d", cache)


def test_a_shard_changed_behind_the_index_is_noticed(tmp_path: Path, cache: ShardCache) -> None:
    path = pack(tmp_path / "d" / "a.tar", [("0.jpg", b"A"), ("0.cls", b"0"), ("1.jpg", b"B"), ("1.cls", b"1")])
    write_index(str(tmp_path / "d"), cache)
    source = of(tmp_path / "d", cache)
    pack(path, [("1.jpg", b"B"), ("1.cls", b"1"), ("0.jpg", b"A"), ("0.cls", b"0")])  # as large, in another order
    for i in (0, 1):
        with pytest.raises(
            DataError, match=r"a.tar/\d.jpg is not where the index says, at byte \d+: the shard was changed"
        ):
            of(tmp_path / "d", cache).read(i)
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
        return of(pack(tmp_path / name / shard, files), cache, **keys).fingerprint

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


# ---- reading, and the whole way


@pytest.fixture(scope="module")
def four(imagenet_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 400 ImageNet samples as class folders (folder/LABEL/NAME) and as 4 shards (shards/t-00N.tar)."""
    root = tmp_path_factory.mktemp("four")
    files: list[list[tuple[str, bytes]]] = [[], [], [], []]
    for i, path in enumerate(sorted(imagenet_samples.iterdir())):
        label = i * 7 % 10
        (root / "folder" / str(label)).mkdir(parents=True, exist_ok=True)
        (root / "folder" / str(label) / path.name).symlink_to(path)
        files[i // 100] += [(path.name, path.read_bytes()), (f"{path.stem}.cls", b"%d" % label)]
    for shard, part in enumerate(files):
        pack(root / "shards" / f"t-{shard:03d}.tar", part)
    return root


def test_imagenet_shards_are_the_folder(four: Path, cache: ShardCache) -> None:
    source = of(f"{four}/shards/t-{{000..003}}.tar", cache)
    folder = open_data(DataConfig(source="folder", root=str(four / "folder"), val_fraction=0.001)).unlabelled
    held = open_data(DataConfig(source="folder", root=str(four / "folder"), val_fraction=0.001)).val
    truth = {
        Path(part.describe(i)).name: (part.read(i), part.labels[i]) for part in (folder, held) for i in range(len(part))
    }
    assert len(source) == len(truth) == 400
    assert source.classes == folder.classes
    with ThreadPoolExecutor(8) as pool:
        data = list(pool.map(source.read, range(400)))
    for i in range(400):
        encoded, label = truth[Path(source.describe(i)).name]
        assert data[i] == encoded
        assert source.labels[i] == label
        if i % 20 == 0:
            assert np.array_equal(decode(data[i], ""), decode(bytes(encoded), ""))


def test_pickled_and_forked_copies_read(four: Path, cache: ShardCache) -> None:
    source = of(f"{four}/shards", cache)
    expected = source.read(150)
    assert pickle.loads(pickle.dumps(source)).read(150) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, as DataLoader does
        pid = os.fork()
    if not pid:
        os._exit(0 if source.read(150) == expected else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert source.read(150) == expected


def test_few_files_stay_open(tmp_path: Path, cache: ShardCache) -> None:
    for k in range(100):
        pack(tmp_path / "d" / f"{k:03d}.tar", [(f"{k}.jpg", b"%d" % k)])
    source = of(tmp_path / "d", cache)
    before = len(os.listdir("/proc/self/fd"))
    assert [source.read(i) for i in range(100)] == [b"%d" % k for k in range(100)]
    assert len(os.listdir("/proc/self/fd")) - before == 64
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, list(range(100)) * 5)) == [b"%d" % k for k in range(100)] * 5
    assert len(os.listdir("/proc/self/fd")) - before == 64


def test_splits(tmp_path: Path, cache: ShardCache) -> None:
    names = [
        f for k, name in enumerate(("cat", "ant", "bee")) for f in ((f"{k}.jpg", b"x"), (f"{k}.txt", name.encode()))
    ]
    pack(tmp_path / "train.tar", names)
    pack(tmp_path / "val.tar", [("0.jpg", b"x"), ("0.txt", b"bee")])
    train, val = open_shard_splits(f"{tmp_path}/train.tar", f"{tmp_path}/val.tar", cache, "txt")
    assert train.classes == val.classes == ("ant", "bee", "cat")
    assert (train.labels.tolist(), val.labels.tolist()) == ([2, 0, 1], [1])
    pack(tmp_path / "val.tar", [("0.jpg", b"x"), ("0.txt", b"dog")])
    with pytest.raises(
        DataError, match=r"val.tar: 0.jpg has the label 'dog', which is none of the 3 classes \(ant, bee, cat\)"
    ):
        open_shard_splits(f"{tmp_path}/train.tar", f"{tmp_path}/val.tar", cache, "txt")
    pack(tmp_path / "val.tar", [("0.jpg", b"x"), ("0.txt", b"ant"), ("1.jpg", b"x")])
    with pytest.raises(DataError, match=r"val.tar/1.jpg has no label, which validation images need"):
        open_shard_splits(f"{tmp_path}/train.tar", f"{tmp_path}/val.tar", cache, "txt")


def test_open_data_holds_out(four: Path, tmp_path: Path) -> None:
    config = DataConfig(source="shards", root=str(four / "shards"), cache=str(tmp_path / "c"), val_fraction=0.1)
    splits = open_data(config)
    assert (len(splits.unlabelled), len(splits.train), len(splits.val)) == (360, 360, 40)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "shards"}, "data.source=shards needs data.root; name the shards"),
        ({"label_key": "cls"}, "data.label_key=cls must be left out"),
        ({"cache_gib": -1.0}, "data.cache_gib=-1.0 must be 0"),
        ({"fetch_retries": -1}, "data.fetch_retries=-1 must be 0 or more"),
        ({"source": "shards", "root": "x", "labels": "y"}, "data.labels is for data.source=folder"),
    ],
)
def test_config_refuses(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**keys)
