"""What data a run uses: its configuration, and the sources that it opens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fastsimclr.loaders.beton.opening import open_packed
from fastsimclr.loaders.decode import MAX_PIXELS
from fastsimclr.loaders.log import LOG
from fastsimclr.loaders.order import WINDOW
from fastsimclr.loaders.sets.basic import ArraySource, Subset, SyntheticSource, digits, torchvision_set
from fastsimclr.loaders.sets.folder import open_folder
from fastsimclr.loaders.sets.splits import few_labels, hold_out
from fastsimclr.loaders.sets.subgroups import read_subgroups
from fastsimclr.loaders.shards.cache import GIB, ShardCache, default_cache
from fastsimclr.loaders.shards.index import label_member
from fastsimclr.loaders.shards.source import open_shard_splits
from fastsimclr.loaders.source import Source

LoaderName = Literal["auto", "native", "resident", "dali", "dali_gpu", "ffcv", "torchvision", "synthetic"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images and labels a run uses, and how they are read. Raises ValueError for values that cannot be."""

    source: Literal["digits", "folder", "beton", "shards", "cifar10", "cifar100", "stl10", "synthetic"] = "digits"
    """The data set: scikit-learn's digits (embedded), a folder of images, packed files, a torchvision set, or noise for
    benches."""
    root: str | None = None
    """The folder: of images for source=folder (root/train/CLASS, root/CLASS, or flat and unlabelled), with train.beton
    and val.beton for source=beton (or one .beton file), of the archives for cifar10, cifar100 and stl10 (default:
    ./data). For source=shards paths or URLs of tars: a folder, or a pattern with {000..127}, {a,b} or *."""
    labels: str | None = None
    """Labels for source=folder: a CSV file with the header path,label, paths relative to its folder; for source=beton
    paths as the file names its images. An image without a line is unlabelled. Default: root/labels.csv where there is
    one, else the class folders or the file's own labels."""
    val: str | None = None
    """Folder of validation images. Default: root/val or root/test where there is one, else a held-out split. For
    source=shards another pattern, else a held-out split. For source=beton a .beton file, by default root/val.beton or
    root/test.beton."""
    val_labels: str | None = None
    """Labels of a flat validation folder: two columns, file name and class name or position among the sorted classes,
    as in ImageNet's LOC_val_solution.csv."""
    subgroup: str | None = None
    """Report the accuracy of each subgroup of the validation images, too: the name of a column of data.labels
    (path,label,NAME), or where data.val_labels is given, of that file, by its heading. For source=folder. Images with
    an empty cell or without a line are the group "(none)"."""
    val_fraction: float = 0.1
    """Share of each class's labelled images held out for validation where the data set has no split of its own.
    The digits have one: a fixed fifth."""
    val_seed: int = 0
    """Seed of the held-out split. Keep it through all stages, or one stage trains on what another is tested on."""
    label_fraction: float | None = None
    """Share of the training labels of each class, above 0 and up to 1, that the few-label stages may use."""
    labels_per_class: int | None = None
    """Number of training labels of each class that the few-label stages may use."""
    label_list: str | None = None
    """File that lists the images whose labels the few-label stages may use, one name a line (Google's 1percent.txt)."""
    label_seed: int = 0
    """Seed of the draw of the labels for label_fraction and labels_per_class."""
    label_key: str | None = None
    """Where the labels of source=shards are: the extension of the members that hold them (cls, txt), or json.FIELD for
    a field of KEY.json; class numbers or class names. Default: cls."""
    index: str | None = None
    """Folder or URL of the index.json for source=shards, where it is not in their own folder (`fastsimclr index`)."""
    cache: str | None = None
    """Folder in which remote shards are kept, with what was found in shards; on a local disk, shared by the ranks of a
    machine. Default: fastsimclr/shards in $XDG_CACHE_HOME, or in ~/.cache."""
    cache_gib: float = 0.0
    """Most GiB of shards in data.cache; the least recently used make room. 0: no limit."""
    order: Literal["auto", "random", "quasi"] = "auto"
    """How the images of an epoch are mixed. random: all with all. quasi: blocks (shards, pages of a .beton) in random
    order, the images of data.window of them with each other, so that each shard is fetched once. auto: quasi where
    remote shards do not fit data.cache_gib, else random. A resumed run keeps the order that it began with."""
    window: int = WINDOW
    """Blocks that data.order=quasi mixes; the cache should have room for twice as many shards."""
    fetch_retries: int = 5
    """How often the download of a shard is tried again, after 0.5 s and then after twice the time before."""
    download: bool = True
    """Fetch a torchvision set that is not in root."""
    threads: int = 0
    """Threads that read and decode, of each rank; 0 shares the machine's cores among its ranks."""
    loader: LoaderName = "auto"
    """How images are read. native: threads, one decode for all views. resident: the data set held decoded in the
    device's memory. auto: resident where it fits, else native. dali and dali_gpu: NVIDIA DALI. ffcv: FFCV on a .beton.
    torchvision: torch's DataLoader, the baseline. synthetic: the ids and labels of the source, noise for pixels."""
    photometric: Literal["kernel", "dali"] = "kernel"
    """Who changes the colours, blurs and flips: our kernel, or for loader=dali and dali_gpu DALI's own operators, whose
    colours differ from SimCLR's (docs/loaders.md)."""
    resident_gib: float = 0.0
    """Most GiB of a device that data held decoded may take; 0 takes half of what is free. Ranks on a CPU share it."""
    max_bad_fraction: float = 0.01
    """Share of damaged images above which a run stops. Up to it, the next readable image stands in for a damaged one
    in training; in evaluation it is left out. Each is named in the log."""
    max_pixels: int = MAX_PIXELS
    """Most pixels an image may have: a small file can decode to gigabytes. Larger counts as damaged."""
    synthetic_images: int = 1024
    """Number of images for source=synthetic."""
    synthetic_size: int = 224
    """Side of the images in pixels for source=synthetic, and of loader=synthetic where it makes whole images."""
    synthetic_classes: int = 10
    """Number of classes for source=synthetic."""

    def __post_init__(self) -> None:
        few = ("label_fraction", "labels_per_class", "label_list")
        if len(given := [name for name in few if getattr(self, name) is not None]) > 1:
            raise ValueError(f"data.{' and data.'.join(given)} exclude each other; give one of them")
        if self.source in ("folder", "beton") and not self.root:
            what = "the folder that holds the images" if self.source == "folder" else "FILE.beton or its folder"
            raise ValueError(f"data.source={self.source} needs data.root; name {what}")
        if self.source == "shards" and not self.root:
            raise ValueError("data.source=shards needs data.root; name the shards, as in train-{000..127}.tar")
        label_member(self.label_key)
        for name in ("labels", "val", "val_labels"):
            if self.source == "shards" and name == "val":
                continue
            if self.source not in ("folder", "beton") and getattr(self, name) is not None:
                raise ValueError(f"data.{name} is for data.source=folder, not {self.source}, or for beton; remove it")
        if self.subgroup is not None and self.source != "folder":
            raise ValueError(f"data.subgroup={self.subgroup} is for data.source=folder, not {self.source}; remove it")
        if self.photometric == "dali" and self.loader not in ("dali", "dali_gpu"):
            raise ValueError(
                f"data.photometric=dali needs data.loader=dali or dali_gpu, not {self.loader}; set it, or use kernel"
            )
        rules = {
            "val_fraction": (0 < self.val_fraction < 1, "between 0 and 1"),
            "label_fraction": (self.label_fraction is None or 0 < self.label_fraction <= 1, "above 0 and up to 1"),
            "labels_per_class": (self.labels_per_class is None or self.labels_per_class >= 1, "1 or more"),
            "val_seed": (0 <= self.val_seed < 2**32, "in 0..2**32 - 1"),
            "label_seed": (0 <= self.label_seed < 2**32, "in 0..2**32 - 1"),
            "label_key": (self.label_key is None or self.source == "shards", "left out: it is for data.source=shards"),
            "index": (self.index is None or self.source == "shards", "left out: it is for data.source=shards"),
            "cache_gib": (self.cache_gib >= 0, "0 (no limit) or more"),
            "window": (self.window >= 1, "1 block or more"),
            "fetch_retries": (self.fetch_retries >= 0, "0 or more"),
            "threads": (self.threads >= 0, "0 (all cores) or more"),
            "resident_gib": (self.resident_gib >= 0, "0 (half of the free memory) or more"),
            "max_bad_fraction": (0 <= self.max_bad_fraction < 1, "0 or more and below 1"),
            "max_pixels": (self.max_pixels >= 1, "1 or more"),
            "synthetic_images": (self.synthetic_images >= 1, "1 or more"),
            "synthetic_size": (self.synthetic_size >= 1, "1 or more"),
            "synthetic_classes": (self.synthetic_classes >= 1, "1 or more"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"data.{name}={getattr(self, name)} must be {rule}")


@dataclass(frozen=True, kw_only=True)
class Splits:
    """What a run trains on and is tested on.

    unlabelled: every image for pretraining, labelled or not, none of val. train: those of them with a label, all.
    val: labelled images for evaluation. train and val are empty where nothing is labelled.
    subgroups: the name of the subgroup of each image of val; () without data.subgroup.
    """

    unlabelled: Source
    train: Source
    val: Source
    subgroups: tuple[str, ...] = ()


def open_data(config: DataConfig) -> Splits:
    """The sources that `config` names. Reads lists and folders, decodes nothing. Raises DataError."""
    training, validation = _open(config)
    if not len(validation):
        training, validation = hold_out(training, config.val_fraction, config.val_seed)
    labelled = np.flatnonzero(training.labels >= 0)
    train = training if len(labelled) == len(training) else Subset(training, labelled, f"{training.name}:labelled")
    LOG.info("%s: %d images, %d labelled, %d for validation", config.source, len(training), len(train), len(validation))
    return Splits(unlabelled=training, train=train, val=validation, subgroups=_subgroups(validation, config))


def _subgroups(val: Source, config: DataConfig) -> tuple[str, ...]:
    if config.subgroup is None or config.root is None or not len(val):
        return ()
    labels, val_labels = (None if text is None else Path(text) for text in (config.labels, config.val_labels))
    return read_subgroups(val, config.subgroup, root=Path(config.root), labels=labels, val_labels=val_labels)


def label_subset(train: Source, config: DataConfig) -> Source:
    """The labelled images of `train` that the few-label stages may use. DataError where a class is left without."""
    return few_labels(
        train,
        fraction=config.label_fraction,
        per_class=config.labels_per_class,
        listed=None if config.label_list is None else Path(config.label_list),
        seed=config.label_seed,
    )


# The digits have no split of their own: a fifth, the same for everybody, makes results comparable.
DIGITS_VAL = (0.2, 0)


def _open(config: DataConfig) -> tuple[Source, Source]:
    """(training images, validation images); no validation images where they are to be held out."""
    match config.source:
        case "folder" | "beton":
            assert config.root is not None  # __post_init__
            paths = [None if text is None else Path(text) for text in (config.labels, config.val, config.val_labels)]
            opened = open_packed if config.source == "beton" else open_folder
            return opened(Path(config.root), labels=paths[0], val=paths[1], val_labels=paths[2])
        case "digits":
            return hold_out(digits(), *DIGITS_VAL)
        case "shards":
            assert config.root is not None  # __post_init__
            folder = default_cache() if config.cache is None else Path(config.cache)
            cache = ShardCache(folder, int(config.cache_gib * GIB), config.fetch_retries)
            return open_shard_splits(config.root, config.val, cache, config.label_key, config.index)
        case "synthetic":
            noise = SyntheticSource(config.synthetic_images, config.synthetic_size, config.synthetic_classes)
            return noise, Subset(noise, ())
        case _:
            split = "train+unlabeled" if config.source == "stl10" else "train"
            return _torchvision(config, split), _torchvision(config, "test")


def _torchvision(config: DataConfig, split: str) -> ArraySource:
    return torchvision_set(config.source, split, Path(config.root or "data"), config.download)
