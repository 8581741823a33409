"""`fastsimclr pack`: what images become, what is left out, and that a file is whole or not there at all."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from fastsimclr.cli import main
from fastsimclr.loaders.beton import lossless, writer
from fastsimclr.loaders.beton import pack as packing
from fastsimclr.loaders.beton.origins import Origin, open_list, open_origin
from fastsimclr.loaders.beton.pack import Interrupted, Packing, pack
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.recode import Recoding, recode
from fastsimclr.loaders.beton.sidecar import left_out_path, read_sidecar, sidecar_path
from fastsimclr.loaders.decode import decode
from fastsimclr.loaders.sets.basic import ArraySource
from fastsimclr.loaders.sets.folder import open_folder
from fastsimclr.loaders.source import DataError, Source

ROOT = Path(__file__).parents[2]


def picture(height: int = 60, width: int = 80, seed: int = 0) -> Image.Image:
    """Soft colours, as a photograph has."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def put(root: Path, images: dict[str, bytes]) -> Path:
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def of(root: Path) -> Source:
    return open_folder(root, labels=None, val=None, val_labels=None)[0]


def how(**recoding: Any) -> Packing:
    return Packing(recoding=Recoding(**recoding), threads=2, page_bytes=2**21)


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


# file name -> (bytes, way it is stored)
KINDS: dict[str, tuple[bytes, str]] = {
    "plain.jpg": (encoded(picture()), "verbatim"),
    "grey.jpg": (encoded(picture().convert("L")), "verbatim"),
    "444.jpg": (encoded(picture(), subsampling=0), "verbatim"),
    "upright.jpg": (encoded(picture(), exif=oriented(1)), "verbatim"),
    "turned.jpg": (encoded(picture(), exif=oriented(6)), "orientation removed"),
    "broken-exif.jpg": (encoded(picture(), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"), "orientation removed"),
    "progressive.jpg": (encoded(picture(), progressive=True, exif=oriented(8)), "baseline"),
    "cmyk.jpg": (encoded(picture().convert("CMYK")), "re-encoded"),
    "rgb.jpg": (encoded(picture(), keep_rgb=True), "re-encoded"),
    "colour.png": (encoded(picture(), "PNG"), "re-encoded"),
    "clear.png": (encoded(picture().convert("RGBA"), "PNG"), "re-encoded"),
    "palette.png": (encoded(picture().convert("L").quantize(64, dither=Image.Dither.NONE), "PNG"), "re-encoded"),
    "deep.png": (encoded(Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13), "PNG"), "re-encoded"),
    "turned.png": (encoded(picture(), "PNG", exif=oriented(3)), "re-encoded"),
    "web.webp": (encoded(picture(), "WEBP"), "re-encoded"),
    "tagged.tif": (encoded(picture(), "TIFF"), "re-encoded"),
    "png.JPEG": (encoded(picture(), "PNG"), "re-encoded"),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("library", [True, False])
def test_everything_becomes_a_plain_jpeg(monkeypatch: pytest.MonkeyPatch, name: str, library: bool) -> None:
    data, way = KINDS[name]
    if not library:
        monkeypatch.setattr("fastsimclr.loaders.beton.recode.to_baseline", lambda jpeg: None)
    stored = recode(data, name, Recoding())
    assert (stored.height, stored.width, stored.raw) == (60, 80, False)
    assert stored.way == way or (way, stored.way) == ("baseline", "re-encoded")
    assert (stored.blob == data) == (way == "verbatim")
    # Every reader sees the same pixels, without turning them; OpenCV and Pillow have libjpegs of their own.
    ours = decode(stored.blob, name).astype(int)
    by_cv2 = cv2.cvtColor(cv2.imdecode(np.frombuffer(stored.blob, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    with Image.open(io.BytesIO(stored.blob)) as opened:
        assert opened.format == "JPEG" and opened.mode in ("RGB", "L") and not opened.info.get("progressive")
        assert opened.getexif().get(0x0112, 1) == 1
        by_pillow = np.asarray(opened.convert("RGB"))
    assert np.abs(ours - by_cv2).max() <= 3 and np.abs(ours - by_pillow).max() <= 3
    before = decode(data, name).astype(int)
    limit = 0.0 if way in ("verbatim", "orientation removed") else 3.0  # levels, on average: quality 90
    assert np.abs(ours - before).mean() <= limit


def test_progressive_is_made_baseline_without_loss_or_said_not_to_be() -> None:
    data, _ = KINDS["progressive.jpg"]
    stored = recode(data, "x", Recoding())
    if lossless.describe() == "re-encoded":  # no libturbojpeg on this machine
        assert stored.way == "re-encoded"
        return
    assert stored.way == "baseline"
    np.testing.assert_array_equal(decode(stored.blob, ""), decode(data, ""))
    with Image.open(io.BytesIO(stored.blob)) as after, Image.open(io.BytesIO(data)) as before:
        assert after.quantization == before.quantization


@pytest.mark.parametrize(
    ("size", "short_side", "becomes"),
    [
        ((400, 300), 256, (341, 256)),
        ((300, 1000), 100, (100, 333)),
        ((256, 900), 256, (256, 900)),
        ((20, 30), 256, (20, 30)),
        ((9999, 3), 2, (6666, 2)),
        ((300, 300), 299, (299, 299)),
    ],
)
def test_shrinking_never_enlarges(size: tuple[int, int], short_side: int, becomes: tuple[int, int]) -> None:
    stored = recode(encoded(picture(*size)), "x", Recoding(short_side=short_side))
    assert (stored.height, stored.width) == becomes
    assert decode(stored.blob, "x").shape == (*becomes, 3)
    assert stored.way == ("verbatim" if becomes == size else "shrunk")


def test_shrinking_averages_areas() -> None:
    pixels = np.asarray(picture(64, 96, 3))
    blocks = pixels.reshape(32, 2, 48, 2, 3).astype(float).mean(axis=(1, 3))
    raw = recode(pixels, "x", Recoding(short_side=32, store="raw"))
    assert raw.raw and raw.way == "shrunk"
    assert np.abs(np.frombuffer(raw.blob, np.uint8).reshape(32, 48, 3) - blocks).max() <= 1
    jpeg = recode(encoded(picture(64, 96, 3).convert("L")), "x", Recoding(short_side=32, quality=95))
    with Image.open(io.BytesIO(jpeg.blob)) as opened:
        assert opened.mode == "L"  # grey stays grey


def test_settings_are_checked() -> None:
    for key, value in (("short_side", 0), ("quality", 101), ("max_pixels", 0)):
        with pytest.raises(ValueError, match=f"--{key}={value} must be"):
            Recoding(**{key: value})


def test_imagenet_verbatim_and_at_256(
    imagenet_samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "pack", imagenet_samples, tmp_path / "o.beton", "--page_mib", "2")
    assert code == 0 and "400 images in" in out
    source = BetonSource(tmp_path / "o.beton")
    files = sorted(imagenet_samples.glob("*.JPEG"))
    assert source.names == tuple(path.name for path in files) and len(files) == 400
    changed = [path.name for i, path in enumerate(files) if source.read(i) != path.read_bytes()]
    assert changed == ["n02814860_beacon.JPEG"] or len(changed) <= 1  # one has an orientation
    for i in [k for k, path in enumerate(files) if path.name in changed]:
        np.testing.assert_array_equal(decode(source.read(i), ""), decode(files[i].read_bytes(), ""))
    small = pack(of(imagenet_samples), tmp_path / "r.beton", how(short_side=256))
    for i, path in enumerate(files):
        with Image.open(path) as opened:
            width, height = opened.size
        scale = min(1.0, 256 / min(width, height))
        want = np.array([height * scale, width * scale])
        assert (np.abs(small.pixel_sizes[i] - want).max() <= 0.5 and small.pixel_sizes[i].min() <= 256) or scale == 1
    assert small.lengths.mean() < 0.3 * source.lengths.mean()


def bytes_of(path: Path) -> tuple[bytes, bytes]:
    return path.read_bytes(), sidecar_path(path).read_bytes()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 images in two classes, some 60 KB so that they fill pages; one larger than a page, two damaged."""
    random = np.random.default_rng(1)
    noisy = [Image.fromarray(random.integers(0, 256, (220, 270 + k, 3), dtype=np.uint8)) for k in range(10)]
    files = {f"{'ab'[k % 2]}/{k:03d}.jpg": encoded(noisy[k % 10], quality=90, comment=str(k)) for k in range(150)}
    large = Image.fromarray(random.integers(0, 256, (800, 800, 3), dtype=np.uint8))
    files["a/060.jpg"] = encoded(large, quality=100, subsampling=0)  # more than a page of 2 MiB
    files["a/020.jpg"] = files["a/020.jpg"][:3000]
    files["b/075.jpg"] = b""
    return put(tmp_path_factory.mktemp("many"), files)


@pytest.fixture(scope="module")
def whole(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`many`, packed in one go."""
    path = tmp_path_factory.mktemp("whole") / "x.beton"
    pack(of(many), path, Packing(recoding=Recoding(), threads=1, page_bytes=2**21, max_bad_fraction=0.05))
    return path


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


KILLED = """
import os, signal, sys
from pathlib import Path
from fastsimclr.loaders.beton import pack as packing
from fastsimclr.loaders.sets.folder import open_folder
from fastsimclr.loaders.beton.recode import Recoding
packing.CHECKPOINT_BYTES = 2**21
source, _ = open_folder(Path(sys.argv[1]), labels=None, val=None, val_labels=None)
how = packing.Packing(recoding=Recoding(), threads=2, page_bytes=2**21, max_bad_fraction=0.05)
end = lambda done, n: done == 117 and os.kill(os.getpid(), signal.SIGKILL)
packing.pack(source, Path(sys.argv[2]), how, progress=end)
"""


def test_a_killed_pack_goes_on_to_the_same_bytes(many: Path, whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.beton"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(many), str(target)], cwd=ROOT, timeout=120)
    assert ended.returncode == -signal.SIGKILL and not target.exists()
    journal = target.with_name("x.beton.journal")
    assert len(journal.read_bytes().splitlines()) >= 3
    with journal.open("ab") as file:  # what a crash may leave of a line
        file.write(b'12345678 {"reached": 99')
    with pytest.raises(DataError, match=r"x.beton.journal is left of an interrupted pack; give --resume auto"):
        pack(of(many), target, how())
    seen: list[int] = []
    on = Packing(recoding=Recoding(), threads=1, page_bytes=2**21, max_bad_fraction=0.05, resume=True)
    with pytest.raises(DataError, match="is of a pack with another quality; give the settings"):
        pack(of(many), target, Packing(recoding=Recoding(quality=50), threads=1, page_bytes=2**21, resume=True))
    pack(of(many), target, on, progress=lambda done, n: seen.append(done))
    assert seen[0] > 30  # it did not begin anew
    assert bytes_of(target) == bytes_of(whole)
    assert not journal.exists() and not target.with_name("x.beton.partial").exists()
    assert pack(of(many), target, on).fingerprint == BetonSource(whole).fingerprint  # done: nothing to do
    with pytest.raises(DataError, match="was packed from another source or in another way"):
        pack(of(many), target, Packing(recoding=Recoding(quality=50), threads=1, resume=True))


@pytest.mark.parametrize("after", [1, 64, 149])
def test_a_stopped_pack_goes_on_to_the_same_bytes(
    many: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(packing, "CHECKPOINT_BYTES", 2**21)
    target, count = tmp_path / "x.beton", iter(range(1000))
    on = Packing(recoding=Recoding(), threads=2, page_bytes=2**21, max_bad_fraction=0.05, resume=True)
    with pytest.raises(Interrupted, match=f"packed {after + 1} of 150 images"):
        pack(of(many), target, on, stop=lambda: next(count) == after)
    assert not target.exists()
    pack(of(many), target, on)
    assert bytes_of(target) == bytes_of(whole)


def test_a_full_disk_is_named_and_leaves_no_file(
    many: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, room = tmp_path / "x.beton", [3 * 2**20]
    really: Callable[[int, Any], int] = os.write

    def write(number: int, data: Any) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = really(number, data[: room[0]])  # as a disk does: a part first, then nothing
        room[0] -= taken
        return taken

    monkeypatch.setattr(writer.os, "write", write)
    on = Packing(recoding=Recoding(), threads=2, page_bytes=2**21, max_bad_fraction=0.05, resume=True)
    with pytest.raises(
        DataError, match=r"No space left on device at image \d+ of 150 of .* about [\d,]+ more are needed"
    ):
        pack(of(many), target, on)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.beton.journal", "x.beton.partial"]
    monkeypatch.undo()
    pack(of(many), target, on)
    assert bytes_of(target) == bytes_of(whole)


def test_a_disk_that_is_too_small_is_named_first(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        DataError, match=r"needs about [\d,]+ bytes, but .* has 1,000 free; free some, or give --short_side"
    ):
        pack(of(many), tmp_path / "x.beton", how())
    assert not list(tmp_path.iterdir())


def test_what_is_written_wrongly_gets_no_name(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really: Callable[[int, Any], int] = os.write

    def write(number: int, data: Any) -> int:
        if len(data) > 2**20:  # a page: one bit of a blob
            data = bytearray(data)
            data[5000] ^= 1
        return really(number, data)

    monkeypatch.setattr(writer.os, "write", write)
    with pytest.raises(DataError, match=r"x.beton.partial: what was written is not what is read: a/.*CRC-32"):
        pack(of(many), tmp_path / "x.beton", Packing(recoding=Recoding(), threads=1, max_bad_fraction=0.05))
    assert not (tmp_path / "x.beton").exists()


def test_ctrl_c_keeps_what_is_done(many: Path, whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.beton"
    # The last image is a pipe, which keeps the packer waiting until the signal has arrived.
    held = put(
        tmp_path / "held", {path.relative_to(many).as_posix(): path.read_bytes() for path in many.rglob("*.jpg")}
    )
    (held / "b/149.jpg").unlink()
    os.mkfifo(held / "b/149.jpg")
    words = [sys.executable, "-m", "fastsimclr", "pack", str(held), str(target), "--page_mib", "2"]
    words += ["--max_bad_fraction", "0.05"]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    partial = target.with_name("x.beton.partial")
    until = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size > 3 * 2**21) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError):  # nobody reads the pipe, yet or any more
            os.close(os.open(held / "b/149.jpg", os.O_WRONLY | os.O_NONBLOCK))
        time.sleep(0.05)
    process.kill()
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "give the same command with --resume auto to go on" in err and not target.exists()
    assert partial.exists() and target.with_name("x.beton.journal").exists()


def test_overwriting(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("pack", many, tmp_path / "x.beton", "--max_bad_fraction", "0.05", "--short_side", "32")
    assert run(capsys, *words)[0] == 0
    code, _, err = run(capsys, *words)
    assert code == 1 and "x.beton exists; give another name, or --overwrite" in err
    first = bytes_of(tmp_path / "x.beton")
    assert run(capsys, *words, "--quality", "60", "--overwrite")[0] == 0
    assert bytes_of(tmp_path / "x.beton") != first


def test_two_packs_into_one_file_at_once_are_refused(many: Path, tmp_path: Path) -> None:
    target, errors = tmp_path / "x.beton", list[str]()
    on = Packing(recoding=Recoding(short_side=16), threads=1, page_bytes=2**21, max_bad_fraction=0.05, overwrite=True)

    def meanwhile(done: int, n: int) -> None:
        if done == 5:
            with pytest.raises(DataError) as caught:
                pack(of(many), target, on)
            errors.append(str(caught.value))

    assert len(pack(of(many), target, on, progress=meanwhile)) == 148
    assert errors and "is in use by another process" in errors[0]


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


def test_torchvision_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(root: str, train: bool, download: bool) -> SimpleNamespace:
        assert (root, download) == ("somewhere", False)
        data = np.full((3 if train else 2, 32, 32, 3), 7, dtype=np.uint8)
        return SimpleNamespace(data=data, targets=list(range(len(data))), classes=["x", "y", "z"])

    monkeypatch.setattr(datasets, "CIFAR10", make)
    found = open_origin(Origin(src="cifar10", root="somewhere"))
    assert {key: len(source) for key, source in found.items()} == {"train": 3, "val": 2}


def test_lists(tmp_path: Path) -> None:
    put(tmp_path, {name: encoded(picture()) for name in ("a.jpg", "b.jpg", "c,d.jpg", "sub/e.jpg")})
    (tmp_path / "list.txt").write_text("sub/e.jpg\tcat\nb.jpg,dog\nc,d.jpg\n\na.jpg\nc,d.jpgx,dog\n")
    source = open_list(tmp_path / "list.txt")
    assert source.names == ("a.jpg", "b.jpg", "c,d.jpg", "c,d.jpgx", "sub/e.jpg")
    assert source.classes == ("cat", "dog") and source.labels.tolist() == [-1, 1, -1, 1, 0]
    made = pack(source, tmp_path / "x.beton", Packing(recoding=Recoding(), threads=1, max_bad_fraction=0.5))
    assert made.labels.tolist() == [-1, 1, -1, 0]
    lost = ("c,d.jpgx", "c,d.jpgx cannot be read: No such file or directory")
    assert read_sidecar(sidecar_path(made.path)).left_out == (lost,)
    (tmp_path / "labels.csv").write_text("path,label\nsub/e.jpg,owl\n")
    assert open_list(tmp_path / "labels.csv").names == ("sub/e.jpg",)
    for text, said in (("a.jpg\na.jpg\n", "list.txt:2: a.jpg is listed twice"), ("\n", "list.txt names no image")):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(DataError, match=said):
            open_list(tmp_path / "list.txt")


def test_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    blobs = [encoded(picture(seed=k)) for k in range(6)]
    for shard in (0, 1):
        with tarfile.open(tmp_path / f"s-{shard}.tar", "w") as archive:
            for k in range(3 * shard, 3 * shard + 3):
                for name, data in ((f"{k}.jpg", blobs[k]), (f"{k}.cls", str(k % 2).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    code, _, err = run(capsys, "pack", f"{tmp_path}/s-{{0..1}}.tar", tmp_path / "x.beton")
    assert code == 0, err
    source = BetonSource(tmp_path / "x.beton")
    assert [source.read(k) for k in range(6)] == blobs and source.labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_hugging_face_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets as hugging

    blobs = [encoded(picture(seed=k)) for k in range(4)]
    cells = {"picture": [{"bytes": blob, "path": None} for blob in blobs], "label": [1, 0, 1, 1]}
    features = hugging.Features({"picture": hugging.Image(), "label": hugging.ClassLabel(names=["no", "yes"])})
    rows = hugging.Dataset.from_dict(cells, features=features)
    hugging.DatasetDict({"train": rows, "validation": rows.select([2, 0])}).save_to_disk(str(tmp_path / "set"))
    words = ("pack", tmp_path / "set", tmp_path / "out", "--column", "picture")
    code, _, err = run(capsys, *words)
    assert code == 0, err
    train, val = (BetonSource(tmp_path / f"out/{key}.beton") for key in ("train", "val"))
    assert [train.read(k) for k in range(4)] == blobs and [val.read(0), val.read(1)] == [blobs[2], blobs[0]]
    assert train.classes == ("no", "yes") and train.labels.tolist() == [1, 0, 1, 1] and val.labels.tolist() == [1, 1]
    rows.rename_column("label", "k").cast_column("k", hugging.Value("int64")).save_to_disk(str(tmp_path / "plain"))
    (only,) = open_origin(Origin(src=str(tmp_path / "plain"), column="picture", label_column="k")).values()
    assert only.classes == ("0", "1") and only.labels.tolist() == [1, 0, 1, 1]
    for column, said in (("nix", "no column nix, but picture, label"), ("label", "is ClassLabel.*not Image")):
        with pytest.raises(DataError, match=said):
            open_origin(Origin(src=str(tmp_path / "set"), column=column))
    with pytest.raises(DataError, match="is no data set that the package datasets opens"):
        open_origin(Origin(src=str(tmp_path), column="picture"))


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"run: pip install 'fastsimclr\[hugging\]'"):
        open_origin(Origin(src="anything", column="image"))


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        (Origin(src="nowhere"), "nowhere is no folder and no file; give one, FILE.beton, tars"),
        (Origin(src="digits", labels="x.csv"), "x.csv: labels and val are for a folder, and digits is none"),
    ],
)
def test_sources_that_cannot_be(origin: Origin, said: str) -> None:
    with pytest.raises(DataError, match=said):
        open_origin(origin)


def test_nothing_to_pack(tmp_path: Path) -> None:
    empty = ArraySource("none", np.zeros((0, 4, 4, 3), np.uint8), [], [])
    with pytest.raises(DataError, match="none has no image to pack"):
        pack(empty, tmp_path / "x.beton", how())


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
