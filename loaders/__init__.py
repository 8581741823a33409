"""From bytes on disk to uint8 images, with the order of the samples and the draws of their views."""

if __name__ != "fastsimclr.loaders":
    raise ImportError(f"import fastsimclr.loaders, not {__name__}: the folder loaders/ is part of that package")

from fastsimclr.loaders.backends.resident import Resident, choose_placement, thread_count
from fastsimclr.loaders.batch import Batch, Ragged
from fastsimclr.loaders.beton.pack import Packing, pack
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.recode import Recoding
from fastsimclr.loaders.beton.writer import BetonWriter
from fastsimclr.loaders.cut import Crops
from fastsimclr.loaders.data import DataConfig, Splits, label_subset, open_data
from fastsimclr.loaders.draw import Policy, ViewParams, draw
from fastsimclr.loaders.faults import Damage
from fastsimclr.loaders.loader import EvalLoader, Loader, TrainLoader
from fastsimclr.loaders.order import OrderName, choose_order
from fastsimclr.loaders.sets.basic import ArraySource, FileSource, Relabelled, Subset
from fastsimclr.loaders.sets.splits import hold_out
from fastsimclr.loaders.shards.index_files import write_index
from fastsimclr.loaders.shards.remote import FetchError
from fastsimclr.loaders.source import DataError, Source

__all__ = [
    "ArraySource",
    "Batch",
    "BetonSource",
    "BetonWriter",
    "Crops",
    "Damage",
    "DataConfig",
    "DataError",
    "EvalLoader",
    "FetchError",
    "FileSource",
    "Loader",
    "OrderName",
    "Packing",
    "Policy",
    "Ragged",
    "Recoding",
    "Relabelled",
    "Resident",
    "Source",
    "Splits",
    "Subset",
    "TrainLoader",
    "ViewParams",
    "choose_order",
    "choose_placement",
    "draw",
    "hold_out",
    "label_subset",
    "open_data",
    "pack",
    "thread_count",
    "write_index",
]
