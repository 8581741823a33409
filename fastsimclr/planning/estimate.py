"""The time of a step on W ranks, and its memory.

t = max(t_compute, t_allreduce) + t_BN + t_gather, or the loader's time where that is longer. W ranks, P parameters:
gradients 2(W - 1)/W·4P bytes; embeddings (W - 1)/W·2B·d·2 bytes; each BN layer of G ranks one all-gather forward,
(G - 1)·8C bytes, and one all-reduce back, all waited for.
"""

# B images of the global batch, b of a rank, P parameters, C channels

from __future__ import annotations

import math
from dataclasses import dataclass

from fastsimclr.loaders.shards.cache import GIB
from fastsimclr.models import ModelConfig
from fastsimclr.planning.hardware import Cluster
from fastsimclr.planning.rates import Rates, lars_work, loss_work, momentum_work
from fastsimclr.planning.work import Counted, Work, count
from fastsimclr.training.config import TrainerConfig

HALF = ("bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One step of `images` over all ranks, in seconds. overlapped: whether the all-reduce runs beside the compute."""

    images: int
    compute_s: float
    all_reduce_s: float = 0.0
    norm_s: float = 0.0
    gather_s: float = 0.0
    input_s: float = 0.0
    overlapped: bool = True

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        both = (self.compute_s, self.all_reduce_s)
        return max((max(both) if self.overlapped else sum(both)) + self.norm_s + self.gather_s, self.input_s)

    @property
    def bound(self) -> str:
        """What takes longest: input, compute, all-reduce, or BN and gather."""
        if self.input_s >= self.seconds:
            return "input"
        parts = {
            "compute": self.compute_s,
            "all-reduce": self.all_reduce_s,
            "BN and gather": self.norm_s + self.gather_s,
        }
        return max(parts, key=lambda key: parts[key])


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU at the height of a step."""

    weights: float
    momentum: float
    gradients: float
    half_weights: float
    activations: float
    views: float
    loss: float
    workspace: float

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(getattr(self, key) for key in self.__dataclass_fields__))


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What a training step is made of. `views`: of an image. batch: images over all ranks. layer: as in count.

    teacher: work of a frozen teacher's forward pass of a rank. frozen: the encoder only runs forward, BN fixed.
    memory: keys in pretraining's queue; above 0 a momentum encoder makes them, in one forward pass more.
    """

    model: ModelConfig
    size: int
    stem_size: int
    batch: int
    views: int
    precision: str
    layer: int | None = None
    teacher: Work | None = None
    frozen: bool = False
    memory: int = 0


def shares_of(trainer: TrainerConfig, cluster: Cluster) -> int:
    """How many ranks take BN statistics together."""
    if isinstance(trainer.bn_groups, int):
        return max(1, math.ceil(cluster.gpus / trainer.bn_groups))
    if trainer.bn_groups == "rank":
        return 1
    return cluster.gpus if trainer.bn_groups == "global" else min(cluster.gpus, cluster.gpus_per_node)


def at_once(step: StepPlan, trainer: TrainerConfig, cluster: Cluster) -> tuple[int, int]:
    """(images that a rank takes through the network at once, how often a step does). ValueError where none fits."""
    if step.batch % cluster.gpus:
        raise ValueError(
            f"batch={step.batch} is not divisible by {cluster.gpus} GPUs;"
            f" use {max(step.batch - step.batch % cluster.gpus, cluster.gpus)}, or another number of GPUs"
        )
    share = step.batch // cluster.gpus
    # A loss of one view an image compares no images.
    micro = trainer.at_once(share, joint=step.views > 1, batch_name=f"batch={step.batch}")
    return micro, share // micro


def counted_for(step: StepPlan, images: int) -> Counted:
    """The network on `images` of a rank at once."""
    return count(
        step.model,
        size=step.size,
        views=max(2, step.views * images),
        precision=step.precision,
        stem_size=step.stem_size,
        layer=step.layer,
    )


def step_time(
    step: StepPlan, trainer: TrainerConfig, cluster: Cluster, rates: Rates, loader_images_s: float | None = None
) -> StepTime:
    """One training step. loader_images_s: of one machine; None: input is never waited for."""
    micro, passes = at_once(step, trainer, cluster)
    counted = counted_for(step, micro)
    world, share = cluster.gpus, micro * passes
    caching = passes > 1 and step.layer is None  # gradient caching embeds all first; other losses need not
    forwards = 1 + int(caching) + int(trainer.checkpoint_activations and not step.frozen) + int(step.memory > 0)
    work = counted.forward.times(forwards * passes)
    if not step.frozen:
        work += counted.backward.times(passes) + lars_work(counted)
    if step.teacher is not None:
        work += step.teacher
    gather = 0.0
    if step.layer is None:
        work += loss_work(share, step.batch, counted.dim, step.memory)
        if step.memory:
            work += momentum_work(counted)
        if world > 1:
            embeddings = 2.0 * step.batch * (counted.dim * 2 + 4)  # half a vector, and one number a row
            if step.memory:  # keys for the loss, keys for the queue
                embeddings = 2.0 * step.batch * counted.dim * (2 + 4)
            gather = _collectives(2, cluster.all_gather_bytes(embeddings, world), world, cluster)
    gradients = 0.0
    if world > 1 and not step.frozen:
        gradients = cluster.all_reduce_bytes(4.0 * counted.parameters, world) / cluster.bytes_per_s(world)
    return StepTime(
        images=step.batch,
        compute_s=rates.seconds(work),
        all_reduce_s=gradients,
        norm_s=0.0 if step.frozen else norm_s(counted, shares_of(trainer, cluster), forwards, cluster) * passes,
        gather_s=gather,
        input_s=0.0 if loader_images_s is None else step.batch / cluster.nodes / loader_images_s,
        overlapped=passes == 1,
    )


def norm_bytes(channels: int, ranks: int, cluster: Cluster) -> tuple[float, float]:
    """What BN receives of `ranks` that share it, mean and variance: an all-gather forward, an all-reduce back."""
    return (ranks - 1) * 8.0 * channels, cluster.all_reduce_bytes(8.0 * channels, ranks)


def norm_s(counted: Counted, ranks: int, forwards: int, cluster: Cluster) -> float:
    """Seconds that BN's exchanges take in `forwards` passes forward and one back."""
    if ranks == 1:
        return 0.0
    forward, back = norm_bytes(counted.channels, ranks, cluster)
    return _collectives((forwards + 1) * counted.norms, forwards * forward + back, ranks, cluster)


def _collectives(many: int, moved: float, ranks: int, cluster: Cluster) -> float:
    return many * cluster.collective_us * 1e-6 + moved / cluster.bytes_per_s(ranks)


def memory(step: StepPlan, trainer: TrainerConfig, cluster: Cluster, workspace_gib: float) -> Memory:
    """What one GPU holds. Gradients of two of the largest maps are there while the backward pass runs.

    The momentum encoder counts with the weights, its queue and the loss's copy of it with the loss; what it computes is
    gone before the network's own activations are there.
    """
    micro, passes = at_once(step, trainer, cluster)
    counted = counted_for(step, micro)
    element = 2 if step.precision in HALF else 4
    kept = counted.kept_bytes if trainer.checkpoint_activations else counted.saved_bytes
    rows = step.views * micro * passes
    gathered = step.views * step.batch * counted.dim * (element + 4) if step.layer is None else 0
    queue = step.memory * counted.dim * (4 + element)
    return Memory(
        weights=4.0 * counted.parameters * (2 if step.memory else 1),
        momentum=4.0 * counted.parameters,
        gradients=4.0 * counted.parameters,
        half_weights=2.0 * counted.parameters if step.precision in HALF else 0.0,
        activations=float(kept + 2 * counted.largest_bytes),
        views=3.0 * rows * step.size**2 * element,
        loss=float(gathered + queue),
        workspace=workspace_gib * GIB,
    )
