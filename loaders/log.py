"""The logger of the loaders: that of the whole package."""

from __future__ import annotations

import logging

LOG = logging.getLogger("fastsimclr")
