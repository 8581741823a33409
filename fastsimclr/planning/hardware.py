"""GPUs by their data sheets, and how many of them are joined how."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

GpuName = Literal["A100", "H100", "H200", "RTX4090", "A6000"]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """peak_tflops: dense, bf16 with float32 sums. memory_tb_s: of its memory, 10^12 bytes a second. memory_gib: size.

    link_gb_s: 10^9 bytes a second that it sends to the other GPUs of its machine; network_gb_s: to other machines.
    """

    peak_tflops: float
    memory_tb_s: float
    memory_gib: float
    link_gb_s: float
    network_gb_s: float


GPUS: dict[str, Gpu] = {
    # SXM, 80 GB; NVLink 3, 4 and 4; DGX: one 200 (A100) or 400 Gbit/s adapter a GPU.
    "A100": Gpu(peak_tflops=312, memory_tb_s=2.039, memory_gib=80, link_gb_s=300, network_gb_s=25),
    "H100": Gpu(peak_tflops=989, memory_tb_s=3.35, memory_gib=80, link_gb_s=450, network_gb_s=50),
    "H200": Gpu(peak_tflops=989, memory_tb_s=4.8, memory_gib=141, link_gb_s=450, network_gb_s=50),
    # PCIe 4 x16; 100 Gbit/s for all GPUs of a machine of eight.
    "RTX4090": Gpu(peak_tflops=165, memory_tb_s=1.008, memory_gib=24, link_gb_s=25, network_gb_s=1.5),
    "A6000": Gpu(peak_tflops=155, memory_tb_s=0.768, memory_gib=48, link_gb_s=25, network_gb_s=1.5),
}
"""By data sheet. The H100's measured matrix products reach 798 TFLOP/s, 81 % of its peak."""

TPU_V3_CORE = Gpu(peak_tflops=61.5, memory_tb_s=0.45, memory_gib=16, link_gb_s=70, network_gb_s=70)
"""Half of a TPU v3 chip, for the published points alone."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs and what joins them. Raises ValueError where a number is not positive."""

    device: Gpu = field(default_factory=lambda: GPUS["H100"])
    gpus: int = 1
    gpus_per_node: int = 8
    ring_efficiency: float = 0.8
    collective_us: float = 30.0

    @property
    def nodes(self) -> int:
        """Machines, the last one perhaps not full."""
        return math.ceil(self.gpus / self.gpus_per_node)

    def bytes_per_s(self, ranks: int) -> float:
        """What a ring of `ranks` GPUs moves past each: by links within a machine, else by its adapters together."""
        device = self.device
        across = min(device.link_gb_s, device.network_gb_s * self.gpus_per_node)
        return 1e9 * self.ring_efficiency * (device.link_gb_s if ranks <= self.gpus_per_node else across)

    def all_reduce_bytes(self, payload: float, ranks: int) -> float:
        """Bytes that a rank sends in an all-reduce of `payload` bytes: 2(W - 1)/W of them."""
        return 2 * (ranks - 1) / ranks * payload

    def all_gather_bytes(self, payload: float, ranks: int) -> float:
        """Bytes that a rank receives in an all-gather that ends with `payload` bytes: (W - 1)/W of them."""
        return (ranks - 1) / ranks * payload


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a plan is made for. Every assumption has its key. Raises ValueError where a number is not positive."""

    gpus: int = 8
    """W, GPUs in all; one rank each."""
    gpu: GpuName = "H100"
    """Which; its data sheet gives the five rates below where they are not set."""
    gpus_per_node: int = 8
    """GPUs of one machine."""
    images: int | None = None
    """Training images; null: those of the data set, ImageNet's 1,281,167 for folders and shards."""
    labelled: int | None = None
    """Labelled training images of the data set; null: those of the data set, all for folders and shards."""
    few: int | None = None
    """Images of the few-label stages; null: as data.label_fraction or data.labels_per_class say, 1 % of a list."""
    mfu: float | None = None
    """Share of peak_tflops that the network reaches, instead of the rates that were fitted on published points."""
    peak_tflops: float | None = None
    """Dense TFLOP/s of the recipe's precision."""
    memory_tb_s: float | None = None
    """Memory bandwidth of a GPU, 10^12 bytes a second."""
    memory_gib: float | None = None
    """Memory of a GPU."""
    link_gb_s: float | None = None
    """10^9 bytes a second that a GPU sends to others of its machine."""
    network_gb_s: float | None = None
    """10^9 bytes a second that a GPU's share of the machine's adapters sends to other machines."""
    ring_efficiency: float = 0.8
    """Share of these two that a collective reaches."""
    collective_us: float = 30.0
    """Microseconds of a collective that the GPU waits for, whatever its size."""
    loader_cores: int = 96
    """Cores of a machine that decode."""
    core_images_s: float = 850.0
    """Images a second that a core decodes: ImageNet's files decoded once (1,695 on two threads of an EPYC)."""
    workspace_gib: float = 2.0
    """Memory of the CUDA context, cuDNN's workspaces, NCCL's buffers and what the allocator cannot use."""

    def __post_init__(self) -> None:
        for key in self.__dataclass_fields__:
            value = getattr(self, key)
            if value is None or isinstance(value, str):
                continue
            if not 0 < value < math.inf:
                raise ValueError(f"{key}={value} must be greater than 0 and finite")
        for key in ("mfu", "ring_efficiency"):
            if (value := getattr(self, key)) is not None and value > 1:
                raise ValueError(f"{key}={value} is a share; give more than 0 and at most 1")

    @property
    def cluster(self) -> Cluster:
        """The GPUs with every key that is set."""
        keys = ("peak_tflops", "memory_tb_s", "memory_gib", "link_gb_s", "network_gb_s")
        given = {key: getattr(self, key) for key in keys if getattr(self, key) is not None}
        return Cluster(
            device=replace(GPUS[self.gpu], **given),
            gpus=self.gpus,
            gpus_per_node=self.gpus_per_node,
            ring_efficiency=self.ring_efficiency,
            collective_us=self.collective_us,
        )
