"""`fastsimclr pack`, `fastsimclr inspect` and `fastsimclr index`: their options, and what each prints."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from tqdm import tqdm

from fastsimclr.loaders import DataError, Source, thread_count
from fastsimclr.loaders.beton.origins import Origin, open_origin
from fastsimclr.loaders.beton.pack import Interrupted, Packing, pack
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.recode import Recoding
from fastsimclr.loaders.beton.verify import damaged_blobs
from fastsimclr.loaders.shards.cache import GIB, ShardCache, default_cache
from fastsimclr.loaders.shards.index import labels_of
from fastsimclr.loaders.shards.index_files import listed, write_index
from fastsimclr.packing.report import inspection_report, lines
from fastsimclr.packing.sheet import write_sheet
from fastsimclr.runs.stop import StopFlag, Stopped

_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """The options of `pack` that say how it works, not what the images become."""

    split: Literal["all", "train", "val"] = "all"
    """Which images, where SRC has some for training and some for validation; all needs a folder for DST."""
    threads: int = 0
    """Threads that read, decode and encode; 0 takes one for each core."""
    page_mib: int = 8
    """Size of a page, a power of two from 2; an image that needs more raises it."""
    max_bad_fraction: float = 0.01
    """Share of damaged images above which it stops. Up to it, they are left out and listed."""

    def __post_init__(self) -> None:
        rules = {
            "threads": (self.threads >= 0, "0 (one for each core) or more"),
            "page_mib": (self.page_mib in [2**k for k in range(1, 12)], "2, 4, 8, ... or 2048; 8 is usual"),
            "max_bad_fraction": (0 <= self.max_bad_fraction < 1, "0 or more and below 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"--{name}={getattr(self, name)} must be {rule}")


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """The options of `index`."""

    out: str | None = None
    """Folder or URL for one index.json of all shards, which data.index then names; without it, one into each folder of
    the shards, where it is found unasked."""
    label_key: str | None = None
    """Where the labels are: the extension of the members that hold them (cls, txt), or json.FIELD. Default: cls."""
    classes: str | None = None
    """Text file with the names of classes 0, 1, 2, ..., one a line, for labels that are numbers."""
    cache: str | None = None
    """Folder in which remote shards are kept, as data.cache of the run that will read them."""
    cache_gib: float = 0.0
    """Most GiB of shards in the cache; 0: no limit."""
    fetch_retries: int = 5
    """How often the download of a shard is tried again."""

    def __post_init__(self) -> None:
        rules = {
            "cache_gib": (self.cache_gib >= 0, "0 (no limit) or more"),
            "fetch_retries": (self.fetch_retries >= 0, "0 or more"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"--{name}={getattr(self, name)} must be {rule}")


def add_packing(name: str, parser: ArgumentParser) -> None:
    """Gives the parser of command `name` its options."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    if name == "pack":
        kinds = "Folder, FILE.beton, list of files, cifar10, cifar100, stl10, digits, tars, or data of Hugging Face."
        parser.add_argument("src", type=str, help=kinds)
        parser.add_argument("dst", type=str, help="FILE.beton, or a folder for train.beton and val.beton.")
        parser.add_class_arguments(Recoding, as_group=False)
        parser.add_class_arguments(PackOptions, as_group=False)
        parser.add_class_arguments(Origin, as_group=False, skip={"src"})
        parser.add_argument(
            "--resume", type=Literal["never", "auto"], default="never", help="auto: go on with an interrupted pack."
        )
        parser.add_argument("--overwrite", action="store_true", help="Replace the file where it exists.")
    elif name == "index":
        what = "Shards: paths, URLs, folders, or patterns with {000..127}, {a,b} or *, quoted."
        parser.add_argument("shards", type=str, nargs="+", help=what)
        parser.add_class_arguments(IndexOptions, as_group=False)
    else:
        parser.add_argument("file", type=str, help="FILE.beton.")
        parser.add_argument("--json", action="store_true", help="Print everything as one JSON object.")
        parser.add_argument("--sheet", type=str, help="PNG file for a contact sheet of some of the images.")
        parser.add_argument(
            "--verify", action="store_true", help="Check and decode every image; exit code 1 for damage."
        )
        parser.add_argument("--threads", type=int, default=0, help="Threads that check; 0 takes one for each core.")
    parser.add_argument("--traceback", action="store_true", help="Show Python's traceback with an error.")


def run_packing(name: str, options: Namespace) -> int:
    """Run command `name` and print what it did; returns the exit code. Raises Stopped with an interrupted pack."""
    return {"pack": _pack, "inspect": _inspect, "index": _index}[name](options)


def _chosen(kind: type[Any], options: Namespace) -> Any:
    return kind(**{key: options[key] for key in kind.__dataclass_fields__})


def _pack(options: Namespace) -> int:
    how: PackOptions = _chosen(PackOptions, options)
    packing = Packing(
        recoding=_chosen(Recoding, options),
        threads=thread_count(how.threads),
        page_bytes=how.page_mib * _MIB,
        max_bad_fraction=how.max_bad_fraction,
        resume=options.resume == "auto",
        overwrite=options.overwrite,
    )
    for target, source in _targets(open_origin(_chosen(Origin, options)), options.src, Path(options.dst), how.split):
        _pack_one(source, target, packing)
    return 0


def _targets(sources: dict[str, Source], src: str, dst: Path, split: str) -> list[tuple[Path, Source]]:
    """(file, what goes into it)."""
    if split != "all" and split not in sources:
        raise DataError(f"--split {split}: {src} has {' and '.join(sources)} images only; leave the option out")
    chosen = {key: source for key, source in sources.items() if split in ("all", key)}
    if dst.suffix != ".beton":
        return [(dst / f"{key}.beton", source) for key, source in chosen.items()]
    if len(chosen) > 1:
        raise DataError(f"{src} has {' and '.join(chosen)} images; give a folder for DST, or --split train")
    return [(dst, source) for source in chosen.values()]


def _pack_one(source: Source, target: Path, packing: Packing) -> None:
    began = time.perf_counter()
    with StopFlag() as flag, tqdm(total=len(source), desc=target.name, unit="image", disable=None, leave=False) as bar:
        try:
            made = pack(
                source,
                target,
                packing,
                progress=lambda done, n: _advance(bar, done),
                stop=lambda: flag.signum is not None,
            )
        except Interrupted as stop:
            assert flag.signum is not None
            raise Stopped(flag.signum, f"stopped: {stop} into {target.name}.partial") from stop
    seconds = time.perf_counter() - began
    print("\n".join(lines(inspection_report(made))))
    print(f"{target}: {len(made):,} images in {seconds:.1f} s")


def _advance(bar: Any, done: int) -> None:
    bar.update(done - bar.n)


def _inspect(options: Namespace) -> int:
    source = BetonSource(Path(options.file))
    found = inspection_report(source)
    if options.sheet is not None:
        write_sheet(source, Path(options.sheet))
        found["sheet"] = options.sheet
    if options.verify:
        checking = partial(tqdm, desc="damaged", unit="image", disable=None, leave=False)
        damaged = list(checking(damaged_blobs(source, thread_count(options.threads), decoding=True)))
        named = source.names
        found["damaged"] = [[str(row) if named is None else named[row], reason] for row, reason in damaged]
    print(json.dumps(found, indent=1) if options.json else "\n".join(lines(found)))
    return 1 if found.get("damaged") else 0


def _index(options: Namespace) -> int:
    how: IndexOptions = _chosen(IndexOptions, options)
    folder = default_cache() if how.cache is None else Path(how.cache)
    cache = ShardCache(folder, int(how.cache_gib * GIB), how.fetch_retries)
    names = None if how.classes is None else _class_names(Path(how.classes))
    for place in write_index(options.shards, cache, label_key=how.label_key, classes=names, out=how.out):
        file = listed(place.rpartition("/")[0], cache, None)  # read back: it is there, and whole
        assert file is not None
        shards = [(name, samples) for name, (_, _, samples) in file.shards.items()]
        labels, classes = labels_of(shards, how.label_key, file.classes)
        size = sum(size for size, _, _ in file.shards.values())
        unlabelled, left_out = labels.count(-1), sum(len(samples.left_out) for _, samples in shards)
        print(
            f"{place}: {len(shards):,} shards of {size / GIB:.2f} GiB, {len(labels):,} images,"
            f" {len(classes):,} classes, {unlabelled:,} unlabelled, {left_out:,} keys without an image"
        )
    return 0


def _class_names(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--classes {path} cannot be read: {error}; name a text file") from error
    if not names or not all(names) or len(set(names)) < len(names):
        raise DataError(f"--classes {path} has {len(names)} lines; write one name a line, none empty, none twice")
    return names
