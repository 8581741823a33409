"""Checkpoints: everything for an exact resume, written whole or not at all, read without running foreign code."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastsimclr.loaders.whole import sync_folder as sync_folder
from fastsimclr.loaders.whole import whole_file

FORMAT = 1
_REQUIRED = (
    *("stage", "recipe", "step", "total_steps", "objective", "optimizer", "scaler", "rng"),
    *("fingerprint", "facts", "trained_s", "last"),
)
_NAME = re.compile(r"step-(\d{8})\.pt")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, foreign or of another shape. The message names file, rule and remedy."""


def folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def saved(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    place = folder(run)
    return sorted(p for p in place.iterdir() if _NAME.fullmatch(p.name)) if place.is_dir() else []


def save(run: Path, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as step-XXXXXXXX.pt (temporary file, fsync, rename), then delete all but the last `keep`.

    A crash at any moment leaves every finished checkpoint as it was.
    """
    place = folder(run)
    place.mkdir(parents=True, exist_ok=True)
    final = place / f"step-{state['step']:08d}.pt"
    with whole_file(final) as file:
        torch.save({"format": FORMAT, **state}, file)
    for old in saved(run)[:-keep]:
        old.unlink()
    return final


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU, tensors and plain values only. CheckpointError if it is not one of ours."""
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist; give a run folder or a .pt file of one")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums that it writes
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} holds more than tensors and plain values; only files written by fastsimclr are read"
            f" ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # damaged bytes can raise anything
        raise CheckpointError(
            f"checkpoint {path} ({path.stat().st_size} bytes) cannot be read: it is truncated, damaged or foreign"
            f" ({str(error).splitlines()[0] if str(error) else type(error).__name__}); delete it and resume from an"
            " earlier one in the same folder"
        ) from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"checkpoint {path} was not written by fastsimclr: it has no 'format' entry")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {state['format']}, this version reads {FORMAT}; use the one that wrote it"
        )
    missing = [key for key in _REQUIRED if key not in state]
    if missing:
        raise CheckpointError(
            f"checkpoint {path} lacks {', '.join(missing)}; it is not a complete fastsimclr checkpoint"
        )
    return state


def newest(run: Path) -> Path:
    """The last checkpoint of a run folder, or the file itself if `run` is one. CheckpointError if there is none."""
    if run.is_file():
        return run
    if not run.is_dir():
        raise CheckpointError(f"run folder {run} does not exist; give the folder that --out of an earlier stage named")
    paths = saved(run)
    if not paths:
        raise CheckpointError(f"run folder {run} holds no checkpoint under {folder(run)}; run the earlier stage first")
    return paths[-1]
