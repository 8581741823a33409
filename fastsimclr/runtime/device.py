"""The device and the number format, decided once at the top of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
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

    def to_device(self, module: nn.Module) -> nn.Module:
        """Move to the device, channels-last where asked for, and to float64 under fp64."""
        module = module.to(self.device, torch.float64 if self.precision == "fp64" else None)
        return module.to(memory_format=torch.channels_last) if self.channels_last else module

    @property
    def pins(self) -> bool:
        """Whether copies to the device start from pinned memory; else the device reads the host's memory itself."""
        return self.device.type == "cuda"

    @property
    def cuts(self) -> bool:
        """Whether a loader is to cut the crops, as there is no GPU that does it faster."""
        return self.device.type == "cpu"

    @property
    def captures(self) -> bool:
        """Whether the device runs CUDA graphs."""
        return self.device.type == "cuda"

    def side_stream(self) -> SideStream:
        """A stream of its own for a thread that copies to the device while another computes there."""
        return SideStream(self.device)

    def name(self) -> str:
        """The device in words, for result files."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{processor()}, {torch.get_num_threads()} threads"


class SideStream:
    """A stream for work beside that of the current stream; on a CPU, which has none, nothing changes."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def claim_thread(self) -> None:
        """Make its device the current one of the calling thread; each thread has its own."""
        if self._stream is not None:
            torch.cuda.set_device(self._stream.device)

    def current(self) -> contextlib.AbstractContextManager[object]:
        """The context in which it is the current stream of the thread."""
        return torch.cuda.stream(self._stream)

    def mark(self) -> Mark | None:
        """The point that the work has reached; None where there is nothing to wait for."""
        return None if self._stream is None else Mark(event=self._stream.record_event())


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point in the work of a side stream."""

    event: torch.cuda.Event

    def wait(self, tensors: Iterable[torch.Tensor]) -> None:
        """Order the work of the current stream behind it; the host does not wait.

        The memory of `tensors`, which the side stream filled, is not given to others before that work is done.
        """
        stream = torch.cuda.current_stream()
        stream.wait_event(self.event)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(stream)


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
