"""The machine under a bench: processor, GPU, driver and libraries, and the clocks at which the GPU runs."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fastsimclr.loaders import thread_count
from fastsimclr.runtime.environment import processor

_CLOCKS = (
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
_PACKAGES = ("torchvision", "triton", "lightly", "pillow", "simplejpeg")


def machine(device: torch.device) -> dict[str, Any]:
    """What does not change while a bench runs. cores: of the machine, and those that this process may use."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": processor(),
        "cores": [os.cpu_count(), thread_count(0)],
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    if device.type == "cuda":
        found["driver"] = (_smi(device, ("driver_version",)) or {}).get("driver_version")
        found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        if torch.distributed.is_nccl_available():
            found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
        found["capability"] = list(torch.cuda.get_device_capability(device))
    return found


def clocks(device: torch.device) -> dict[str, str] | None:
    """Clocks, power and temperature of the GPU at this moment, as nvidia-smi tells them; None without it."""
    return _smi(device, _CLOCKS) if device.type == "cuda" else None


def _smi(device: torch.device, keys: tuple[str, ...]) -> dict[str, str] | None:
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # its index may be another than torch's
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", "-i", uuid]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in said.strip().split(",")]
    return dict(zip(keys, values, strict=True)) if len(values) == len(keys) else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
