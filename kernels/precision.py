"""float32 products that stay float32, whatever precision the training step has chosen for its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 products stay float32: no autocast, no TF32, whatever the training step has chosen for itself."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        has_autocast = torch.amp.is_autocast_available(device.type)
        with torch.autocast(device.type, enabled=False) if has_autocast else nullcontext():
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
