"""A packer that is killed, stopped or out of disk: a packed file is whole or not there, and can be gone on with."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fastsimclr.loaders.beton import pack as packing
from fastsimclr.loaders.beton import writer
from fastsimclr.loaders.beton.pack import Interrupted, Packing, pack
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.recode import Recoding
from fastsimclr.loaders.beton.sidecar import sidecar_path
from fastsimclr.loaders.beton.writer import BetonWriter
from fastsimclr.loaders.sets.basic import ArraySource
from fastsimclr.loaders.shards.remote import FetchError
from fastsimclr.loaders.source import DataError
from tests.loaders.pictures import bytes_of, how, put, run
from tests.loaders.pictures import folder_source as of

ROOT = Path(__file__).parents[2]

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


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_killed_or_stopped_pack_goes_on_to_the_same_bytes(
    many: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    target = tmp_path / "x.beton"
    if killed:
        ended = subprocess.run([sys.executable, "-c", KILLED, str(many), str(target)], cwd=ROOT, timeout=300)
        assert ended.returncode == -signal.SIGKILL
    else:
        monkeypatch.setattr(packing, "CHECKPOINT_BYTES", 2**21)
        count = iter(range(1000))
        stopped = Packing(recoding=Recoding(), threads=2, page_bytes=2**21, max_bad_fraction=0.05)
        with pytest.raises(Interrupted):
            pack(of(many), target, stopped, stop=lambda: next(count) == 116)
    assert not target.exists()
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


@pytest.mark.parametrize("after", [1, 64, 149, 151])  # the last while the finished file is checked
def test_a_stopped_pack_goes_on_to_the_same_bytes(
    many: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(packing, "CHECKPOINT_BYTES", 2**21)
    target, count = tmp_path / "x.beton", iter(range(1000))
    on = Packing(recoding=Recoding(), threads=2, page_bytes=2**21, max_bad_fraction=0.05, resume=True)
    with pytest.raises(Interrupted, match=f"packed {min(after + 1, 150)} of 150 images"):
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


def test_a_full_disk_by_the_kernel(
    many: Path, whole: Path, tmp_path: Path, files_up_to: Callable[[int], AbstractContextManager[None]]
) -> None:
    target = tmp_path / "x.beton"
    on = Packing(recoding=Recoding(), threads=2, page_bytes=2**21, max_bad_fraction=0.05, resume=True)
    for most in (7 * 2**20, 100_000, 1000):  # at a page, then at the beginning of the file, then at its journal
        with files_up_to(most), pytest.raises(DataError, match=r"File too large at image \d+ of 150 .* --resume auto"):
            pack(of(many), target, on)
        assert not target.exists() and not sidecar_path(target).exists()
    pack(of(many), target, on)
    assert bytes_of(target) == bytes_of(whole)


class Broken:
    """The disk, which fails for good at the call `at` of those that change it; as a kill, nothing is changed later."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        self.calls, self.at, self.error = 0, at, error
        for name in ("write", "fsync", "replace", "unlink"):
            patch.setattr(os, name, self.failing(getattr(os, name)))

    def failing(self, really: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **keys: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                raise self.error
            if self.calls > self.at and isinstance(self.error, OSError):
                raise OSError(self.error.errno, self.error.strerror)
            return really(*words, **keys)

        return call


@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), KeyboardInterrupt()])
def test_an_end_at_any_step_can_be_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(packing, "CHECKPOINT_BYTES", 2**21)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 500, 500, 3), dtype=np.uint8)  # two a page

    class Pixels(ArraySource):
        def read(self, index: int) -> npt.NDArray[np.uint8]:
            if index == 3:
                raise DataError("000003 is damaged")
            return super().read(index)

    source = Pixels("pixels", pixels, [k % 2 for k in range(8)], ["a", "b"])
    on = Packing(recoding=Recoding(), threads=1, page_bytes=2**21, max_bad_fraction=0.5, resume=True)
    first = tmp_path / "0/x.beton"
    pack(source, first, on)
    steps = 0
    while True:
        target = tmp_path / f"{steps + 1}/x.beton"
        with monkeypatch.context() as patch:
            disk = Broken(patch, steps + 1, error)
            try:
                pack(source, target, on)
                break
            except DataError as caught:
                assert str(target) in str(caught) and "Input/output error" in str(caught) and "--resume" in str(caught)
            except KeyboardInterrupt:
                pass
        assert disk.calls >= disk.at
        steps += 1
        if target.exists():
            assert bytes_of(target) == bytes_of(first)
        pack(source, target, on)
        assert bytes_of(target) == bytes_of(first)
        assert sorted(path.name for path in target.parent.iterdir()) == [
            "x.beton",
            "x.beton.json",
            "x.beton.left-out.csv",
        ]
    assert steps > 15


class Defective(ArraySource):
    """Reading image 5 fails, and not because of the image."""

    error: Exception

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        if index == 5:
            raise self.error
        return super().read(index)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), r"none\[5\] could not be read or decoded, and no damage explains it \(MemoryError\); free mem"),
        (KeyError("bug"), r"none\[5\] could not be .* \(KeyError: 'bug'\); --traceback shows where"),
    ],
)
def test_a_thread_that_fails_otherwise_names_the_image(tmp_path: Path, error: Exception, said: str) -> None:
    source = Defective("none", np.zeros((9, 4, 4, 3), np.uint8), [0] * 9, ["a"])
    source.error = error
    with pytest.raises(RuntimeError, match=said) as caught:
        pack(source, tmp_path / "x.beton", how())
    assert caught.value.__cause__ is error
    assert not (tmp_path / "x.beton").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pack")]


def test_a_shard_that_cannot_be_fetched_stops_the_pack(tmp_path: Path) -> None:
    source = Defective("none", np.zeros((9, 4, 4, 3), np.uint8), [0] * 9, ["a"])
    source.error = FetchError("http://h/t.tar could not be fetched")
    with pytest.raises(FetchError, match="could not be fetched"):  # no image is at fault, none is left out
        pack(source, tmp_path / "x.beton", Packing(recoding=Recoding(), threads=2, max_bad_fraction=0.9))
    assert not (tmp_path / "x.beton").exists()


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


def test_a_signal_to_the_command_keeps_what_is_done(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, really = tmp_path / "x.beton", BetonWriter.add

    def add(self: BetonWriter, row: int, *blob: Any) -> int:
        if row == 60:
            signal.raise_signal(signal.SIGINT)
        return really(self, row, *blob)

    monkeypatch.setattr(BetonWriter, "add", add)
    code, _, err = run(capsys, "pack", many, target, "--page_mib", "2", "--max_bad_fraction", "0.05")
    assert code == 130 and "give the same command with --resume auto to go on" in err and not target.exists()
    partial = target.with_name("x.beton.partial")
    assert partial.stat().st_size > 2**21 and target.with_name("x.beton.journal").exists()


@pytest.mark.slow
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
    until = time.monotonic() + 300
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
