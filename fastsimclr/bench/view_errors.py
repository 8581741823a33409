"""How far our views are from those of torchvision's own functions, op by op, on the same images and the same draws.

error = |ours - theirs| of values in [0, 1]. Theirs: torchvision on float32, and on uint8, which rounds after every op.
torchvision has neither Sobel's filter nor our noise: there scipy and plain numpy stand in.

    python -m fastsimclr.bench.view_errors FOLDER --size 224 --backend reference
"""

# N images, S side

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, get_args

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fastsimclr.kernels.backend import Backend
from fastsimclr.kernels.views import make_views
from fastsimclr.loaders import Policy, Ragged, ViewParams, draw
from fastsimclr.loaders.decode import decode
from fastsimclr.loaders.philox import philox4x32

_JITTER = "brightness", "contrast", "saturation", "hue"
_ADJUST = F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue
_NEUTRAL = torch.tensor([1.0, 1.0, 1.0, 0.0])
_CHUNK = 32  # images at a time, so that views at 224 pixels stay a small part of the memory


class OpError(TypedDict):
    """One op. max, mean: absolute error over all values of `images` views; uint8_max, uint8_mean: against uint8."""

    op: str
    oracle: str
    images: int
    max: float
    mean: float
    uint8_max: float | None
    uint8_mean: float | None


def view_errors(images: Ragged, backend: Backend = "auto", size: int = 224, seed: int = 0) -> list[OpError]:
    """The errors of each op alone, of crop and resize, and of SimCLR's whole chain, one view of each image.

    images: N images of any size on the device whose views are to be judged; the oracle works on the CPU.
    Each op alone works on the images as torchvision cuts them at size x size, so that no resizing is in its error.
    Ops that SimCLR draws with a probability are applied to every view; the chain is drawn as simclr() draws it.
    """
    params = _drawn("crop + resize", _crops(size), images, seed)
    cut = [_whole_numbers(images.image(row).cpu(), params, row, size) for row in range(len(images))]
    squares = Ragged(
        buffer=torch.cat(cut).to(images.buffer.device),
        offsets=torch.arange(len(images), device=images.buffer.device) * (3 * size * size),
        heights=torch.full_like(images.heights, size),
        widths=torch.full_like(images.widths, size),
    )
    rows = [_error("crop + resize", _crops(size), images, backend, seed)]
    rows += [_error(op, policy, squares, backend, seed) for op, policy in _single_ops(size).items()]
    return [*rows, _error("SimCLR's chain", Policy(size=size, normalise="none"), images, backend, seed)]


def read_images(folder: Path, count: int) -> Ragged:
    """The first `count` files of a flat folder, by name, decoded."""
    files = sorted(path for path in folder.iterdir() if path.is_file())[:count]
    if not files:
        raise ValueError(f"{folder} has no files; give a flat folder of images")
    pixels = [torch.from_numpy(decode(file.read_bytes(), file.name)) for file in files]
    sizes = torch.tensor([image.shape[:2] for image in pixels], dtype=torch.int32)
    return Ragged(
        buffer=torch.cat([image.flatten() for image in pixels]),
        offsets=torch.tensor([0] + [image.numel() for image in pixels[:-1]]).cumsum(0),
        heights=sizes[:, 0].contiguous(),
        widths=sizes[:, 1].contiguous(),
    )


def torchvision_view(image: Tensor, params: ViewParams, row: int, policy: Policy, eight_bit: bool = False) -> Tensor:
    """View `row` of the image (uint8 [H, W, 3], CPU) by torchvision's functions, float32 [3, S, S].

    eight_bit: every op but Sobel and noise works on uint8 and rounds, as with images that PIL has opened.
    """
    size, scale = policy.size, 255 if eight_bit else 1
    x: Tensor = image.permute(2, 0, 1) if eight_bit else image.permute(2, 0, 1).float() / 255
    x = F.resized_crop(x, *params.crop[row].tolist(), [size, size], InterpolationMode.BILINEAR, antialias=True)
    if policy.rotate:
        x = F.rotate(x, math.degrees(float(params.angle[row])), InterpolationMode.BILINEAR)
    x = torch.rot90(x, int(params.quarter[row]), (1, 2))
    if params.flip[row]:
        x = F.horizontal_flip(x)
    if params.jitter[row]:
        for op in params.order[row].tolist():
            x = _ADJUST[op](x, float(params.factors[row, op]))
    if params.grey[row]:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if params.sigma[row] > 0 and size >= 20:
        x = F.gaussian_blur(x, [2 * int(size // 10 / 2) + 1] * 2, [float(params.sigma[row])] * 2)
    if params.sobel[row]:
        x = sobel(x)
    if params.noise[row] > 0:
        noise = float(params.noise[row]) * normals(int(params.noise_key[row]), size)
        x = (x + torch.from_numpy(noise).float()).clamp(0, 1)
    if params.solarise[row]:
        x = F.solarize(x, 0.5 * scale)
    x = F.to_dtype(x, torch.float32, scale=True)
    mean, std = policy.rendering["mean"], policy.rendering["std"]
    if mean is not None and std is not None:
        x = F.normalize(x, list(mean), list(std))
    top, left, height, width = params.cutout[row].tolist()
    if height:
        x = F.erase(x, top, left, height, width, torch.zeros(()))
    return x


def _whole_numbers(image: Tensor, params: ViewParams, row: int, size: int) -> Tensor:
    """A crop of the image as uint8 [S * S * 3]."""
    view = torchvision_view(image, params, row, _crops(size), eight_bit=True)
    return view.mul(255).round().to(torch.uint8).permute(1, 2, 0).flatten()


def sobel(x: Tensor) -> Tensor:
    """The edges of [3, S, S] by scipy.ndimage.sobel, in float64 inside, scaled as skimage.filters.sobel scales them."""
    from scipy import ndimage  # type: ignore[import-untyped]

    edges = [np.hypot(ndimage.sobel(plane, 0), ndimage.sobel(plane, 1)) for plane in x.double().numpy()]
    return torch.from_numpy(np.stack(edges) / (4 * math.sqrt(2))).float()


def normals(key: int, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The standard normal numbers of a noise key for a view of `size` pixels, [3, S, S], in float64."""
    counter = np.zeros((size, size, 4), dtype=np.uint32)
    counter[..., 0] = np.arange(size * size).reshape(size, size)
    u = ((philox4x32(counter, (key % 2**32, 0)) >> np.uint32(8)) + 0.5) / 2.0**24
    first, second = (np.sqrt(-2 * np.log(u[..., place])) for place in (0, 2))
    turn, other = 2 * np.pi * u[..., 1], 2 * np.pi * u[..., 3]
    return np.stack([first * np.cos(turn), first * np.sin(turn), second * np.cos(other)])


def _crops(size: int, **changes: object) -> Policy:
    """Random crops, and what `changes` asks for."""
    off = dict.fromkeys(("flip", "jitter", "grey", "blur"), 0.0)
    return Policy(**({"size": size, "normalise": "none"} | off | changes))  # type: ignore[arg-type]


def _single_ops(size: int) -> dict[str, Policy]:
    """Each op on every view of images that are size x size already; the four of colour jitter go by the same policy."""
    ops: dict[str, dict[str, object]] = {
        "flip": {"flip": 1.0},
        "rotate": {"rotate": 45.0},
        "quarter turn": {"rotate90": 1.0},
        **{key: {"jitter": 1.0} for key in _JITTER},
        "grey": {"grey": 1.0},
        "blur": {"blur": 1.0},
        "sobel": {"sobel": 1.0},
        "noise": {"noise": 1.0},
        "solarise": {"solarise": 1.0},
        "normalise": {"normalise": "imagenet"},
        "cutout": {"cutout": 1.0},
    }
    return {op: _crops(size, crop="centre", centre_fraction=1.0, **changes) for op, changes in ops.items()}


def _drawn(op: str, policy: Policy, images: Ragged, seed: int, first_id: int = 0) -> ViewParams:
    """The draws of one view of each image, on the CPU; those of one jitter op leave the other three neutral."""
    n, shapes = len(images), torch.stack([images.heights, images.widths], 1).cpu()
    params = draw(policy, seed, torch.zeros(n), torch.arange(first_id, first_id + n), 1, shapes)
    if op not in _JITTER:
        return params
    return replace(params, factors=torch.where(torch.arange(4) == _JITTER.index(op), params.factors, _NEUTRAL))


def _error(op: str, policy: Policy, images: Ragged, backend: Backend, seed: int) -> OpError:
    device = images.buffer.device
    no_uint8 = op in ("sobel", "noise")
    far: dict[bool, list[float]] = {False: [], True: []}
    typical: dict[bool, list[float]] = {False: [], True: []}
    for first in range(0, len(images), _CHUNK):
        chunk = images.select(torch.arange(first, min(first + _CHUNK, len(images)), device=device))
        params = _drawn(op, policy, chunk, seed, first)
        ours = make_views(chunk, params.to(device), backend=backend, **policy.rendering).cpu()
        for row, view in enumerate(ours):
            image = chunk.image(row).cpu()
            for eight_bit in (False,) if no_uint8 else (False, True):
                error = (view - torchvision_view(image, params, row, policy, eight_bit)).abs()
                far[eight_bit].append(float(error.max()))
                typical[eight_bit].append(float(error.double().mean()))
    # Views are of one size, so the mean of their means is the mean; numpy's max, unlike Python's, keeps a NaN.
    return OpError(
        op=op,
        oracle={"sobel": "scipy", "noise": "numpy"}.get(op, "torchvision"),
        images=len(images),
        max=float(np.max(far[False])),
        mean=float(np.mean(typical[False])),
        uint8_max=None if no_uint8 else float(np.max(far[True])),
        uint8_mean=None if no_uint8 else float(np.mean(typical[True])),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of docs/views.md for a flat folder of images."""
    parser = argparse.ArgumentParser(prog="fastsimclr.bench.view_errors", description=__doc__)
    parser.add_argument("folder", type=Path, help="A flat folder of images.")
    parser.add_argument("--images", type=int, default=400, help="How many of them, by name.")
    parser.add_argument("--size", type=int, default=224, help="Side of the views in pixels.")
    parser.add_argument("--device", default="cpu", help="Where ours run.")
    parser.add_argument("--backend", choices=get_args(Backend), default="auto", help="Which of ours.")
    options = parser.parse_args(arguments)
    images = read_images(options.folder, options.images).to(torch.device(options.device))
    print("| op | against | images | max | mean | 8-bit max | 8-bit mean |\n|" + " --- |" * 7)
    for row in view_errors(images, options.backend, options.size):
        errors = (row["max"], row["mean"], row["uint8_max"], row["uint8_mean"])
        cells = [row["op"], row["oracle"], str(row["images"]), *("-" if e is None else f"{e:.1e}" for e in errors)]
        print("| " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
