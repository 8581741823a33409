"""torch's collectives under the names that the installed version gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

# torch 2.13 renamed it and made the old name warn.
all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""all_gather_single(output, input, group): input [N, ...] of each rank -> output [W · N, ...] on all of W ranks."""
