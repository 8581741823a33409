"""The loader bench: images a second from files to crops in memory; ours, FFCV, DALI and DataLoader in turn.

Each pass is timed while its stream runs: after the first batches, and with more to come, so that neither start-up nor
what was read ahead counts. Sets: packed (shrunk to --short_side), raw (the same, decoded), original (files verbatim).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from fastsimclr.bench import rivals
from fastsimclr.bench.configs import LoaderBench
from fastsimclr.bench.files import Files, open_files
from fastsimclr.bench.record import LAST, Contestant, Report, Round, Stopwatch, frame, logger, measure, spread
from fastsimclr.loaders import (
    BetonSource,
    BetonWriter,
    Crops,
    DataConfig,
    DataError,
    Packing,
    Policy,
    Recoding,
    Source,
    TrainLoader,
    choose_placement,
    pack,
    thread_count,
)
from fastsimclr.loaders.compiled import COMPILED, TURBO_JPEG
from fastsimclr.loaders.decode import decode
from fastsimclr.runtime.device import Runtime, choose_runtime
from fastsimclr.training.feed import Feed

LEAD, TAIL = 8, 6  # batches before and after those that are timed; by then all buffers have their memory
TRIED = 6  # batches by which a baseline's best setting is chosen
FLOOR, SHIP, CROPS = "simplejpeg, decoding only", "ours native, ship once", "ours native, 2 crops"
FULL = "DataLoader, torchvision's whole views"
NOTES = (
    "ship once gives decoded images, of which a GPU cuts the views; beside it stand bare decoding, which reads no file,"
    " and DataLoader's whole views, which are all made on the CPU",
    "FFCV and DALI draw windows of their own, of the same distribution; FFCV shrinks by area, the others antialiased",
)


@dataclass(kw_only=True)
class _Entries:
    """Contestants, and which of ours is held against which baseline: (ours, baseline)."""

    config: LoaderBench
    watch: Stopwatch
    contestants: list[Contestant] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, views: int, stream: rivals.Stream, *rivalled: str, **details: Any) -> None:
        """A contestant; `rivalled` are ours that it is a baseline of."""

        def run() -> Round:
            batches = stream()
            for _ in range(LEAD):
                next(batches)
            self.watch.start()
            for _ in range(self.config.steps):
                next(batches)
                self.watch.mark(LAST)
            done = self.watch.round(self.config.batch)
            rivals.end(batches)
            return done

        self.contestants.append(
            Contestant(name=name, ours=name.startswith("ours"), views=views, run=run, details=details)
        )
        self.pairs += [(ours, name) for ours in rivalled]


def bench_loader(config: LoaderBench) -> Report:
    """Measure and return the report. DataError for a folder with too few images, or damaged ones."""
    config = config.at_smoke_size()
    runtime = choose_runtime(config.device, "fp32", True)
    entries = _Entries(config=config, watch=Stopwatch(runtime.device))
    missing = [name for name, module in (("FFCV", "ffcv"), ("DALI", "nvidia.dali")) if not _there(module)]
    with tempfile.TemporaryDirectory(dir=config.scratch) as scratch:
        source, what = open_files(config.root, config.images, config.side, config.seed, Path(scratch))
        for kind in config.sets:
            _Set(kind, source, Path(scratch), entries, runtime).enter()
        checks: dict[str, Any] = {
            "images": what,
            "our crops are cut by": "cut.c" if COMPILED else "torch; with a C compiler, install again",
            "our JPEGs are decoded by": "libturbojpeg" if TURBO_JPEG else "simplejpeg; with libturbojpeg0, faster",
        }
        checks["decoded pixels, mean |ours - PIL| of 255"] = _pixel_distance(source)
        rows = measure(entries.contestants, config.rounds, runtime.device)
    by_name = {row["name"]: row for row in rows}
    ratios = [_ratio(by_name[ours], by_name[other]) for ours, other in entries.pairs]
    notes = [*NOTES, *(f"{name} is not installed and not measured" for name in missing)]
    return frame("loader", asdict(config), runtime, rows, ratios, checks=checks, notes=notes)


def _there(module: str) -> bool:
    return find_spec(module.split(".")[0]) is not None and find_spec(module) is not None


def _ratio(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """images/s of one over those of the other, round by round."""
    pairs = zip(ours["rounds"], other["rounds"], strict=True)
    values = [a["images"] / a["seconds"] * b["seconds"] / b["images"] for a, b in pairs]
    return {"ours": ours["name"], "baseline": other["name"], **spread(values)}


class _Set:
    """The images in one form, in a .beton of as many rows as a pass reads, and the contestants that read it."""

    def __init__(self, kind: str, source: Source, scratch: Path, entries: _Entries, runtime: Runtime) -> None:
        self.kind, self.entries, self.runtime, self.config = kind, entries, runtime, entries.config
        self.threads = thread_count(self.config.threads)
        self.batches = LEAD + self.config.steps + TAIL
        short_side = None if kind == "original" else self.config.short_side or None
        recoding = Recoding(short_side=short_side, store="raw" if kind == "raw" else "jpeg")
        self.once = pack(source, scratch / f"{kind}.beton", Packing(recoding=recoding, threads=self.threads))
        self.many = _repeated(self.once, scratch / f"{kind}-rows.beton", self.batches * self.config.batch)
        self.scratch = scratch
        self._turn = 0

    def enter(self) -> None:
        """Add the contestants."""
        suffix = {"packed": "", "raw": ", raw", "original": ", originals"}[self.kind]
        ship, crops, batch, size = SHIP + suffix, CROPS + suffix, self.config.batch, self.config.size
        add, details = self.entries.add, {"images": len(self.once), "threads": self.threads}
        add(ship, 0, lambda: self._ours(False), **details)
        add(crops, 2, lambda: self._ours(True), **details)
        if self.kind != "raw":
            # As many as ours read, each in a place of its own: a few hundred would stay in the caches.
            files = [bytes(self.many.read(k)) for k in range(len(self.many))]
            add(FLOOR + suffix, 0, rivals.decoding(files, batch, self.threads), ship, threads=self.threads)
        if _there("ffcv"):
            self._best("FFCV, 2 crops" + suffix, crops, rivals.ffcv(self.many.path, batch, size, self.threads))
        if self.kind == "raw":
            return
        written = self._written()
        paths = [written.describe(k) for k in range(len(written))]
        if _there("nvidia.dali"):
            self._best("DALI CPU, 2 crops" + suffix, crops, rivals.dali(paths, batch, size, self.threads))
        if self.kind == "packed":
            self._torch_loaders(written)
            self._held()

    def _best(self, name: str, rivalled: str, streams: dict[str, rivals.Stream]) -> None:
        """Add a baseline at the quickest of its settings."""
        setting, stream, seconds = rivals.quickest(streams, TRIED)
        logger.info("%s: %s; seconds by setting %s", name, setting, seconds)
        self.entries.add(name, 2, stream, rivalled, setting=setting, tried_s=seconds, threads=self.threads)

    def _ours(self, crops: bool) -> Iterator[Any]:
        self._turn += 1  # another permutation for each pass
        loader = TrainLoader(
            self.many,
            DataConfig(threads=self.config.threads, loader="native"),
            batch=self.config.batch,
            seed=self._turn,
            stop=self.batches,
            crops=self._crops(Policy(size=self.config.size, normalise="none")) if crops else None,
            pin=self.runtime.pins,
        )
        return iter(loader)

    def _crops(self, policy: Policy) -> Crops:
        return Crops(policy=policy, seed=self.config.seed, views=2)

    def _held(self) -> None:
        """The whole set decoded in the device's memory, its crops cut there: uint8 on a CPU, float32 on a GPU."""
        crops = self._crops(Policy(size=self.config.size, normalise="none").plain())
        start = time.perf_counter()
        data = DataConfig(threads=self.config.threads, loader="resident")
        resident = choose_placement(self.many, data, self.runtime.device).fill()
        setup_s = round(time.perf_counter() - start, 3)

        def stream() -> Iterator[Any]:
            where = {"batch": self.config.batch, "stop": self.batches, "seed": self.config.seed}
            loader = TrainLoader(self.many, data, resident=resident, crops=crops, **where)  # type: ignore[arg-type]
            if loader.crops is not None:
                yield from loader
                return
            with Feed(loader, crops, self.runtime) as feed:
                for shipment in feed:
                    yield shipment.render(torch.float32)

        self.entries.add("ours resident, 2 crops", 2, stream, setup_s=setup_s)

    def _torch_loaders(self, written: Source) -> None:
        size, batch = self.config.size, self.config.batch
        workers = 0 if self.config.smoke else self.threads

        def loader(files: Files) -> rivals.Stream:
            return rivals.torch_loader(files, batch, self.batches, workers, self.runtime)

        tried = {
            "PIL": loader(Files(written, rivals.crop_twice(size, v2.PILToTensor()))),
            "our decoder, tensors": loader(Files(written, rivals.crop_twice(size), _decoded)),
        }
        self._best("DataLoader, 2 crops", CROPS, tried)
        self.entries.pairs.append(("ours resident, 2 crops", "DataLoader, 2 crops"))
        if self.config.whole:
            self.entries.add(FULL, 2, loader(Files(written, rivals.full_views(size))), SHIP, workers=workers)

    def _written(self) -> Source:
        """The packed images as files of their own, for loaders that read such."""
        folder = self.scratch / f"{self.kind}-files"
        folder.mkdir()
        for k in range(len(self.once)):
            (folder / f"{k:06d}.jpg").write_bytes(bytes(self.once.read(k)))
        return open_files(str(folder), len(self.once), 0, 0, folder)[0]


def _repeated(once: BetonSource, path: Path, rows: int) -> BetonSource:
    """The blobs of `once` again and again, `rows` of them, each with a place of its own in the file."""
    writer = BetonWriter(path, rows, once.page_bytes)
    try:
        for row in range(rows):
            k = row % len(once)
            height, width = once.pixel_sizes[k].tolist()
            writer.add(row, bytes(once.read(k)), height, width, bool(once.raw[k]))
        writer.finish(np.zeros(rows, dtype=np.int64))
    finally:
        writer.close()
    return BetonSource(path)


def _decoded(path: str) -> torch.Tensor:
    return torch.from_numpy(decode(Path(path).read_bytes(), path)).permute(2, 0, 1)


def _pixel_distance(source: Source) -> float:
    """Mean absolute difference of our decoding and PIL's on 16 images. DataError over 2: not the same pictures."""
    far = dict[str, float]()
    for index in np.linspace(0, len(source) - 1, 16).astype(np.int64).tolist():
        path = source.describe(index)
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
        far[path] = float(np.abs(decode(Path(path).read_bytes(), path) - pixels).mean())
    worst = max(far, key=lambda path: far[path])
    if far[worst] > 2:
        raise DataError(
            f"{worst} decodes {far[worst]:.1f} levels away from PIL's pixels; a bench needs undamaged files"
        )
    return float(np.mean(list(far.values())))
