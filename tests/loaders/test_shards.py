"""WebDataset shards: groups, labels, patterns of places, reads, and the way to training data."""

from __future__ import annotations

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
from fastsimclr.loaders.shards.places import expand
from fastsimclr.loaders.shards.source import ShardSource, open_shard_splits, open_shards
from fastsimclr.loaders.source import DataError
from tests.loaders.tars import Files, write_tar


def opened(path: Path | str | Sequence[str], cache: ShardCache, **keys: Any) -> ShardSource:
    return open_shards(str(path) if isinstance(path, Path) else path, cache, **keys)


def scan(path: Path, label_key: str | None = None) -> Any:
    with path.open("rb") as file:
        return scan_shard(file.fileno(), path.stat().st_size, path.name, label_key)


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
        source = opened(write_tar(tmp_path / "a.tar", files), cache)
    assert [source.read(i) for i in range(4)] == [b"A", b"B", b"C", b"D"]
    assert source.labels.tolist() == [2, 0, -1, 1]
    assert source.classes == ("0", "1", "2")
    assert source.describe(1) == f"{tmp_path}/a.tar/dir.v2/1.JPEG"
    assert source.name == "shards:a.tar"
    assert f"left out 2 keys that have no image: {tmp_path}/a.tar/4, {tmp_path}/a.tar/README" in caplog.text
    assert f"1 of 4 images have no label, as {tmp_path}/a.tar/3.png" in caplog.text
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
    source = opened(
        write_tar(tmp_path / "a.tar", [("0.jpg", b"A"), ("1.jpg", b"B"), *extra]), cache, label_key=label_key
    )
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
    path = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(DataError, match=message):
        opened(path, cache, label_key=label_key)


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
    source = opened(write_tar(tmp_path / "a.tar", [("0.jpg", b"A"), ("1.jpg", b"B")]), cache)
    assert source.labels.tolist() == [-1, -1]
    assert source.classes == ()


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
        write_tar(tmp_path / name, [])
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
    write_tar(tmp_path / "0.tar", [("0.jpg", b"A")])
    with pytest.raises(DataError, match=r"1.tar cannot be read: No such file or directory; correct the path"):
        opened(f"{tmp_path}/{{0..1}}.tar", cache)


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
        write_tar(root / "shards" / f"t-{shard:03d}.tar", part)
    return root


def test_imagenet_shards_are_the_folder(four: Path, cache: ShardCache) -> None:
    source = opened(f"{four}/shards/t-{{000..003}}.tar", cache)
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
    source = opened(f"{four}/shards", cache)
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
        write_tar(tmp_path / "d" / f"{k:03d}.tar", [(f"{k}.jpg", b"%d" % k)])
    source = opened(tmp_path / "d", cache)
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
    write_tar(tmp_path / "train.tar", names)
    write_tar(tmp_path / "val.tar", [("0.jpg", b"x"), ("0.txt", b"bee")])
    train, val = open_shard_splits(f"{tmp_path}/train.tar", f"{tmp_path}/val.tar", cache, "txt")
    assert train.classes == val.classes == ("ant", "bee", "cat")
    assert (train.labels.tolist(), val.labels.tolist()) == ([2, 0, 1], [1])
    write_tar(tmp_path / "val.tar", [("0.jpg", b"x"), ("0.txt", b"dog")])
    with pytest.raises(
        DataError, match=r"val.tar: 0.jpg has the label 'dog', which is none of the 3 classes \(ant, bee, cat\)"
    ):
        open_shard_splits(f"{tmp_path}/train.tar", f"{tmp_path}/val.tar", cache, "txt")
    write_tar(tmp_path / "val.tar", [("0.jpg", b"x"), ("0.txt", b"ant"), ("1.jpg", b"x")])
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
