"""The loader bench: files to decoded images, held or read anew, with and without crops, beside torch's DataLoader."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from fastsimclr.bench.baseline import TwoViews
from fastsimclr.bench.configs import LoaderBench
from fastsimclr.bench.files import Files, data_loader, open_files
from fastsimclr.bench.record import LAST, Contestant, Report, Round, Stopwatch, measure, report
from fastsimclr.feed import Feed
from fastsimclr.loaders import DataConfig, DataError, Policy, Resident, Source, TrainLoader, hold
from fastsimclr.loaders.backends.resident import thread_count
from fastsimclr.loaders.decode import decode
from fastsimclr.runtime import choose_runtime

NOTES = (
    "no ratio is given for decoding only, which is less work than decoding and two crops",
    "resident: its set-up, the decoding of all images once, is in the facts and not in images/s",
)


def bench_loader(config: LoaderBench) -> Report:
    """Measure and return the report. DataError for a folder with too few images."""
    config = config.at_smoke_size()
    runtime = choose_runtime(config.device, "fp32", True)
    device, watch = runtime.device, Stopwatch(runtime.device)
    data = DataConfig(threads=config.threads, loader="resident")
    policy = Policy(size=config.size, flip=0.0, jitter=0.0, grey=0.0, blur=0.0, normalise="none")
    threads = thread_count(config.threads)
    workers = 0 if config.smoke else threads
    turn = dict[str, int]()

    def contestant(name: str, views: int, passed: Callable[[], Iterable[Any]], **facts: Any) -> Contestant:
        def run() -> Round:
            watch.start()
            for _ in passed():
                watch.mark(LAST)
            return watch.round(config.batch)

        return Contestant(name=name, ours=name.startswith("ours"), views=views, run=run, facts=facts)

    with tempfile.TemporaryDirectory() as scratch:
        source, what = open_files(config.root, config.images, config.side, config.seed, Path(scratch))
        start = time.perf_counter()
        resident = hold(source, data, device)
        setup_s = round(time.perf_counter() - start, 3)
        assert resident is not None  # "always"

        def batches(key: str, held: Resident | None = None) -> TrainLoader:
            first = turn[key] = turn.get(key, -config.steps) + config.steps
            steps = {"start": first, "stop": first + config.steps, "batch": config.batch}
            return TrainLoader(source, data, seed=config.seed, resident=held, pin=device.type == "cuda", **steps)

        def crops(key: str, held: Resident | None = None) -> Iterator[torch.Tensor]:
            with Feed(batches(key, held), policy, seed=config.seed, views=2, runtime=runtime) as feed:
                for shipment in feed:
                    watch.mark("wait")
                    yield shipment.views(policy, torch.float32)

        def theirs(words: str, read: Callable[[str], Any], *first: Any) -> Contestant:
            crop = v2.RandomResizedCrop(config.size, antialias=True)
            one = v2.Compose([crop, *first, v2.ToDtype(torch.float32, scale=True)])
            loader = data_loader(Files(source, TwoViews(one), read), config.batch, config.steps, workers, runtime)
            return contestant(f"DataLoader, {words}, 2 crops", 2, lambda: loader, workers=workers)

        entries = [
            contestant("ours native, decode only", 0, lambda: batches("decode"), threads=threads),
            contestant("ours native, decode + 2 crops", 2, lambda: crops("crops"), threads=threads),
            contestant("ours resident, 2 crops", 2, lambda: crops("held", resident), setup_s=setup_s),
            theirs("PIL (default)", default_loader, v2.PILToTensor()),
            theirs("our decoder, tensors (best)", _decoded),
        ]
        checks = {"images": what, "decoded pixels, mean |ours - PIL| of 255": _pixel_distance(source, resident)}
        rows = measure(entries, config.rounds, device)
    return report("loader", asdict(config), runtime, rows, checks=checks, notes=NOTES)


def _decoded(path: str) -> torch.Tensor:
    return torch.from_numpy(decode(Path(path).read_bytes(), path)).permute(2, 0, 1)


def _pixel_distance(source: Source, resident: Resident) -> float:
    """Mean absolute difference of our decoding and PIL's on 16 images. DataError over 2: not the same pictures."""
    far = dict[str, float]()
    for index in np.linspace(0, len(source) - 1, 16).astype(np.int64).tolist():
        path = source.describe(index)
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
        far[path] = float(np.abs(resident.images.image(index).cpu().numpy() - pixels).mean())
    worst = max(far, key=lambda path: far[path])
    if far[worst] > 2:
        raise DataError(
            f"{worst} decodes {far[worst]:.1f} levels away from PIL's pixels; a bench needs undamaged files"
        )
    return float(np.mean(list(far.values())))
