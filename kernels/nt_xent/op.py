"""NT-Xent as two torch.library operators, forward and backward, that torch.compile and autocast take as they are."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from fastsimclr.kernels.gather import gather
from fastsimclr.kernels.nt_xent import reference
from fastsimclr.kernels.nt_xent.state import Inputs, State
from fastsimclr.kernels.precision import full_precision


def _implementation(name: str) -> ModuleType:
    if name == "reference":
        return reference
    from fastsimclr.kernels.nt_xent import fused  # triton may be absent

    return fused


def _group(name: str) -> dist.ProcessGroup | None:
    return _resolve_process_group(name) if name else None  # type: ignore[arg-type]


@torch.library.custom_op("fastsimclr::nt_xent", mutates_args=())
def nt_xent_op(
    x: Tensor,
    bank: Tensor | None,
    keys: Tensor | None,
    implementation: str,
    world: int,
    temperature: float,
    temperature_tensor: Tensor | None,
    weights: Tensor | None,
    factor: float,
    block_rows: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, top1, top5 and the six tensors of State. The arguments that their shapes depend on come first.

    keys: [2N, D] or None. world: number of ranks of the group. temperature counts where temperature_tensor is None.
    factor: on the loss. block_rows: 0 chooses. group: its name, "" for one process.
    Raises ValueError where a tensor's values, looked at on a CPU only, or the ranks' shapes are wrong.
    """
    ranks = _group(group)
    for tensor, name, rule in (
        (temperature_tensor, "temperature", "above 0"),
        (weights, "weights", "0 or more"),
    ):
        if tensor is not None and tensor.device.type == "cpu":
            good = tensor >= 0 if name == "weights" else tensor > 0
            if not bool(good.all()):
                bad = tensor.flatten()[~good.flatten()][0].item()
                raise ValueError(f"{name} holds {bad}, which is not {rule}; on a GPU, where nobody looks, it gives NaN")
    if ranks is not None:
        _check_ranks(x, ranks)
    if weights is not None and len(weights) < len(x):
        weights = weights.repeat(2)
    t = temperature if temperature_tensor is None else temperature_tensor
    run = _implementation(implementation).forward
    with full_precision(x.device):
        loss, top1, top5, state = run(Inputs(x, t, weights, bank, keys, factor, block_rows, ranks))
    return loss, top1, top5, *state


@nt_xent_op.register_fake
def _(
    x: Tensor, bank: Tensor | None, keys: Tensor | None, implementation: str, world: int, *_: Any
) -> tuple[Tensor, ...]:
    rows, images = x.shape[0] * world, x.shape[0]
    rank_rows = 0 if keys is None else images
    bank_rows = 0 if bank is None else bank.shape[0]
    single = torch.float64 if x.dtype == torch.float64 else torch.float32
    if implementation == "reference":
        z, columns = x.new_empty(rows + bank_rows + rank_rows, x.shape[1], dtype=single), rank_rows or rows
    else:
        from fastsimclr.kernels.nt_xent.layout import packed

        columns, width = packed(rows, bank_rows, x.shape[1], rank_rows)
        z = x.new_empty(columns, width, dtype=torch.float16)

    def new(*shape: Any, dtype: torch.dtype = single) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    accuracy = (new(dtype=torch.float32), new(dtype=torch.float32))
    return new(), *accuracy, z, new(images), new(columns), new(images), new(), new()


@torch.library.custom_op("fastsimclr::nt_xent_backward", mutates_args=())
def nt_xent_backward_op(
    upstream: Tensor,
    state: Sequence[Tensor],
    temperature_tensor: Tensor | None,
    dim: int,
    dtype: torch.dtype,
    bank_rows: int,
    keyed: bool,
    implementation: str,
    world: int,
    temperature: float,
    factor: float,
    block_rows: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    """dx [2N, D] of `dtype`, and dL/dt, 0 where the temperature is a number; other arguments as nt_xent_op's.

    state: the tensors of State. keyed: whether the forward had keys.
    """
    ranks, kept = _group(group), State(*state)
    first_column = 0 if ranks is None else dist.get_rank(ranks) * len(kept.inverse)
    t = temperature if temperature_tensor is None else temperature_tensor
    run = _implementation(implementation).backward
    if implementation == "reference":
        with full_precision(kept.z.device):
            dx, dt = run(upstream, kept, t, factor, block_rows, first_column, dtype, keyed)
    else:
        dx, dt = run(upstream, kept, t, factor, first_column, dtype, world, dim, bank_rows, keyed)
    return dx, dt


@nt_xent_backward_op.register_fake
def _(
    upstream: Tensor, state: Sequence[Tensor], heat: Tensor | None, dim: int, dtype: torch.dtype, *_: Any
) -> tuple[Tensor, Tensor]:
    inverse = State(*state).inverse
    return inverse.new_empty(inverse.shape[0], dim, dtype=dtype), inverse.new_empty(())


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, bank, keys, implementation, world, temperature, temperature_tensor, _, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:], temperature_tensor)
    shapes = x.shape[1], x.dtype, 0 if bank is None else bank.shape[0], keys is not None
    ctx.options = *shapes, implementation, world, temperature, *rest


def _gradient(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 11
    *state, heat = ctx.saved_tensors
    dx, dt = nt_xent_backward_op(upstream, state, heat, *ctx.options)
    return (dx, *(None,) * 5, None if heat is None else dt.to(heat.dtype), *(None,) * 4)


nt_xent_op.register_autograd(_gradient, setup_context=_remember)


_agreed: WeakKeyDictionary[dist.ProcessGroup, tuple[int, ...]] = WeakKeyDictionary()


def _check_ranks(x: Tensor, group: dist.ProcessGroup) -> None:
    """Compare the ranks' shapes, once and whenever this rank's changes: to read them waits for the device.

    A rank whose own shape stays does not ask, so ranks must change in the same step, as this project's loaders do.
    """
    width = 8 if x.dtype == torch.float64 else 4  # half precision is worked on in float32
    shape = (*x.shape, width)
    if _agreed.get(group) == shape:
        return
    for rank, other in enumerate(gather(torch.tensor(shape, device=x.device), group).tolist()):
        if tuple(other) != shape:
            mine = dist.get_rank(group)
            raise ValueError(
                f"rank {mine} has projections of shape {list(shape[:2])} and {shape[2]} bytes a value, rank {rank} of"
                f" {other[:2]} and {other[2]}; give every rank the same number of images, and the same network"
            )
    _agreed[group] = shape
