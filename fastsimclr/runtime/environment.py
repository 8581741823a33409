"""What a result was measured on: processor, versions and commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import fastsimclr

if TYPE_CHECKING:
    from fastsimclr.runtime.device import Runtime


def processor() -> str:
    """The CPU in words."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment(runtime: Runtime) -> dict[str, object]:
    """Device, versions and commit: what every result file and benchmark carries."""
    return {
        "device": runtime.name(),
        "precision": runtime.precision,
        "channels_last": runtime.channels_last,
        "threads": torch.get_num_threads(),
        "ranks": runtime.ranks.world,
        "hosts": runtime.ranks.hosts,
        "fastsimclr": fastsimclr.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if runtime.device.type == "cuda" else None,
        "commit": commit(),
    }


def commit() -> str | None:
    """The git commit of the checkout that this package runs from, "+dirty" if changed; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        sha = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return None
    if sha.returncode != 0:
        return None
    return sha.stdout.strip() + ("+dirty" if status.stdout.strip() else "")
