"""A Triton kernel that does nothing but exponentials: y = exp2(-exp2(-... x)), as often as asked, in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, TIMES, WARPS = 1024, 256, 4


@triton.jit  # type: ignore[untyped-decorator]
def _exponentials(x, y, TIMES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    for _ in range(TIMES):
        value = tl.exp2(-value)
    tl.store(y + at, value)


def exponentials(x: torch.Tensor, y: torch.Tensor) -> int:
    """Launch on float32 [n], n a multiple of BLOCK, x to y; how many exponentials that takes."""
    _exponentials[(x.numel() // BLOCK,)](x, y, TIMES=TIMES, BLOCK=BLOCK, num_warps=WARPS)
    return x.numel() * TIMES
