"""Published training speeds, the rates that follow from them, and what the model says of those it has not seen.

Fitted: NVIDIA's four MLPerf points give a, b and c of t = a·flops/peak + b·bytes/bandwidth + c·ops, the same for all
GPUs. One PyTorch point then gives the factor from MLPerf's code (fused, DALI, CUDA graphs) to PyTorch's. All others are
predicted: steps, and runs end to end, of which the model knows neither loader nor evaluations: it gives their bound.
"""

# views/s are those of one GPU: forward and backward passes of single crops

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from fastsimclr.models import ModelConfig
from fastsimclr.models.resnet import Arch
from fastsimclr.planning.estimate import StepPlan, counted_for, step_time
from fastsimclr.planning.hardware import GPUS, TPU_V3_CORE, Cluster, Gpu, PlanOptions
from fastsimclr.planning.rates import Rates, nonnegative
from fastsimclr.planning.work import Work
from fastsimclr.training.config import TrainerConfig

IMAGENET = 1_281_167
Role = Literal["fitted", "factor", "step", "end to end"]
Stack = Literal["MLPerf", "PyTorch"]


@dataclass(frozen=True)
class Point:
    """One published speed of ResNet-50 (or `arch`) training. batch: views of a GPU in a step.

    views_s: of a GPU. role: what it serves, or if predicted, what was timed.
    assumed: what its source does not say, or what else a reader must know. stack: whose code it resembles.
    simclr: two views, projection head and NT-Xent, else supervised.
    """

    name: str
    gpu: str
    gpus: int
    batch: int
    views_s: float
    role: Role
    assumed: str = ""
    _: KW_ONLY
    stack: Stack = "PyTorch"
    size: int = 224
    simclr: bool = False
    arch: Arch = "resnet50"


def _mlperf(name: str, gpu: str, gpus: int, batch: int, views_s: float, assumed: str = "") -> Point:
    return Point(name, gpu, gpus, batch, views_s, "fitted", assumed, stack="MLPerf")


def _simclr(
    name: str, gpu: str, gpus: int, batch: int, hours: float, assumed: str, *,
    epochs: float = 100, images: int = IMAGENET, **more: Any,
) -> Point:  # fmt: skip
    """A run of SimCLR end to end, from its hours for `epochs` of `images`. more: other fields of Point."""
    views_s = 2 * images * epochs / (hours * 3600) / gpus
    return Point(name, gpu, gpus, batch, views_s, "end to end", assumed, simclr=True, **more)


POINTS = (
    _mlperf("MLPerf 4.0, H100", "H100", 8, 400, 7_160),
    _mlperf("MLPerf 4.0, H200", "H200", 8, 400, 7_950, "batch as on the H100"),
    _mlperf("MLPerf 2.1, A100", "A100", 8, 400, 3_398, "batch as on the H100"),
    _mlperf("MLPerf, H100, 64 GPUs", "H100", 64, 50, 0.69 * 7_160, "69 % of 8 GPUs at the same global batch"),
    Point("DeepLearningExamples, A100", "A100", 1, 256, 2_470, "factor"),
    Point("DeepLearningExamples, 8 A100", "A100", 8, 256, 2_078, "step", "it waits for the GPU every step"),
    Point("timm, A100", "A100", 1, 256, 2_600, "step", "batch 256"),
    Point("FFCV, A100, 160 to 192 px", "A100", 8, 128, 3_040, "end to end", "176 px throughout, batch 128", size=176),
    _simclr(
        "Google, 32 TPU v3 cores", "TPU v3", 32, 256, 6, stack="MLPerf",
        assumed="cores, not chips (128 in 1.5 h are as many hours); batch 4,096",
    ),
    _simclr("FFCV-SSL, 8 A100", "A100", 8, 512, 12, "256 images a GPU"),
    _simclr(
        "FFCV-SSL, 8 A100, 160 to 224 px", "A100", 8, 512, 8.2, "192 px throughout, 256 images a GPU", size=192
    ),
    _simclr(
        "lightly, 2 RTX 4090", "RTX4090", 2, 256, 35 / 60, "evaluations are in its time; batch 256 in all", epochs=1
    ),
    _simclr(
        "lightly, CIFAR-10 ResNet-18, A6000", "A6000", 1, 1024, 87 / 60, "views made on the CPU",
        epochs=200, images=50_000, size=32, arch="resnet18",
    ),
)  # fmt: skip


def step_of(point: Point) -> StepPlan:
    """The step that was timed."""
    views = 2 if point.simclr else 1
    return StepPlan(
        model=ModelConfig(arch=point.arch, head_layers=2),
        size=point.size,
        stem_size=point.size,
        batch=point.batch // views * point.gpus,
        views=views,
        precision="bf16",
        layer=None if point.simclr else 0,
    )


def cluster_of(point: Point) -> Cluster:
    """The GPUs that were used, by data sheet."""
    per_node = 32 if point.gpu == "TPU v3" else 8
    return Cluster(device=GPUS.get(point.gpu, TPU_V3_CORE), gpus=point.gpus, gpus_per_node=per_node)


def predicted(point: Point) -> float:
    """views/s of a GPU that the model gives."""
    cluster = cluster_of(point)
    rates = prior(cluster.device, point.stack)
    trainer = TrainerConfig(bn_groups="global" if point.simclr else "rank")
    return point.batch / step_time(step_of(point), trainer, cluster, rates).seconds


@dataclass(frozen=True, kw_only=True)
class Law:
    """t = a·flops/peak + b·bytes/bandwidth + c·ops, by the data sheet's peak and bandwidth; c in seconds.

    That of MLPerf's code. pytorch: factor from there to PyTorch's.
    """

    a: float
    b: float
    c: float
    pytorch: float


@cache
def law() -> Law:
    """Fitted on POINTS, relative squared errors; see the module."""
    fitted = [point for point in POINTS if point.role == "fitted"]
    rows, targets = [], []
    for point in fitted:
        work, gpu, seconds = _work(point), GPUS[point.gpu], point.batch / point.views_s
        terms = (work.flops / (1e12 * gpu.peak_tflops), work.bytes / (1e12 * gpu.memory_tb_s), work.ops)
        rows.append([term / seconds for term in terms])
        targets.append(1.0)
    a, b, c = nonnegative(np.array(rows), np.array(targets))
    (point,) = (point for point in POINTS if point.role == "factor")
    bare = _scaled(Law(a=a, b=b, c=c, pytorch=1.0), GPUS[point.gpu]).seconds(_work(point))
    return Law(a=a, b=b, c=c, pytorch=point.batch / point.views_s / bare)


def _work(point: Point) -> Work:
    counted = counted_for(step_of(point), point.batch)
    return counted.forward + counted.backward


def _scaled(fitted_law: Law, gpu: Gpu) -> Rates:
    return Rates(
        s_per_flop=fitted_law.a / (1e12 * gpu.peak_tflops),
        s_per_byte=fitted_law.b / (1e12 * gpu.memory_tb_s),
        s_per_op=fitted_law.c,
        origin="fitted on NVIDIA's MLPerf points",
    )


def prior(gpu: Gpu, stack: Stack) -> Rates:
    """Rates of a GPU that nobody measured for us: the law at its data sheet, for MLPerf's code or PyTorch's."""
    rates, factor = _scaled(law(), gpu), law().pytorch
    if stack == "MLPerf":
        return rates
    origin = f"prior: {rates.origin}, times {factor:.2f} by DeepLearningExamples' PyTorch on one A100"
    return rates.times(factor, origin)


def prior_of(options: PlanOptions) -> Rates:
    """The prior of the options' GPU, or the one share of its peak that they give."""
    gpu = options.cluster.device
    if options.mfu is None:
        return prior(gpu, "PyTorch")
    return Rates(
        s_per_flop=1 / (options.mfu * 1e12 * gpu.peak_tflops),
        s_per_byte=0.0,
        s_per_op=0.0,
        origin=f"given: MFU {options.mfu:g}",
    )
