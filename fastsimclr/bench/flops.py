"""How much of a device's arithmetic a training uses: FLOP counted from the networks, over its peak and its products.

MFU = (FLOP of an image in a step) x images/s / (dense bf16 peak). A multiply-add is two operations. Counted are the
convolutions and matrix products of the networks, forward and backward; what the rest of a step adds is not: loss,
normalisation, views and optimizer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastsimclr.bench.ceilings import product_flops
from fastsimclr.bench.record import Contestant, measure

HOW = (
    "MFU: convolutions and matrix products of the networks, forward and backward, counted by torch's FlopCounterMode at"
    " one image, times images/s, over the device's dense bf16 peak; of GEMM: over a product of the row's precision,"
    " measured here before and after the rounds"
)
# NVIDIA's data sheets, dense. Only the modules named: other boards of a family have other clocks.
_PEAKS = ((r"\bH100\b.*(HBM3|SXM)", 989e12), (r"\bH200\b(?!.*NVL)", 989e12), (r"\bA100\b", 312e12))
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def flops_per_image(networks: Iterable[nn.Module], size: int, views: int) -> int:
    """FLOP of `views` views of size x size px through the networks, and back where something of them is trained."""
    total = 0
    for network in networks:
        ghost = copy.deepcopy(network).to("meta").eval()
        with FlopCounterMode(display=False) as counter:
            out = ghost(torch.zeros((1, 3, size, size), device="meta"))
            last = out[-1] if isinstance(out, tuple) else out
            if last.requires_grad:
                last.sum().backward()
        total += counter.get_total_flops()
    return views * total


def peak_flops(device: str) -> float | None:
    """Dense bf16 operations a second of the device of that name; None where it is not known, and for a part of one."""
    found = [peak for pattern, peak in _PEAKS if re.search(pattern, device)]
    return found[0] if found and "MIG" not in device else None


def measure_training(
    contestants: Sequence[Contestant], rounds: int, device: torch.device, *, devices: int = 1
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """`measure`, with MFU and the share of the measured product in each row; and what they refer to, for the report.

    devices: how many train together. On CUDA float32 rows get neither: convolutions there may use TF32.
    """
    cuda = device.type == "cuda"
    precisions = {str(c.details["precision"]) for c in contestants if c.flops} - ({"fp32"} if cuda else set())
    before = {key: product_flops(device, _DTYPES[key]) for key in sorted(precisions)}
    rows = measure(contestants, rounds, device)
    products = {key: max(value, product_flops(device, _DTYPES[key])) for key, value in before.items()}
    peak = peak_flops(torch.cuda.get_device_name(device)) if cuda else None
    for row in rows:
        precision = row["facts"].get("precision")
        used = (row["flops_per_image"] or 0) * row["images_per_s"]["median"] / devices
        row["mfu_pct"] = 100 * used / peak if used and peak and precision != "fp32" else None
        row["gemm_pct"] = 100 * used / products[precision] if used and precision in products else None
    return rows, {"product_flops": products, "peak_bf16_flops": peak}
