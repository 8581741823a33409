"""Files written whole: an error, a full disk or a kill at any moment leaves the old one as it was."""

from __future__ import annotations

import errno
import os
import signal
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from fastsimclr.loaders.whole import whole_file, write_whole

NAMES = ("fsync", "replace")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("shared", [False, True])
def test_the_bytes_are_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    path, calls = tmp_path / "a.json", list[tuple[str, Any]]()

    def noted(name: str, really: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any) -> Any:
            what = os.readlink(f"/proc/self/fd/{words[0]}") if name == "fsync" else str(words[1])
            calls.append((name, what))
            return really(*words)

        return call

    for name in NAMES:
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    write_whole(path, b"new", shared=shared)
    (first, temporary), *rest = calls
    assert first == "fsync" and temporary.startswith(f"{path}.") and temporary.endswith(".tmp")
    assert rest == [("replace", str(path)), ("fsync", str(tmp_path))]
    assert (temporary == f"{path}.tmp") is not shared
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("name", NAMES)
def test_an_error_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / "a.json"
    write_whole(path, b"old")

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_whole(path, b"new")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.json"]


def test_a_full_disk_leaves_the_old_file_alone(
    tmp_path: Path, files_up_to: Callable[[int], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "a.json"
    write_whole(path, b"old")
    with files_up_to(1000), pytest.raises(OSError, match="File too large"):
        write_whole(path, bytes(5000))
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.json"]


def test_what_a_kill_leaves_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, b"old")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        pid = os.fork()
    if not pid:
        with whole_file(path) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert names(tmp_path) == ["a.json", "a.json.tmp"] and path.read_bytes() == b"old"
    write_whole(path, b"new")
    assert names(tmp_path) == ["a.json"] and path.read_bytes() == b"new"
