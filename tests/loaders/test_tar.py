"""Plain tars of every dialect against Python's tarfile, headers written by hand, every cut and flip."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from fastsimclr.loaders.shards.tar import Member, members
from fastsimclr.loaders.source import DataError
from tests.loaders.tars import END, FORMATS, header, padded, write_tar


def listed(path: Path) -> list[Member]:
    with path.open("rb") as file:
        return list(members(file.fileno(), path.stat().st_size, path.name))


def content(path: Path, member: Member) -> bytes:
    return path.read_bytes()[member.offset : member.offset + member.size]


@pytest.mark.parametrize("dialect", FORMATS)
def test_members_are_those_of_tarfile(tmp_path: Path, dialect: str) -> None:
    long = "d" * 90 + "/" + "n" * 80 + ".jpg"  # ustar: by its prefix
    files = [("a.jpg", b"x" * 511), ("b/ü.cls", b"7"), ("c.jpg", b""), (long, b"y" * 512), ("e.png", b"z" * 1537)]
    if dialect != "ustar":
        files += [("f" * 300 + ".jpg", b"long")]
    path = write_tar(tmp_path / "a.tar", files, dialect)
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
    ids=[
        "empty",
        "no-end",
        "cut-header",
        "cut-member",
        "cat",
        "checksum",
        "checksum-2",
        "size",
        "cut-name",
        "long-name",
        "pax-length",
        "pax-record",
        "sparse",
        "gzip",
        "xz",
        "zstd",
        "bzip2",
        "jpeg",
    ],
)
def test_bad_tars(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        listed(path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    whole = write_tar(
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
