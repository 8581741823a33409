"""`fastsimclr index`: what it writes, says and refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fastsimclr.loaders.shards.cache import ShardCache
from fastsimclr.loaders.shards.source import open_shards
from tests.loaders.pictures import run
from tests.loaders.tars import SIZE, noise, shard, tar, write_tar
from tests.loaders.web import Web

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of eight images with labels 0 to 4; in a fourth an image without a label, and a label alone."""
    for k in range(3):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"t-{k}.tar").write_bytes(shard(k))
    write_tar(tmp_path / "set" / "u.tar", [("a.jpg", b"x"), ("b.cls", b"1")])
    return tmp_path / "set"


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line of a command that fails."""
    code, out, err = run(capsys, "index", *words)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(lines)) == (1, "", 1), (out, err)
    return lines[0]


def test_an_index_beside_the_shards(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\ndog\nelk\n")
    code, out, _ = run(capsys, "index", folder, "--classes", names, "--cache", tmp_path / "c")
    assert code == 0
    assert out == (
        f"{folder}/index.json: 4 shards of 0.00 GiB, 25 images, 5 classes, 1 unlabelled, 1 keys without an image\n"
    )
    monkeypatch.setattr("fastsimclr.loaders.shards.index_files.scan_shard", None)
    source = open_shards(str(folder), ShardCache(tmp_path / "c"))
    assert source.classes == ("ant", "bee", "cat", "dog", "elk")
    assert source.labels.tolist() == [i % 5 for i in range(24)] + [-1]
    assert [source.read(i) for i in range(24)] == [noise(i) for i in range(24)]


def test_several_patterns_each_in_its_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "more" / "m.tar", [("a.png", b"x"), ("a.json", b'{"k": {"n": "ant"}}')])
    write_tar(folder / "n.tar", [("a.png", b"x"), ("a.json", b'{"k": {"n": "bee"}}')])
    words = ("index", folder / "n.tar", f"{tmp_path}/more", "--label_key", "json.k.n", "--cache", tmp_path / "c")
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert re.findall(r"^(\S+): 1 shards .* 1 images, 1 classes", out, re.M) == [
        f"{folder}/index.json",
        f"{tmp_path}/more/index.json",
    ]


def test_shards_of_a_web_server_into_a_folder(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern, cache = f"{web.url}/t-{{0..3}}.tar", ("--cache", tmp_path / "c", "--fetch_retries", "0")
    said = refused(capsys, pattern, *cache)
    assert f"{web.url}: a web server takes no files" in said and "(--out), which data.index then names" in said
    assert web.asked == []
    room = 2 * SIZE / 2**30
    code, out, _ = run(capsys, "index", pattern, "--out", tmp_path / "o", *cache, "--cache_gib", str(room))
    assert code == 0
    assert out.startswith(f"{tmp_path}/o/index.json: 4 shards of 0.00 GiB, 32 images, 5 classes, 0 unlabelled")
    web.asked.clear()
    source = open_shards(pattern, ShardCache(tmp_path / "c2"), index=str(tmp_path / "o"))
    assert [method for method, *_ in web.asked] == []
    assert [source.read(i) for i in range(32)] == [noise(i) for i in range(32)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("none-*.tar",), r"none-\*\.tar matches no file; correct it"),
        (("none.tar",), r"none\.tar cannot be read: No such file or directory; correct the path or the range"),
        (("{set}/t-{{0..2}}.tar", "--label_key", "txt"), r"no sample has the label that data\.label_key=txt names"),
        (("{set}/t-{{0..2}}.tar", "--label_key", "jpg"), r"data\.label_key=jpg must be the extension of the members"),
        (("{set}/t-{{0..2}}.tar", "--classes", "{set}/few"), r"has the label 2, which is none of the 2 classes"),
        (
            ("{set}/t-{{0..2}}.tar", "--classes", "{set}/twice"),
            r"--classes .*/twice has 2 lines; write one name a line",
        ),
        (
            ("{set}/t-{{0..2}}.tar", "--classes", "{set}/t-0.tar"),
            r"--classes .*t-0\.tar cannot be read: .*; name a text",
        ),
        (("{set}/t-{{0..2}}.tar", "--classes", "{set}/no"), r"--classes .*/no cannot be read: .*No such file"),
        (("{set}/t-{{0..2}}.tar", "{set}/t-1.tar"), r"t-1\.tar is named twice"),
        (("{set}/t-{{0..2}}.tar", "--out", "{set}/t-0.tar"), r"t-0\.tar/index\.json cannot be written: "),
        (("{set}/t-0.tar", "--cache_gib", "-1"), r"--cache_gib=-1\.0 must be 0 \(no limit\) or more"),
        (("{set}/t-0.tar", "--fetch_retries", "-1"), r"--fetch_retries=-1 must be 0 or more"),
        (("{set}/cut.tar",), r"cut\.tar is truncated: it ends"),
    ],
)
def test_refusals_leave_no_index(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    (folder / "few").write_text("ant\nbee\n")
    (folder / "twice").write_text("ant\nant\n")
    (folder / "cut.tar").write_bytes(tar([("a.jpg", b"x")])[:700])
    before = sorted(path.name for path in folder.iterdir())
    given = [word.format(set=folder) for word in words]
    assert re.search(said, refused(capsys, *given, "--cache", tmp_path / "c"))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_an_index_of_other_labels_stays(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ("--cache", tmp_path / "c")
    run(capsys, "index", f"{folder}/t-0.tar", *cache)
    before = (folder / "index.json").read_bytes()
    said = refused(capsys, f"{folder}/t-1.tar", "--label_key", "txt", *cache)
    assert "has label_key=cls and 0 class names, not label_key=txt and 0; give the same, or remove it" in said
    assert (folder / "index.json").read_bytes() == before
    code, out, _ = run(capsys, "index", f"{folder}/t-1.tar", *cache)
    assert code == 0 and "2 shards" in out and "16 images" in out


def test_help_says_something_of_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(capsys, "index", "--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    entries: dict[str, Any] = dict(re.findall(r"^  --(\w+)(?: \w+)?\s+(\w[^(]*)", out, re.M))
    assert {"out", "label_key", "classes", "cache", "cache_gib", "fetch_retries", "traceback"} <= entries.keys()
    assert all(len(words.split()) >= 3 for words in entries.values())
