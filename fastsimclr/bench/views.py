"""The views bench: decoded images in memory to finished views, beside torchvision and lightly, and each op's error."""

# N images, V views, S side

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastsimclr.bench import baseline
from fastsimclr.bench.calls import Candidate, Form, OpCase, report_of_calls
from fastsimclr.bench.configs import ViewsBench
from fastsimclr.bench.files import open_files
from fastsimclr.bench.loss import DTYPES
from fastsimclr.bench.memory import Call
from fastsimclr.bench.record import Report
from fastsimclr.bench.view_errors import view_errors
from fastsimclr.kernels.backend import Backend
from fastsimclr.kernels.gather.views import gather_views
from fastsimclr.kernels.views import make_views
from fastsimclr.loaders import DataConfig, Policy, Resident, Source, ViewParams, choose_placement, draw
from fastsimclr.loaders.sets.basic import SyntheticSource
from fastsimclr.runtime.device import Runtime, choose_runtime

FEW = 64  # images a call of what works image by image, where the others' calls are made for a GPU
ERROR_IMAGES = 32
CHECK_IMAGES = 64
ALIKE = (
    4.0  # over the root of the number of views: mean and deviation of normalised values, whose own spread is about 1
)
SAME = 2e-3  # mean difference of normalised values, rounded to half precision, from torch operations on equal draws


def policy_of(config: ViewsBench) -> Policy:
    """SimCLR's views for ImageNet, or those for CIFAR-10."""
    if config.policy == "cifar":
        return Policy(size=config.size, strength=0.5, blur=0.0)
    return Policy(size=config.size)


@lru_cache(maxsize=4)
def held(config: ViewsBench, count: int, device: str) -> Resident:
    """`count` decoded images on the device."""
    source: Source = SyntheticSource(count, config.side, 1)
    if config.root is not None:
        source, _ = open_files(config.root, count, config.side, config.seed, Path())
    resident = choose_placement(source, DataConfig(loader="resident"), torch.device(device)).fill()
    assert resident is not None  # "always"
    return resident


def _drawn(config: ViewsBench, resident: Resident, ids: Tensor, epoch: int) -> ViewParams:
    epochs = torch.full_like(ids, epoch)
    return draw(policy_of(config), config.seed, epochs, ids, config.views, resident.sizes[ids])


def _dtype(config: ViewsBench, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return DTYPES[config.dtype]


def ours(config: ViewsBench, count: int, device: str, backend: Backend = "auto") -> Call:
    """All views in one call. On a CPU each call draws its own parameters; on CUDA they are there, drawn once."""
    resident, ids, place = held(config, config.images, device), torch.arange(count), torch.device(device)
    images = resident.images.select(ids.to(place))
    rendering, dtype = policy_of(config).rendering, _dtype(config, place)
    if place.type == "cuda":
        params = _drawn(config, resident, ids, 0).to(place)
        return lambda: make_views(images, params, **rendering, dtype=dtype, backend=backend)
    epochs = iter(range(2**31))
    return lambda: make_views(images, _drawn(config, resident, ids, next(epochs)), **rendering, dtype=dtype)


def one_gather(config: ViewsBench, count: int, device: str) -> Call:
    """Views of images at random ids of the data set, without a copy of their pixels."""
    resident, place = held(config, config.dataset, device), torch.device(device)
    ids = _random_ids(config, count)
    params, there = _drawn(config, resident, ids, 0).to(place), ids.to(place)
    rendering, dtype = policy_of(config).rendering, _dtype(config, place)
    return lambda: gather_views(resident.images, there, params, **rendering, dtype=dtype)


def copied(config: ViewsBench, count: int, device: str) -> Call:
    """The images copied out by their ids first, then our views of them."""
    resident, place = held(config, config.dataset, device), torch.device(device)
    ids = _random_ids(config, count)
    params, there = _drawn(config, resident, ids, 0).to(place), ids.to(place)
    rendering, dtype = policy_of(config).rendering, _dtype(config, place)
    pixels = resident.images.buffer.view(config.dataset, -1)
    packed = held(config, config.images, device).images.select(torch.arange(count, device=place))
    return lambda: make_views(
        type(packed)(
            buffer=pixels[there].view(-1), offsets=packed.offsets, heights=packed.heights, widths=packed.widths
        ),
        params,
        **rendering,
        dtype=dtype,
    )


def _random_ids(config: ViewsBench, count: int) -> Tensor:
    return torch.randint(config.dataset, (count,), generator=torch.Generator().manual_seed(config.seed))


def torchvision_pil(config: ViewsBench, count: int, device: str) -> Call:
    """torchvision's transforms on PIL images, one by one."""
    images = _pil(config, count)
    return _each(images, baseline.plain_transform(policy_of(config)), config.views)


def torchvision_tensors(config: ViewsBench, count: int, device: str) -> Call:
    """The same on uint8 tensors, on a GPU where there is one."""
    resident = held(config, config.images, device)
    images = [resident.images.image(index).permute(2, 0, 1).contiguous() for index in range(count)]
    return _each(images, baseline.plain_transform(policy_of(config)), config.views)


def lightly(config: ViewsBench, count: int, device: str) -> Call:
    """lightly's SimCLRTransform on PIL images, one by one: two views."""
    images, two = _pil(config, count), baseline.lightly_transform(policy_of(config))

    def call() -> Tensor:
        pairs = [two(image) for image in images]
        return torch.stack([view for views in zip(*pairs, strict=True) for view in views])

    return call


def _pil(config: ViewsBench, count: int) -> list[Image.Image]:
    resident = held(config, config.images, "cpu")
    return [Image.fromarray(resident.images.image(index).numpy()) for index in range(count)]


def _each(images: list[Any], one: Callable[[Any], Any], views: int) -> Call:
    return lambda: torch.stack([one(image) for _ in range(views) for image in images])


@dataclass(frozen=True, kw_only=True)
class ViewsForm(Form):
    """One way to make the views: build(config, images, device) is the call. few: it works image by image."""

    build: Callable[[ViewsBench, int, str], Call]
    few: bool = False


FORMS = {
    "ours": ViewsForm(family="ours", build=ours),
    "ours, launched one by one": ViewsForm(family="ours", build=ours, timed="events", cuda_only=True),
    "ours, torch operations": ViewsForm(family="ours", build=partial(ours, backend="reference"), cuda_only=True),
    "torchvision on PIL images": ViewsForm(family="torchvision", build=torchvision_pil, timed="clock", few=True),
    "torchvision on tensors": ViewsForm(family="torchvision", build=torchvision_tensors, timed="events", few=True),
    "lightly on PIL images": ViewsForm(family="lightly", build=lightly, timed="clock", few=True),
}
GATHERS = {
    "ours, one gather": ViewsForm(family="ours", build=one_gather),
    "images copied by id, then our views": ViewsForm(family="plain torch", build=copied),
}


def bench_views(config: ViewsBench) -> Report:
    """Measure and return the report. DataError for a folder with too few images."""
    config = config.at_smoke_size()
    runtime = choose_runtime(config.device, "fp32", False)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        return _bench(config, runtime)
    finally:
        torch.set_num_threads(threads)
        held.cache_clear()


def _bench(config: ViewsBench, runtime: Runtime) -> Report:
    device = runtime.device
    cuda = device.type == "cuda"
    forms = {name: form for name, form in FORMS.items() if cuda or not form.cuda_only}
    if not find_spec("lightly") or config.views != 2:
        del forms["lightly on PIL images"]
    checks, faults = _verdicts(config, forms, device)
    works = [_work(config, f"{config.images:,} images", forms, faults, device)]
    if config.dataset:
        name = f"{config.images:,} images gathered from {config.dataset:,}"
        works.append(_work(config, name, GATHERS, {}, device))
    resident = held(config, config.images, str(device))
    errors = view_errors(
        resident.images.select(torch.arange(min(ERROR_IMAGES, config.images), device=device)), size=config.size
    )
    start = time.perf_counter()
    _drawn(config, resident, torch.arange(config.images), 0)
    draws = f"drawing a call's parameters takes the CPU {1e3 * (time.perf_counter() - start):.1f} ms"
    what = "synthetic noise" if config.root is None else f"{config.images} of {Path(config.root).name}"
    notes = [
        f"{draws}: on CUDA not in ours, done ahead by a thread in training" if cuda else f"{draws}: in ours",
        "torchvision and lightly work image by image in one process; their draws and the stacking of views are in",
        "lightly blurs with PIL's approximation by box filters; torchvision and ours with a Gaussian",
        f"images: {what}, decoded in memory, which is not in peak memory; the views are",
        *baseline.notes(),
    ]
    if config.dataset:
        notes.append("gathers: the ids and the draws are there, and are not in the time")
    if cuda:
        notes.append(f"what works image by image is called on {FEW} images; ms refers to all, peak memory to those")
    report = report_of_calls(
        "views", asdict(config), runtime, works, round_ms=config.round_ms, checks=checks, notes=notes
    )
    return report | {"op_errors": errors}


def _work(
    config: ViewsBench,
    case_name: str,
    forms: dict[str, ViewsForm],
    faults: dict[str, str],
    device: torch.device,
) -> OpCase:
    resident = held(config, config.images, str(device))
    read = float(3 * resident.sizes[: config.images].long().prod(1).sum())
    written = config.images * config.views * 3 * config.size**2 * _dtype(config, device).itemsize
    candidates = []
    for name, form in forms.items():
        count = min(config.images, FEW) if form.few and device.type == "cuda" else config.images
        build = partial(form.build, config)
        candidates.append(
            Candidate(
                name=name,
                family=form.family,
                make=partial(build, count, str(device)),
                make_small=partial(build, min(2, count), str(device)),
                items=count,
                timed=form.timed,
                fault=faults.get(name),
            )
        )
    return OpCase(
        name=f"{case_name}, {config.views} views of {config.size}, {config.policy}",
        unit="images",
        items=config.images,
        bound=lambda ceilings: (
            ceilings.bytes_s(read + written),
            f"{read / 1e6:.1f} MB of images read once and {written / 1e6:.1f} MB of views written, as a copy",
        ),
        candidates=tuple(candidates),
    )


def _verdicts(
    config: ViewsBench, forms: dict[str, ViewsForm], device: torch.device
) -> tuple[dict[str, Any], dict[str, str]]:
    """Whether all make views of the same images that look alike; ours, whether its backends agree value by value."""
    count = min(CHECK_IMAGES, config.images)
    bound = ALIKE / math.sqrt(count * config.views)
    torch.manual_seed(config.seed)
    made: dict[str, Any] = {name: form.build(config, count, str(device))() for name, form in forms.items()}
    values = {name: views.float().cpu() for name, views in made.items()}
    first = values["torchvision on PIL images"]
    checks, faults = dict[str, Any](), dict[str, str]()
    for name, x in values.items():
        off = max(abs(float(x.mean() - first.mean())), abs(float(x.std() - first.std())))
        alike = x.shape == first.shape and off <= bound
        words = (
            f"mean {float(x.mean()):.2f}, deviation {float(x.std()):.2f} of {list(x.shape)}, bound {bound:.2f} apart"
        )
        if device.type == "cuda" and forms[name].family == "ours":
            far = float((x - values["ours, torch operations"]).abs().mean())
            alike, words = alike and far <= SAME, f"{words}; {far:.1e} from torch operations, bound {SAME:.0e}"
        checks[f"{name}, {count} images"] = words
        if not alike:
            faults[name] = words
    return checks, faults
