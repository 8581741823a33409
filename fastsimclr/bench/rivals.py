"""Other loaders at their best settings: FFCV, DALI, torch's DataLoader, and bare decoding as the floor of them all.

Each is a function without arguments that begins an endless or long enough stream of batches.
"""

# N images of a batch, S side

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import simplejpeg
import torch
from torchvision.transforms import v2

from fastsimclr.bench.baseline import TwoViews, plain_transform
from fastsimclr.bench.files import Files, data_loader
from fastsimclr.bench.ours import policy_for
from fastsimclr.loaders.ahead import ahead
from fastsimclr.loaders.scratch import Scratch
from fastsimclr.runtime.device import Runtime

Stream = Callable[[], Iterator[Any]]
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_AHEAD = 3
_IDLE_S = 0.1
_ROOM = Scratch()
_KEPT: list[Any] = []  # numba (0.68) fails while it forgets what it compiled for FFCV


def quickest(streams: dict[str, Stream], batches: int) -> tuple[str, Stream, dict[str, float]]:
    """The stream that gives `batches` batches soonest after as many before them: name, stream, seconds of each."""
    seconds = {name: _seconds(stream, batches) for name, stream in streams.items()}
    name = min(seconds, key=lambda key: seconds[key])
    return name, streams[name], seconds


def _seconds(stream: Stream, batches: int) -> float:
    running = stream()
    for _ in range(batches):
        next(running)
    start = time.perf_counter()
    for _ in range(batches):
        next(running)
    seconds = time.perf_counter() - start
    end(running)
    return seconds


def end(running: Iterator[Any]) -> None:
    """End a stream, and wait until nothing of it works on: what it reads ahead would slow down the next one."""
    if close := getattr(running, "close", None):
        close()
    while True:
        before = time.process_time()
        time.sleep(_IDLE_S)
        if time.process_time() - before < _IDLE_S / 10:
            return


def decoding(files: Sequence[bytes], batch: int, threads: int) -> Stream:
    """simplejpeg, strict, of files in memory, in threads that write into a buffer of their own; nothing is kept."""

    def decode(start: int) -> None:
        for k in range(start, start + share):
            data = files[k % len(files)]
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, buffer=_ROOM.take(3 * height * width))

    share = math.gcd(batch, 32)

    def stream() -> Iterator[None]:
        pool = ThreadPoolExecutor(threads)
        firsts = itertools.count(step=batch)
        begun = ([pool.submit(decode, start) for start in range(k, k + batch, share)] for k in firsts)
        with ahead(pool, begun, _AHEAD) as batches:
            for tasks in batches:
                for task in tasks:
                    task.result()
                yield None

    return stream


def ffcv(path: Path, batch: int, size: int, threads: int) -> dict[str, Stream]:
    """FFCV's own Loader, two random crops of an image in uint8 [N, S, S, 3] each, in random order, pages cached."""
    fields, loaders = import_module("ffcv.fields.rgb_image"), import_module("ffcv.loader")
    specs = import_module("ffcv.pipeline.pipeline_spec")

    def crop() -> Any:
        decoder = fields.RandomResizedCropRGBImageDecoder((size, size), SCALE, RATIO)
        return specs.PipelineSpec("image", decoder=decoder, transforms=[])

    def build(ahead: int) -> Stream:
        torch_threads = torch.get_num_threads()  # FFCV sets them to its own
        loader = loaders.Loader(
            str(path),
            batch_size=batch,
            num_workers=threads,
            os_cache=True,
            order=loaders.OrderOption.RANDOM,
            pipelines={"image": None, "label": None, "view0": crop(), "view1": crop()},
            drop_last=True,
            batches_ahead=ahead,
            seed=0,
        )
        torch.set_num_threads(torch_threads)
        _KEPT.append(loader)
        return lambda: iter(loader)

    return {f"{ahead} batches ahead": build(ahead) for ahead in (1, _AHEAD)}


def dali(files: Sequence[str], batch: int, size: int, threads: int) -> dict[str, Stream]:
    """DALI on the CPU, two random crops of an image in uint8: one decode for both, or DALI's fused decode and crop.

    Also with its faster inverse transform, which changes pixels, and without antialiasing.
    """
    fn, types = import_module("nvidia.dali.fn"), import_module("nvidia.dali.types")
    pipeline: Any = import_module("nvidia.dali").Pipeline
    window = {"random_area": list(SCALE), "random_aspect_ratio": list(RATIO)}

    def build(fused: bool, depth: int, fast: bool, antialias: bool) -> Stream:
        pipe = pipeline(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=depth, seed=0)
        kind = {"output_type": types.RGB, "use_fast_idct": fast}
        with pipe:
            data, _ = fn.readers.file(files=list(files), random_shuffle=True, initial_fill=len(files))
            if fused:
                crops = [fn.decoders.image_random_crop(data, **kind, **window) for _ in "12"]
                views = [fn.resize(crop, size=[size, size], antialias=antialias) for crop in crops]
            else:
                whole = fn.decoders.image(data, adjust_orientation=False, **kind)
                views = [fn.random_resized_crop(whole, size=[size, size], antialias=antialias, **window) for _ in "12"]
            pipe.set_outputs(*views)
        pipe.build()

        def stream() -> Iterator[Any]:
            while True:
                yield pipe.run()

        return stream

    settings = {
        "one decode": (False, 2, False, True),
        "one decode, depth 4": (False, 4, False, True),
        "one decode, fast idct": (False, 2, True, True),
        "one decode, not antialiased": (False, 2, False, False),
        "one decode, fast idct, not antialiased": (False, 2, True, False),
        "fused decode and crop": (True, 2, False, True),
    }
    return {name: build(*setting) for name, setting in settings.items()}


def torch_loader(files: Files, batch: int, batches: int, workers: int, runtime: Runtime) -> Stream:
    """torch's DataLoader in random order over `files`, a pass of `batches` batches; its workers end with the pass."""

    def stream() -> Iterator[Any]:
        yield from data_loader(files, batch, batches, workers, runtime, persistent=False)

    return stream


def crop_twice(size: int, *then: Any) -> TwoViews:
    """torchvision's crops alone, two of uint8 [3, S, S]; `then` makes tensors of pictures."""
    return TwoViews(v2.Compose([v2.RandomResizedCrop(size, antialias=True), *then]))


def full_views(size: int) -> TwoViews:
    """torchvision's two whole SimCLR views: crop, flip, colours, grey, blur, normalised."""
    return TwoViews(plain_transform(policy_for(size)))
