"""Batch normalisation for feature maps and vectors, over the whole global batch or over groups of its images.

y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var of all values of a channel in one group. Statistics over
groups are computed in norm_functions.py.
"""

# N images of a rank, C channels, H height, W width

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastsimclr.kernels.batch_norm import batch_norm
from fastsimclr.kernels.gather import gather
from fastsimclr.models.batch_groups import BatchGroups
from fastsimclr.models.norm_functions import NormInGroups, NormOfOneGroupOnCuda, Running

_micro_batch: tuple[int, int] | None = (0, 1)  # which of how many is normalised; None: one that leaves no trace


@contextlib.contextmanager
def statistics_of(micro_batch: int | None, micro_batches: int = 1) -> Iterator[None]:
    """Within it, BatchNorm normalises micro-batch `micro_batch` of `micro_batches` of one step; None: without a trace.

    After all of them in turn the running statistics are what the mean of the micro-batches' statistics would have made
    of them: with momentum m, micro-batch j of k = 0 .. k - 1 enters with (m / k) / (1 - (k - 1 - j) m / k). No trace is
    for a forward pass of which there is another: gradient caching and activation checkpointing.
    """
    global _micro_batch
    before, _micro_batch = _micro_batch, None if micro_batch is None else (micro_batch, micro_batches)
    try:
        yield
    finally:
        _micro_batch = before


def set_groups(network: nn.Module, groups: BatchGroups | None) -> None:
    """Let every BatchNorm of `network` take its training statistics over `groups`; None: over the batch that it sees.

    Evaluation mode always uses the running statistics and exchanges nothing.
    """
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.groups = groups


def set_fused(network: nn.Module, on: bool) -> None:
    """Let every BatchNorm of `network` train by the fused kernels, where its groups do not cut a rank's batch."""
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.fused = on


def average_running_statistics(network: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Average the running statistics over the ranks, in place: a rank tracks those of its own images' groups only.

    They are linear in each step's statistics, so it is enough to call this, on all ranks, before they are used or
    saved. The result is that of one process with the same groups; where all ranks have the same, it stays to the bit.
    group: all ranks; None changes nothing. One collective.
    """
    buffers = [
        buffer
        for module in network.modules()
        if isinstance(module, BatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if group is None or not buffers:
        return
    first, *_ = every = gather(torch.cat(buffers), group)
    average = first + (every - first).mean(0)
    for buffer, mean in zip(buffers, torch.split(average, [len(buffer) for buffer in buffers]), strict=True):
        buffer.copy_(mean)


class BatchNorm(_BatchNorm):
    """y = (x - mean) / sqrt(var + 1e-5) * weight + bias over [N, C] or [N, C, H, W]; momentum 0.1 (Google's decay .9).

    One module serves the encoder and the heads, one process and many, the CPU and CUDA. Statistics and parameters stay
    float32 under autocast, the output has the input's dtype and memory format. State names are torch's, so torch's and
    torchvision's states load. With `groups` (see set_groups) the running statistics follow the mean over the groups of
    their means and unbiased variances (Bessel's correction as torch's; Google's code takes the biased variance).

    channels: C. bias: False leaves out the shift (last layer of the projection head). zero_gamma: the weight starts
    at 0, so that a residual block starts as its shortcut (Goyal et al. 2017, arXiv 1706.02677, section 5.1).
    Raises ValueError for an input of another rank and, in training, for one value per channel and group, and for a
    batch that the groups do not divide. See statistics_of for passes that belong together.
    """

    groups: BatchGroups | None
    fused: bool

    def __init__(self, channels: int, *, bias: bool = True, zero_gamma: bool = False) -> None:
        super().__init__(channels, eps=1e-5, momentum=0.1)
        self.groups, self.fused = None, False
        if not bias:
            self.register_parameter("bias", None)
        if zero_gamma:
            nn.init.zeros_(self.weight)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"BatchNorm takes [N, C] or [N, C, H, W], not {list(input.shape)}; reshape the input")

    def forward(self, input: Tensor) -> Tensor:
        """[N, C] or [N, C, H, W], of the same shape on all ranks -> the same."""
        groups = self.groups
        if not self.training:
            return super().forward(input)
        if self._fuses:
            return self._by_kernels(input, None, relu=False)
        self._check_input_dim(input)
        factor = self._counted()
        if groups is None or groups.plain:
            # With a factor of 0 they stay; left out, the backward pass would keep other tensors than without.
            statistics = self.running_mean, self.running_var
            return F.batch_norm(input, *statistics, self.weight, self.bias, True, factor, self.eps)
        native = groups.aligned and input.is_cuda
        normalise = NormOfOneGroupOnCuda if native else NormInGroups
        assert self.running_mean is not None and self.running_var is not None
        running = Running(self.running_mean, self.running_var, factor)
        y: Tensor = normalise.apply(input, self.weight, self.bias, running, self.eps, groups)
        return y

    def with_relu(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """relu(self(input) + residual): what follows BN in a residual block. residual: of input's shape and dtype."""
        if self.training and self._fuses:
            return self._by_kernels(input, residual, relu=True)
        y: Tensor = self(input)
        if residual is not None:
            y += residual
        return F.relu(y, inplace=True)

    @property
    def _fuses(self) -> bool:
        return self.fused and (self.groups is None or self.groups.aligned)

    def _by_kernels(self, input: Tensor, residual: Tensor | None, *, relu: bool) -> Tensor:
        self._check_input_dim(input)
        factor = self._counted()
        assert self.running_mean is not None and self.running_var is not None
        return batch_norm(
            input,
            self.weight,
            self.bias,
            residual=residual,
            relu=relu,
            running=None if _micro_batch is None else (self.running_mean, self.running_var),
            factor=factor,
            eps=self.eps,
            group=None if self.groups is None else self.groups.exchange,
            backend="fused",
        )

    def _counted(self) -> float:
        """Count this batch; how far the running statistics move towards its own."""
        if _micro_batch is None:
            return 0.0
        assert self.num_batches_tracked is not None
        index, count = _micro_batch
        self.num_batches_tracked.add_(int(index == 0))
        share = (1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum) / count
        return share / (1 - (count - 1 - index) * share)
