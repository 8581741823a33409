"""Where the tensors of a network lie, as a table on the device that both launches of LARS read.

A row a tensor: addresses of w, g, v and copy, length, first chunk, blocks a chunk, kinds of g and copy; then a row of
scalars: decay, l2, excluded, lr_scale; then the tensor of each chunk. What a launch may read is never written again.
"""

# T tensors, C chunks of them

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

BLOCK = 2048
"""Elements that a program works on at once."""
MAX_CHUNKS = 512
"""Chunks of one tensor at most, so that one load reads all its sums: a larger tensor has more blocks in each."""
WORDS = 8
"""Columns of a row."""
GRAD_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
COPY_KINDS = {None: 0, torch.float16: 1, torch.bfloat16: 2}
TABLES = 8
"""Tables kept. Gradients that are allocated anew each step often come back to the addresses of an earlier one."""
_CAPTURED: list[Tensor] = []
"""What CUDA graphs copy from at each replay; a graph does not say when it dies."""

Addresses = tuple[int, ...]
Scalars = tuple[tuple[float, ...], ...]
Fixed = tuple[Addresses, Addresses, Addresses, tuple[int, ...], tuple[int, ...], Scalars]
"""What stays from step to step: addresses of w, v and copies, lengths, kinds, scalars."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """tensors_T8: int64. scalars_T4: float32. chunks_C: int32. one, zero: float32, 0-dim. All on one device.

    aligned: every tensor starts at a multiple of 16 bytes.
    """

    tensors_T8: Tensor
    scalars_T4: Tensor
    chunks_C: Tensor
    one: Tensor
    zero: Tensor
    aligned: bool


def table(
    addresses: Sequence[Addresses],
    lengths: tuple[int, ...],
    kinds: tuple[int, ...],
    scalars: Scalars,
    device: torch.device,
) -> Table:
    """The table of these tensors on `device`, made at the first call for them and kept; the CPU waits for nothing.

    addresses: of w, g, v and copy (0 for none), each of T. kinds: GRAD_KINDS + 3 * COPY_KINDS. scalars: decay, l2,
    excluded and lr_scale, each of T. A table belongs to the stream it was copied on, in the order of which its memory
    is freed. While a CUDA graph is captured the copy becomes a part of the graph, its source stays for ever (about
    70 kB for a ResNet-50) and no kept table is taken: it could be dropped while the graph lives.
    """
    weights, grads, momenta, copies = addresses
    fixed = (weights, momenta, copies, lengths, kinds, scalars)
    if device.type != "cuda":
        return _kept(fixed, grads, device, 0)
    if torch.cuda.is_current_stream_capturing():
        made, source = _uploaded(fixed, grads, device)
        _CAPTURED.append(source)
        return made
    return _kept(fixed, grads, device, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=TABLES)
def _kept(fixed: Fixed, grads: Addresses, device: torch.device, stream: int) -> Table:
    return _uploaded(fixed, grads, device)[0]


def _uploaded(fixed: Fixed, grads: Addresses, device: torch.device) -> tuple[Table, Tensor]:
    """A new table, and the host's memory that it is copied from."""
    host, C = _layout(*fixed)
    T = len(grads)
    # A queued copy reads its source later: each table has its own, which torch reuses only after the copy.
    source = torch.empty_like(host, pin_memory=device.type == "cuda").copy_(host)
    rows_T8 = source[: T * WORDS].view(T, WORDS)
    rows_T8[:, 1] = torch.tensor(grads)
    words = source.to(device, non_blocking=True)
    ones = words[-2:].view(torch.float32)
    made = Table(
        tensors_T8=words[: T * WORDS].view(T, WORDS),
        scalars_T4=words[T * WORDS : T * (WORDS + 2)].view(torch.float32).view(T, 4),
        chunks_C=words[T * (WORDS + 2) : -2].view(torch.int32)[:C],
        one=ones[0],
        zero=ones[2],
        aligned=not bool((rows_T8[:, :4] % 16).any()),
    )
    return made, source


@lru_cache(maxsize=TABLES)
def _layout(
    weights: Addresses,
    momenta: Addresses,
    copies: Addresses,
    lengths: tuple[int, ...],
    kinds: tuple[int, ...],
    scalars: Scalars,
) -> tuple[Tensor, int]:
    """All words of a table but the gradients' addresses, on the host, and C."""
    T = len(weights)
    blocks = [max(1, -(-length // (BLOCK * MAX_CHUNKS))) for length in lengths]
    counts = [-(-length // (BLOCK * n)) for length, n in zip(lengths, blocks, strict=True)]
    firsts = list(accumulate(counts, initial=0))
    C = firsts.pop()
    columns = (weights, (0,) * T, momenta, copies, lengths, firsts, blocks, kinds)
    host = torch.zeros(T * (WORDS + 2) + (C + 1) // 2 + 2, dtype=torch.int64)
    host[: T * WORDS].view(T, WORDS).copy_(torch.tensor(columns).T)
    scalars_4T = torch.tensor(scalars, dtype=torch.float32)
    scalars_4T[0] *= scalars_4T[2] == 0  # what is excluded has no decay
    host[T * WORDS : T * (WORDS + 2)].view(torch.float32).view(T, 4).copy_(scalars_4T.T)
    tensor_C = torch.repeat_interleave(torch.arange(T), torch.tensor(counts))
    host[T * (WORDS + 2) : -2].view(torch.int32)[:C].copy_(tensor_C)
    host[-2:].view(torch.float32).copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    return host, C
