"""Published training speeds, the rates that follow from them, and what the model says of those it has not seen.

Fitted: NVIDIA's four MLPerf points give a, b and c of t = a·flops/peak + b·bytes/bandwidth + c·ops, the same for all
GPUs. One PyTorch point then gives the factor from MLPerf's code (fused, DALI, CUDA graphs) to PyTorch's. All others are
predicted: steps, and runs end to end, of which the model knows neither loader nor evaluations: it gives their bound.
"""

# views/s are those of one GPU: forward and backward passes of single crops

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

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


@dataclass(frozen=True, kw_only=True)
class Point:
    """One published speed of ResNet-50 (or `arch`) training. batch: views of a GPU in a step.

    views_s: of a GPU. stack: whose code it resembles. role: what it serves, or if predicted, what was timed.
    simclr: two views, projection head and NT-Xent, else supervised.
    assumed: what its source does not say, or what else a reader must know.
    """

    name: str
    gpu: str
    gpus: int
    batch: int
    views_s: float
    stack: Stack
    role: Role
    size: int = 224
    simclr: bool = False
    arch: Arch = "resnet50"
    assumed: str = ""


def _of_hours(hours: float, gpus: int, epochs: float = 100, images: int = IMAGENET) -> float:
    return 2 * images * epochs / (hours * 3600) / gpus


POINTS = (
    Point(name="MLPerf 4.0, H100", gpu="H100", gpus=8, batch=400, views_s=7_160, stack="MLPerf", role="fitted"),
    Point(
        name="MLPerf 4.0, H200",
        gpu="H200",
        gpus=8,
        batch=400,
        views_s=7_950,
        stack="MLPerf",
        role="fitted",
        assumed="batch as on the H100",
    ),
    Point(
        name="MLPerf 2.1, A100",
        gpu="A100",
        gpus=8,
        batch=400,
        views_s=3_398,
        stack="MLPerf",
        role="fitted",
        assumed="batch as on the H100",
    ),
    Point(
        name="MLPerf, H100, 64 GPUs",
        gpu="H100",
        gpus=64,
        batch=50,
        views_s=0.69 * 7_160,
        stack="MLPerf",
        role="fitted",
        assumed="69 % of 8 GPUs at the same global batch",
    ),
    Point(
        name="DeepLearningExamples, A100",
        gpu="A100",
        gpus=1,
        batch=256,
        views_s=2_470,
        stack="PyTorch",
        role="factor",
    ),
    Point(
        name="DeepLearningExamples, 8 A100",
        gpu="A100",
        gpus=8,
        batch=256,
        views_s=2_078,
        stack="PyTorch",
        role="step",
        assumed="it waits for the GPU every step",
    ),
    Point(
        name="timm, A100",
        gpu="A100",
        gpus=1,
        batch=256,
        views_s=2_600,
        stack="PyTorch",
        role="step",
        assumed="batch 256",
    ),
    Point(
        name="FFCV, A100, 160 to 192 px",
        gpu="A100",
        gpus=8,
        batch=128,
        views_s=3_040,
        stack="PyTorch",
        role="end to end",
        size=176,
        assumed="176 px throughout, batch 128",
    ),
    Point(
        name="Google, 32 TPU v3 cores",
        gpu="TPU v3",
        gpus=32,
        batch=256,
        views_s=_of_hours(6, 32),
        stack="MLPerf",
        role="end to end",
        simclr=True,
        assumed="cores, not chips (128 in 1.5 h are as many hours); batch 4,096",
    ),
    Point(
        name="FFCV-SSL, 8 A100",
        gpu="A100",
        gpus=8,
        batch=512,
        views_s=_of_hours(12, 8),
        stack="PyTorch",
        role="end to end",
        simclr=True,
        assumed="256 images a GPU",
    ),
    Point(
        name="FFCV-SSL, 8 A100, 160 to 224 px",
        gpu="A100",
        gpus=8,
        batch=512,
        views_s=_of_hours(8.2, 8),
        stack="PyTorch",
        role="end to end",
        size=192,
        simclr=True,
        assumed="192 px throughout, 256 images a GPU",
    ),
    Point(
        name="lightly, 2 RTX 4090",
        gpu="RTX4090",
        gpus=2,
        batch=256,
        views_s=_of_hours(35 / 60, 2, epochs=1),
        stack="PyTorch",
        role="end to end",
        simclr=True,
        assumed="evaluations are in its time; batch 256 in all",
    ),
    Point(
        name="lightly, CIFAR-10 ResNet-18, A6000",
        gpu="A6000",
        gpus=1,
        batch=1024,
        views_s=_of_hours(87 / 60, 1, epochs=200, images=50_000),
        stack="PyTorch",
        role="end to end",
        size=32,
        simclr=True,
        arch="resnet18",
        assumed="views made on the CPU",
    ),
)


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
