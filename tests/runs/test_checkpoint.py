"""Checkpoints: written whole or not at all, the last k kept, anything else refused by name."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsimclr.runs import checkpoint
from fastsimclr.runs.checkpoint import CheckpointError
from fastsimclr.runs.text import differences, write_text


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "stage": "pretrain",
        "recipe": "seed: 0\n",
        "step": step,
        "total_steps": 10,
        "objective": {"weight": torch.randn(300, generator=generator), "half": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"momentum": torch.randn(300, generator=generator)}}, "param_groups": [{"lr": 0.1}]},
        "scaler": {},
        "rng": {"python": [3, [1, 2], None]},
        "fingerprint": "ab",
        "facts": {"batch": 4},
        "trained_s": 1.5,
        "last": {"loss": 2.0},
    }


def names(run: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.folder(run).iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(3), keep=2)
    loaded = checkpoint.load(path)
    assert loaded.pop("format") == checkpoint.FORMAT
    expected = state(3)
    for part in ("objective", "optimizer"):
        found, wanted = loaded.pop(part), expected.pop(part)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert loaded == expected


def test_the_last_k_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30, 4, 100):
        checkpoint.save(tmp_path, state(step), keep=3)
    assert names(tmp_path) == ["step-00000004.pt", "step-00000030.pt", "step-00000100.pt"]
    assert checkpoint.newest(tmp_path).name == "step-00000100.pt"


def test_other_files_are_not_checkpoints(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(5), keep=1)
    strangers = ("step-00000009.tmp", "step-9.pt", "step-00000009.pt.tmp", "xstep-00000009.pt", "best.pt")
    for name in strangers:
        (path.parent / name).write_bytes(b"")
    assert checkpoint.saved(tmp_path) == [path]
    checkpoint.save(tmp_path, state(6), keep=1)
    assert names(tmp_path) == sorted([*strangers, "step-00000006.pt"])


def test_a_crash_while_writing_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = checkpoint.save(tmp_path, state(1), keep=1)

    def crash(obj: object, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, state(2), keep=1)
    assert checkpoint.newest(tmp_path) == first
    assert checkpoint.load(first)["step"] == 1


def test_data_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noting_fsync(handle: int) -> None:
        events.append("fsync")
        fsync(handle)

    def noting_replace(path: Path, target: Path) -> Path:
        events.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting_replace)
    checkpoint.save(tmp_path, state(1), keep=1)
    assert events == ["fsync", "rename", "fsync"]
    events.clear()
    write_text(tmp_path / "a.txt", "text")
    assert events == ["fsync", "rename", "fsync"]
    assert (tmp_path / "a.txt").read_text() == "text"


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(1), keep=1)
    whole = path.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"step-00000001\.pt") as info:
            checkpoint.load(path)
        assert "\n" not in str(info.value)
        assert f"({length} bytes) cannot be read: it is truncated" in str(info.value)


def test_damaged_bytes_are_found(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(1), keep=1)
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 4, 30))):
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = checkpoint.load(path)
        except CheckpointError:
            continue
        # The hit was on bytes that carry nothing: padding, dates.
        for part in ("objective", "optimizer"):
            torch.testing.assert_close(loaded[part], state(1)[part], rtol=0, atol=0)


@pytest.mark.parametrize(
    "content", [b"hello", b"\x80\x02K\x01.", b"PK\x03\x04" + b"x" * 50, b"\xff\xd8\xff\xe0jpeg" * 9]
)
def test_a_foreign_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"foreign\.pt"):
        checkpoint.load(path)


def test_a_foreign_zip_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "foreign.pt", "w") as archive:
        archive.writestr("readme.txt", "nothing of ours")
    with pytest.raises(CheckpointError, match=r"foreign\.pt"):
        checkpoint.load(tmp_path / "foreign.pt")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickled_command_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    target, path = tmp_path / "executed", tmp_path / "evil.pt"
    evil = {"format": checkpoint.FORMAT, **state(1), "last": Malicious(target)}
    if how == "torch":
        torch.save(evil, path)
    else:
        path.write_bytes(pickle.dumps(evil, protocol=2))
    found = "holds more than tensors" if how == "torch" else r"cannot be read: it is .* foreign"
    with pytest.raises(CheckpointError, match=rf"evil\.pt.* {found}"):
        checkpoint.load(path)
    assert not target.exists()
    if how == "torch":  # the same file is dangerous to a loader that trusts it
        torch.load(path, weights_only=False)
        assert target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": 1}, "not written by fastsimclr: it has no 'format' entry"),
        (torch.ones(3), "not written by fastsimclr"),
        ({"format": 99, **state(1)}, "has format 99, this version reads 1"),
        (
            {"format": 1, **{key: value for key, value in state(1).items() if key not in ("rng", "facts")}},
            "lacks rng, facts",
        ),
    ],
    ids=["foreign", "tensor", "format", "incomplete"],
)
def test_another_content_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message) as info:
        checkpoint.load(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in str(info.value)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pt does not exist"):
        checkpoint.load(tmp_path / "gone.pt")
    with pytest.raises(CheckpointError, match=r"gone does not exist; give the folder"):
        checkpoint.newest(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint .* run the earlier stage first"):
        checkpoint.newest(tmp_path)


def test_differences_of_recipes_are_named_by_key() -> None:
    before = "seed: 0\ndata: {root: a, x: {y: 1}}\nonly: 2\n"
    now = "seed: 0\ndata: {root: b, x: {y: 3}}\n"
    assert differences(before, now) == ["data.root: a -> b", "data.x.y: 1 -> 3", "only: 2 -> None"]
    assert differences(before, before) == []
