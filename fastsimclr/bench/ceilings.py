"""What the device can do at most, measured: bytes copied, multiply-adds and exponentials a second.

A roofline is the time that a piece of work takes at these rates and with nothing else to do.
"""

# M rows, D dimensions

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch

_ROUNDS = 5  # the best of them is the ceiling


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """copy_bytes: read plus written, a second. matmul_flops: of `matmul`, two for a multiply-add. exps: a second.

    exps is None where Triton is missing on CUDA. overlap: whether products and exponentials run on units of their own.
    """

    copy_bytes: float
    matmul_flops: float
    matmul: str
    exps: float | None
    overlap: bool

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of each rate in two measurements of one device."""
        exps = None if self.exps is None or other.exps is None else max(self.exps, other.exps)
        copy, matmul = max(self.copy_bytes, other.copy_bytes), max(self.matmul_flops, other.matmul_flops)
        return replace(self, copy_bytes=copy, matmul_flops=matmul, exps=exps)

    def words(self) -> str:
        """One line for a report."""
        exps = "exponentials not measured (no triton)" if self.exps is None else f"{self.exps / 1e9:,.1f} G exp/s"
        return f"copy {self.copy_bytes / 1e9:,.1f} GB/s, {self.matmul} {self.matmul_flops / 1e12:,.2f} TFLOP/s, {exps}"

    def loss_s(self, m: int, d: int) -> tuple[float, str]:
        """Seconds of NT-Xent forward and backward over all M x M similarities, and the reckoning in words.

        Forward: 2 M^2 D operations and M^2 exponentials; backward: 4 M^2 D and M^2 again, as tiles are recomputed.
        Tensor cores and the units for exponentials work at the same time, so that the dearer of the two counts. On a
        CPU they are the same units, so that both count; and as s_ij = s_ji, half the similarities of a pass will do.
        """
        exps = m * m / self.exps if self.exps else 0.0
        forward, backward = 2 * m * m * d / self.matmul_flops, 4 * m * m * d / self.matmul_flops
        if self.overlap:
            words = "forward 2 M^2 D operations or M^2 exponentials, backward 4 M^2 D or M^2, the dearer of each"
            return max(forward, exps) + max(backward, exps), words
        words = "forward M^2 D operations and M^2 / 2 exponentials, backward 3 M^2 D and M^2 / 2"
        return forward / 2 + backward * 3 / 4 + exps, words

    def bytes_s(self, count: float) -> float:
        """Seconds to read and write `count` bytes in all."""
        return count / self.copy_bytes


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure for about a second. On CUDA: 1 GiB copied, fp16 products of 8192; on a CPU 64 MiB, float32 of 1024."""
    cuda = device.type == "cuda"
    source = torch.ones(2**30 if cuda else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / _best(lambda: target.copy_(source), device)
    return Ceilings(
        copy_bytes=copied,
        matmul_flops=product_flops(device, torch.float16 if cuda else torch.float32),
        matmul=f"{'fp16' if cuda else 'float32'} product of {_side(device)}",
        exps=_exps(device),
        overlap=cuda,
    )


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product, two for a multiply-add: of 8192 on CUDA, of 1024 on a CPU."""
    side, calls = _side(device), 5 if device.type == "cuda" else 1
    a = torch.randn((side, side), device=device, dtype=dtype)
    out = torch.empty_like(a)
    return 2 * side**3 / _best(lambda: torch.mm(a, a, out=out), device, calls)


def _side(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 1024


def _exps(device: torch.device) -> float | None:
    if device.type != "cuda":
        x = torch.rand(2**16)  # stays in a core's cache
        y = torch.empty_like(x)
        return x.numel() / _best(lambda: torch.exp(x, out=y), device, calls=100)
    if find_spec("triton") is None:
        return None
    from fastsimclr.bench.exp_rate import exponentials

    x = torch.rand(2**24, device=device)
    y = torch.empty_like(x)
    return exponentials(x, y) / _best(lambda: exponentials(x, y), device)


def _best(call: Callable[[], object], device: torch.device, calls: int = 5) -> float:
    """Seconds of one call, the least of several rounds of `calls`."""
    call()
    times = []
    for _ in range(_ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return min(times)
