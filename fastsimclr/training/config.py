"""The settings of the training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastsimclr.distributed.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The loop: precision, logging and checkpoints."""

    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision; weights stay float32. auto: bf16 on CUDA and on CPUs with AMX or AVX-512 BF16, else fp32.
    fp16 adds a loss scaler: a step whose gradients overflow changes no trained weight. With sgd it waits for the device
    once a step. fp64 trains double weights: slow, to compare two runs exactly."""
    channels_last: bool = True
    """Keep activations and convolution weights channels-last."""
    log_every_steps: int = 20
    """Steps between two records in metrics.jsonl; the only time the loop reads numbers from the device."""
    checkpoint_every_steps: int = 500
    """Steps between two checkpoints. One more is always written at the end and on a clean stop."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    bn_groups: Literal["global", "node", "rank"] | int = "node"
    """Which images of the global batch share BN statistics in training: all of them (global), those of one machine
    (node), those of one rank (rank), or that many equal parts of the batch. A resumed run keeps its number of parts."""
    micro_batch: int | None = None
    """Images that a rank takes through the network at once; null, or as many as its share of the batch and more: all of
    it. A divisor of the share; where the loss does not compare images, the largest up to this. The gradient stays that
    of the whole batch: where it does compare them, for one forward pass more (gradient caching). BN sees a micro-batch
    of all ranks instead of the batch, which bn_groups then divides."""
    checkpoint_activations: bool = False
    """Keep what enters each residual block only, and compute the rest again in the backward pass: less memory, for a
    third more time."""
    compile: bool = False
    """Compile the encoder by torch.compile, which takes a minute or more at the start. Excludes micro_batch."""
    cuda_graph: bool = False
    """On one CUDA device: replay forward and backward pass as a graph, for networks that launching slows down. Excludes
    micro_batch and pretrain.memory."""
    fused_bn: bool = False
    """CUDA only: train BN, the sum with the shortcut and ReLU by Triton kernels, where bn_groups does not cut a rank's
    batch. Not measured on a GPU yet, so off."""
    bucket_mb: int = 25
    """MiB of gradients that several ranks average in one all-reduce, which runs beside the backward pass."""
    timeout_s: float = 600.0
    """Seconds that a rank waits for the others in one exchange before the run fails."""

    def __post_init__(self) -> None:
        for key in ("log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "bucket_mb", "micro_batch"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"trainer.{key}={getattr(self, key)} must be at least 1")
        if isinstance(self.bn_groups, int) and self.bn_groups < 1:
            raise ValueError(f"trainer.bn_groups={self.bn_groups} must be global, node, rank or at least 1")
        for key in ("compile", "cuda_graph"):
            if self.micro_batch is not None and getattr(self, key):
                raise ValueError(
                    f"trainer.{key}=True is for a whole batch at once, not for"
                    f" trainer.micro_batch={self.micro_batch}; leave one of them out"
                )
        if self.compile and self.checkpoint_activations:
            raise ValueError(
                "trainer.compile=True and trainer.checkpoint_activations=True exclude each other; leave one of them out"
            )
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"trainer.timeout_s={self.timeout_s} must be greater than 0 and finite")

    def at_once(self, share: int, *, joint: bool, batch_name: str) -> int:
        """Images that a rank takes through the network at once, of its `share` of the batch; share itself: all of it.

        joint: whether the loss compares images; where it does not, the largest divisor up to micro_batch is taken.
        batch_name: the batch in the error, e.g. "pretrain.batch=512". ValueError where micro_batch does not divide it.
        """
        micro = min(self.micro_batch or share, share)
        if not joint:
            micro = max(size for size in range(1, micro + 1) if share % size == 0)
        if share % micro:
            raise ValueError(
                f"trainer.micro_batch={micro} does not divide the {share} images that a rank has of {batch_name};"
                f" use a divisor of {share}"
            )
        return micro


def bn_groups(config: TrainerConfig, ranks: Ranks) -> int:
    """In how many parts of the global batch BN takes its statistics."""
    if isinstance(config.bn_groups, int):
        return config.bn_groups
    return {"global": 1, "node": ranks.hosts, "rank": ranks.world}[config.bn_groups]
