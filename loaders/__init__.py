"""From bytes on disk to uint8 images, with the order of the samples and the draws of their views."""

if __name__ != "fastsimclr.loaders":
    raise ImportError(f"import fastsimclr.loaders, not {__name__}: the folder loaders/ is part of that package")

from fastsimclr.loaders.backends.resident import Place, Resident, choose_place, hold, thread_count
from fastsimclr.loaders.batch import Batch, Ragged
from fastsimclr.loaders.beton.pack import Packing, pack
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.recode import Recoding
from fastsimclr.loaders.beton.writer import BetonWriter
from fastsimclr.loaders.data import DataConfig, Splits, label_subset, open_data
from fastsimclr.loaders.draw import Policy, ViewParams, draw
from fastsimclr.loaders.faults import too_many_damaged
from fastsimclr.loaders.loader import EvalLoader, Loader, TrainLoader, backend_name
from fastsimclr.loaders.order import Order, OrderName, choose_order, epoch_order, rank_positions, steps_per_run
from fastsimclr.loaders.sets.basic import ArraySource, FileSource, Relabelled, Subset
from fastsimclr.loaders.sets.folder import open_folder
from fastsimclr.loaders.sets.splits import hold_out
from fastsimclr.loaders.shards.cache import ShardCache
from fastsimclr.loaders.shards.index_files import write_index
from fastsimclr.loaders.shards.remote import FetchError
from fastsimclr.loaders.shards.source import ShardSource, open_shards
from fastsimclr.loaders.source import DataError, Source

__all__ = [
    "ArraySource",
    "Batch",
    "BetonSource",
    "BetonWriter",
    "DataConfig",
    "DataError",
    "EvalLoader",
    "FetchError",
    "FileSource",
    "Loader",
    "Order",
    "OrderName",
    "Packing",
    "Place",
    "Policy",
    "Ragged",
    "Recoding",
    "Relabelled",
    "Resident",
    "ShardCache",
    "ShardSource",
    "Source",
    "Splits",
    "Subset",
    "TrainLoader",
    "ViewParams",
    "backend_name",
    "choose_order",
    "choose_place",
    "draw",
    "epoch_order",
    "hold",
    "hold_out",
    "label_subset",
    "open_data",
    "open_folder",
    "open_shards",
    "pack",
    "rank_positions",
    "steps_per_run",
    "thread_count",
    "too_many_damaged",
    "write_index",
]
