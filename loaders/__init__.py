"""From bytes on disk to uint8 images, with the order of the samples and the draws of their views."""

if __name__ != "fastsimclr.loaders":
    raise ImportError(f"import fastsimclr.loaders, not {__name__}: the folder loaders/ is part of that package")

from fastsimclr.loaders.backends.resident import Resident, free_bytes, hold, thread_count
from fastsimclr.loaders.batch import Batch, Ragged
from fastsimclr.loaders.data import DataConfig, Splits, label_subset, open_data
from fastsimclr.loaders.draw import Policy, ViewParams, draw
from fastsimclr.loaders.faults import too_many_damaged
from fastsimclr.loaders.loader import EvalLoader, Loader, TrainLoader, backend_name
from fastsimclr.loaders.order import Order, epoch_order, rank_positions, steps_per_run
from fastsimclr.loaders.sets.basic import ArraySource, FileSource, Relabelled, Subset
from fastsimclr.loaders.sets.splits import hold_out
from fastsimclr.loaders.source import DataError, Source

__all__ = [
    "ArraySource",
    "Batch",
    "DataConfig",
    "DataError",
    "EvalLoader",
    "FileSource",
    "Loader",
    "Order",
    "Policy",
    "Ragged",
    "Relabelled",
    "Resident",
    "Source",
    "Splits",
    "Subset",
    "TrainLoader",
    "ViewParams",
    "backend_name",
    "draw",
    "epoch_order",
    "free_bytes",
    "hold",
    "hold_out",
    "label_subset",
    "open_data",
    "rank_positions",
    "steps_per_run",
    "thread_count",
    "too_many_damaged",
]
