"""The array types of the loaders."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
"""Ids, positions, labels, sizes in pixels."""
Pixels = npt.NDArray[np.uint8]
"""An image [H, W, 3] or [H, W], or bytes of several."""
