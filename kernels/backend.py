"""Which implementation of a kernel runs: the one that is asked for, or the fastest that the device has."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

Backend = Literal["auto", "fused", "reference"]
Implementation = Literal["fused", "reference"]

LOG = logging.getLogger("fastsimclr")
INSTALL = "pip install triton"
LEAST = (8, 0)
"""Compute capability: below, a block has too little shared memory for the kernels' tiles."""
HAS_TRITON = find_spec("triton") is not None  # looked up once: torch 2.11 cannot compile a step that looks it up


def choose(name: str, backend: Backend, device: torch.device) -> Implementation:
    """The implementation of `name` for tensors on `device`: fused (Triton) or reference (torch operations).

    "auto" is fused on CUDA from compute capability 8.0 where triton is installed, else reference. "fused" elsewhere
    needs Triton's interpreter, that is TRITON_INTERPRET=1 in the environment before triton is imported: for tests.
    Raises ValueError where a backend is unknown or asked for and not to be had.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r} is not available for {name}; use auto, fused or reference")
    if backend == "reference" or (backend == "auto" and device.type != "cuda"):
        return "reference"
    if not HAS_TRITON:
        if backend == "fused":
            raise ValueError(f"backend=fused needs triton for {name}, which is not installed; {INSTALL}")
        _say_once(f"{name}: triton is not installed, so the slower torch operations are used; {INSTALL}")
        return "reference"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST:
        if backend == "fused":
            raise ValueError(f"backend=fused needs compute capability {LEAST} for {name}, {device} has less; use auto")
        return "reference"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend=fused needs tensors on CUDA for {name}, these are on {device}; use backend=auto,"
            " or TRITON_INTERPRET=1 to run the kernels slowly in Triton's interpreter"
        )
    return "fused"


def chosen(name: str, device: torch.device) -> str:
    """What "auto" is for `name` on `device`, as result files name it: "nt_xent.fused"."""
    return f"{name}.{choose(name, 'auto', device)}"


@lru_cache
def _say_once(text: str) -> None:
    LOG.warning(text)
