"""The device and the number format, decided once at the top of a run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from fastsimclr.distributed.ranks import Ranks
from fastsimclr.distributed.torchrun import Launch, launched
from fastsimclr.runtime.environment import processor

Precision = Literal["fp64", "fp32", "bf16", "fp16"]
_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and in which precision everything runs. `precision` is autocast's, weights stay float32; fp64 is theirs."""

    device: torch.device
    precision: Precision
    channels_last: bool = True
    ranks: Ranks = field(default_factory=Ranks)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Autocast to the precision; nothing under fp32 and fp64."""
        if self.precision in ("fp32", "fp64"):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])

    @property
    def view_dtype(self) -> torch.dtype:
        """The dtype in which views reach the network."""
        return _DTYPES[self.precision]

    def place(self, module: nn.Module) -> nn.Module:
        """Move to the device, channels-last where asked for, and to float64 under fp64."""
        module = module.to(self.device, torch.float64 if self.precision == "fp64" else None)
        return module.to(memory_format=torch.channels_last) if self.channels_last else module

    def name(self) -> str:
        """The device in words, for result files."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{processor()}, {torch.get_num_threads()} threads"


def choose_runtime(
    device: str,
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"],
    channels_last: bool,
    timeout_s: float = 600.0,
) -> Runtime:
    """Resolve "auto" for device and precision, and join the other ranks where torchrun started several.

    device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N"; of several ranks each takes the CUDA device of
    its local rank. precision "auto": bf16 on a CUDA device and on a CPU with instructions for it (AMX or
    AVX-512 BF16), fp32 elsewhere. timeout_s: how long a rank waits for the others.
    ValueError for a device that this machine lacks.
    """
    launch = launched()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r} is not supported; use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise ValueError(
            f"device={device!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here;"
            " use --device cpu, or install a CUDA build of torch and a driver"
        )
    if chosen.type == "cuda":
        chosen = torch.device("cuda", _index(launch, chosen.index))
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True  # all steps of a run have the same shapes
        native_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native_bf16 = bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    if precision == "auto":
        precision = "bf16" if native_bf16 else "fp32"
    ranks = launch.connect("nccl" if chosen.type == "cuda" else "gloo", timeout_s)
    return Runtime(device=chosen, precision=precision, channels_last=channels_last, ranks=ranks)


def _index(launch: Launch, asked: int | None) -> int:
    if launch.store is None:
        return torch.cuda.current_device() if asked is None else asked
    here = launch.ranks.local_world
    if asked is not None:
        raise ValueError(f"device=cuda:{asked} names one device for {here} ranks; use cuda, each rank takes its own")
    if here > torch.cuda.device_count():
        raise ValueError(
            f"{here} ranks on {launch.host}, which has {torch.cuda.device_count()} CUDA devices; use"
            f" --nproc-per-node {torch.cuda.device_count()}, or --device cpu"
        )
    return launch.ranks.local_rank
