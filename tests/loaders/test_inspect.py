"""`fastsimclr inspect`: what it says of a packed file, its contact sheet, and what --verify finds."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastsimclr.cli.main import main
from fastsimclr.loaders.beton.pack import Packing, pack
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.recode import Recoding
from fastsimclr.loaders.beton.writer import BetonWriter
from fastsimclr.loaders.sets.folder import open_folder


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = main(["inspect", *map(str, words)])
    return code, *capsys.readouterr()


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """40 red cats of 30 x 20 pixels, 20 blue dogs of 70 x 90 and a damaged one."""
    for kind, size, count, colour in (("cat", (30, 20), 40, "red"), ("dog", (70, 90), 20, "blue")):
        (tmp_path / "src" / kind).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", size, colour).save(tmp_path / f"src/{kind}/{k:02d}.jpg")
    (tmp_path / "src/dog/bad.jpg").write_bytes(b"\xff\xd8\xff")
    source, _ = open_folder(tmp_path / "src", labels=None, val=None, val_labels=None)
    pack(source, tmp_path / "x.beton", Packing(recoding=Recoding(), threads=1, max_bad_fraction=0.1))
    return tmp_path / "x.beton"


def facts(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_facts(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, packed)
    source = BetonSource(packed)
    assert found["images"] == found["jpeg"] == 60 and found["raw"] == 0
    assert found["bytes"] == packed.stat().st_size and found["page_bytes"] == 2**23
    assert found["classes"] == {"cat": 40, "dog": 20} and found["unlabelled"] == 0
    assert found["height"] == {"least": 20, "median": 20, "most": 90}
    assert found["width"] == {"least": 30, "median": 30, "most": 70}
    assert found["shorter_side"] == [[1, 31, 40], [64, 95, 20]]
    assert found["bytes_per_image"]["largest"] == max(len(source.read(k)) for k in range(60))
    assert found["fingerprint"] == source.fingerprint
    assert found["sidecar"]["stored"] == {"verbatim": 60} and found["sidecar"]["settings"]["quality"] == 90
    ((name, reason),) = found["left_out"]
    assert name == "dog/bad.jpg" and reason.startswith("dog/bad.jpg is damaged")


def test_lines(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, packed)
    assert code == 0
    for said in ("60 images", "60 JPEG, 0 raw", "height: 20 to 90 px", "  cat: 40", "packed from: src", "left out: 1"):
        assert said in out
    assert re.search(r"shorter side     1-31 +40 #{40}\n", out) and re.search(r"64-95 +20 #{20}\n", out)
    assert "  dog/bad.jpg is damaged" in out
    packed.with_name("x.beton.json").unlink()
    code, out, _ = run(capsys, packed)
    assert code == 0 and "no sidecar" in out and "  0: 40" in out


def test_verify(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert facts(capsys, packed, "--verify")["damaged"] == []
    start = int(BetonSource(packed).starts[41])
    with packed.open("r+b") as file:
        file.seek(start + 300)
        byte = file.read(1)
        file.seek(start + 300)
        file.write(bytes([byte[0] ^ 4]))
    code, out, _ = run(capsys, packed, "--verify", "--threads", "2")
    assert code == 1 and "damaged: 1" in out
    assert re.search(r"x\.beton/dog/01\.jpg is damaged: its CRC-32 is", out)


def test_verify_decodes_where_there_are_no_checksums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "JPEG")
    writer = BetonWriter(tmp_path / "x.beton", 3, 2**21)
    writer.add(0, file.getvalue(), 20, 30, False)
    writer.add(1, file.getvalue(), 20, 31, False)  # a size that is not the image's
    writer.add(2, file.getvalue()[:-30], 20, 30, False)
    writer.finish([0, 0, 0])
    writer.close()
    code, out, _ = run(capsys, tmp_path / "x.beton", "--verify", "--json")
    damaged = json.loads(out)["damaged"]
    assert code == 1 and [name for name, _ in damaged] == ["1", "2"]
    assert "it decodes to 20 x 30 pixels, not to 20 x 31" in damaged[0][1] and "x.beton[2] is damaged" in damaged[1][1]


def test_the_contact_sheet(packed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, packed, "--sheet", tmp_path / "sheet.png")
    assert code == 0 and f"contact sheet: {tmp_path}/sheet.png" in out
    assert not (tmp_path / "sheet.png.tmp").exists()
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet).astype(int)
        assert sheet.format == "PNG"
    # 48 tiles spread over 60 images: two in three are cats.
    red = ((pixels - [254, 0, 0]).__abs__().max(axis=2) < 6).sum()
    blue = ((pixels - [0, 0, 254]).__abs__().max(axis=2) < 6).sum()
    cat, dog = (4 * 30) * (4 * 20), 70 * 90  # small ones are enlarged by whole pixels
    assert abs(red / cat - 32) <= 1 and abs(blue / dog - 16) <= 1


def test_what_cannot_be_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.beton").write_bytes(b"\x02\x00" * 40)
    code, _, err = run(capsys, tmp_path / "x.beton")
    assert code == 1 and err.startswith(f"error: {tmp_path}/x.beton has page_size=") and err.count("\n") == 1
