"""What a step costs, counted on the network itself on the meta device, which has shapes and no numbers.

Operations are counted as PyTorch runs them one by one, forward and backward: two FLOPs for a multiply-add of
convolutions and matrix products; bytes that each operation reads and writes, as if nothing stayed in a cache and
nothing were fused.
"""

# N views, S side

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastsimclr.models import BatchNorm, ModelConfig, ResNet, build_classifier, build_simclr, count_parameters

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Work:
    """flops: two for a multiply-add. bytes: read and written. ops: operations, each some launch."""

    flops: float = 0.0
    bytes: float = 0.0
    ops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(flops=self.flops + other.flops, bytes=self.bytes + other.bytes, ops=self.ops + other.ops)

    def times(self, factor: float) -> Work:
        """As much work `factor` times."""
        return Work(flops=factor * self.flops, bytes=factor * self.bytes, ops=factor * self.ops)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """One pass of N views forward, and one backward.

    saved_bytes: what the forward pass keeps for the backward pass, parameters apart. kept_bytes: the same where the
    residual blocks are computed again: what enters each, and the largest block. largest_bytes: of what is kept, the
    largest map. norms, channels: BN layers and their channels, of encoder and head. dim: features that come out.
    """

    forward: Work
    backward: Work
    parameters: int
    saved_bytes: int
    kept_bytes: int
    largest_bytes: int
    norms: int
    channels: int
    dim: int


@lru_cache(maxsize=256)
def count(
    model: ModelConfig, *, size: int, views: int, precision: str, stem_size: int, layer: int | None = None
) -> Counted:
    """Count `views` views of `size` pixels through encoder and projection head, in training.

    layer: instead of the head, a classifier of 1,000 classes on that layer of it. stem_size: size that the network is
    built for. precision: of the activations; bf16, fp16, fp32 or fp64. Raises ValueError for fewer than two views.
    """
    if views < 2:
        raise ValueError(f"views={views} of a pass leave BN without a variance; give 2 or more")
    with torch.device("meta"):
        network = _built(model, stem_size, layer).to(DTYPES[precision])
        images = torch.empty(views, 3, size, size, dtype=DTYPES[precision], memory_format=torch.channels_last)
    keeping = _Keeping(network)
    with keeping, _Tally() as forward:
        out = network(images)
    last = out[1] if isinstance(out, tuple) else out
    with _Tally() as backward:
        last.backward(torch.empty_like(last))
    norms, channels = count_norms(network)
    return Counted(
        forward=forward.work,
        backward=backward.work,
        parameters=count_parameters(network),
        saved_bytes=keeping.saved,
        kept_bytes=keeping.kept,
        largest_bytes=keeping.largest,
        norms=norms,
        channels=channels,
        dim=last.shape[1],
    )


def count_norms(network: nn.Module) -> tuple[int, int]:
    """BN layers of `network`, and their channels in all."""
    channels = [module.num_features for module in network.modules() if isinstance(module, BatchNorm)]
    return len(channels), sum(channels)


def _built(model: ModelConfig, stem_size: int, layer: int | None) -> nn.Module:
    return build_simclr(model, stem_size) if layer is None else build_classifier(model, stem_size, 1000, layer)


class _Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the work of every operation that runs within."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        moved = sum(_bytes(tensor) for tensor in (*_tensors(args), *_tensors(kwargs or {}), *_tensors(out)))
        self.work += Work(flops=float(flops), bytes=float(moved), ops=1.0)
        return out


class _Keeping:
    """What a forward pass saves for the backward pass, by residual block."""

    def __init__(self, network: nn.Module) -> None:
        self._seen = {id_of(parameter) for parameter in network.parameters()}
        self._alive: list[Tensor] = []  # an address must not be given to another tensor
        self._blocks: dict[nn.Module | None, int] = {None: 0}
        self._entering = 0
        self._within: nn.Module | None = None
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.largest = 0
        for encoder in (module for module in network.modules() if isinstance(module, ResNet)):
            for group in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
                for block in group:
                    block.register_forward_pre_hook(self._enter)
                    block.register_forward_hook(self._leave)

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._alive.clear()

    @property
    def saved(self) -> int:
        return sum(self._blocks.values())

    @property
    def kept(self) -> int:
        return self._blocks[None] + self._entering + max(self._blocks.values())

    def _enter(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._within = block
        self._blocks[block] = 0
        self._entering += _bytes(inputs[0])

    def _leave(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self._within = None

    def _pack(self, tensor: Tensor) -> Tensor:
        key = id_of(tensor)
        if key not in self._seen:
            self._seen.add(key)
            self._alive.append(tensor.detach())
            size = tensor.untyped_storage().nbytes()
            self._blocks[self._within] += size
            self.largest = max(self.largest, size)
        return tensor.detach()


def id_of(tensor: Tensor) -> int:
    """What tells the memory of one tensor from that of another, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = tuple(values.values())
    return [tensor for value in values for tensor in _tensors(value)] if isinstance(values, list | tuple) else []


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
