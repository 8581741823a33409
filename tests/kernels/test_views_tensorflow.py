"""Views under tensorflow semantics against what google-research/simclr's own code computed with TensorFlow 2.21."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsimclr.kernels.views import colour, make_views
from fastsimclr.kernels.views.resample import axis_weights, resample
from fastsimclr.loaders.batch import Ragged
from fastsimclr.loaders.draw import Policy, ViewParams, draw
from tests.loading import evaluation

TOLERANCE = 1e-6  # what the oracle's notes call reachable, in float32


@pytest.fixture(scope="module")
def oracle(data_dir: Path) -> dict[str, np.ndarray]:
    with np.load(data_dir / "google-simclr-oracle.npz") as file:
        return {key: file[key] for key in file.files if key.startswith("image/")}


def planar(array: np.ndarray) -> Tensor:
    """[H, W, 3] as [1, 3, H * W]."""
    return torch.from_numpy(array).permute(2, 0, 1).flatten(1)[None].contiguous()


def photo(oracle: dict[str, np.ndarray]) -> Ragged:
    """The oracle's input; its values are whole numbers of 1/255."""
    scaled = oracle["image/input"] * 255
    pixels = torch.from_numpy(np.rint(scaled)).to(torch.uint8)
    assert np.abs(scaled - np.rint(scaled)).max() < 1e-4
    height, width = pixels.shape[:2]
    return Ragged(
        buffer=pixels.flatten(),
        offsets=torch.zeros(1, dtype=torch.int64),
        heights=torch.tensor([height], dtype=torch.int32),
        widths=torch.tensor([width], dtype=torch.int32),
    )


def one_view(images: Ragged, policy: Policy, **changes: Any) -> ViewParams:
    zero, sizes = torch.zeros(1, dtype=torch.int64), torch.stack([images.heights, images.widths], 1)
    return dataclasses.replace(draw(policy, 0, zero, zero, 1, sizes), **changes)


def slot_of(op: int, factor: float, brightness: str = "multiply") -> colour.Jitter:
    """A plan whose first slot is the op asked for; `low` and `high` are opened, as the oracle's ops do not clip."""
    images = Ragged(buffer=torch.zeros(3, dtype=torch.uint8), offsets=torch.zeros(1, dtype=torch.int64),
                    heights=torch.ones(1, dtype=torch.int32), widths=torch.ones(1, dtype=torch.int32))  # fmt: skip
    order = torch.tensor([[op, *(k for k in range(4) if k != op)]], dtype=torch.int32)
    factors = torch.tensor([[0.0 if brightness == "add" else 1.0, 1.0, 1.0, 0.0]])
    factors[0, op] = factor
    policy = Policy(semantics="tensorflow", jitter=1.0)
    params = one_view(images, policy, order=order, factors=factors)
    plan = colour.Jitter.plan(params, "tensorflow", brightness)  # type: ignore[arg-type]
    inf = torch.full_like(plan.low, math.inf)
    return dataclasses.replace(plan, low=-inf, high=inf, most=torch.full_like(plan.most, math.inf))


@pytest.mark.parametrize(
    ("name", "op", "brightness"),
    [("brightness_v2", 0, "multiply"), ("brightness_v1", 0, "add"), ("contrast", 1, "multiply"),
     ("saturation", 2, "multiply"), ("hue", 3, "multiply")],
)  # fmt: skip
def test_jitter_ops(oracle: dict[str, np.ndarray], name: str, op: int, brightness: str) -> None:
    keys = [key for key in oracle if key.startswith(f"image/{name}/")]
    assert len(keys) >= 2
    for key in keys:
        plan = slot_of(op, float(key.rsplit("/", 1)[1]), brightness)
        ours = plan.apply(planar(oracle["image/input"]), slice(0, 1), "tensorflow")
        if name == "brightness_v2":
            ours = ours.clamp(0, 1)
        torch.testing.assert_close(ours, planar(oracle[key]), rtol=0, atol=TOLERANCE)


def test_grey(oracle: dict[str, np.ndarray]) -> None:
    x = planar(oracle["image/input"])
    ours = colour.grey(torch.cat([x, x]), torch.tensor([True, False]))
    torch.testing.assert_close(ours[:1], planar(oracle["image/grey"]), rtol=0, atol=TOLERANCE)
    assert torch.equal(ours[1:], x)


@pytest.mark.parametrize(
    ("key", "box", "size"),
    [
        ("image/crop_7_11_60_90/bicubic_32", (7, 11, 60, 90), 32),
        ("image/crop_7_11_60_90/bicubic_80", (7, 11, 60, 90), 80),
        ("image/center_crop_64", None, 64),
    ],
)
def test_crop_and_bicubic(oracle: dict[str, np.ndarray], key: str, box: tuple[int, ...] | None, size: int) -> None:
    """Through the weights themselves, as make_views clips what bicubic overshoots; then through make_views."""
    images = photo(oracle)
    policy = evaluation(size, "tensorflow")
    params = one_view(images, policy)
    if box is not None:
        crop = torch.tensor([box], dtype=torch.int32)
        params = dataclasses.replace(params, crop=crop, extent=crop[:, 2:])
    top, left, height, width = params.crop[0].tolist()
    window = images.image(0)[top : top + height, left : left + width].reshape(1, height, 3 * width)
    grid = torch.arange(size)[None]
    weights = [axis_weights("tensorflow", torch.tensor([side]), 0, grid, size, side) for side in (height, width)]
    expected = planar(oracle[key]).view(1, 3, size, size)
    torch.testing.assert_close(resample(window, *weights), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(make_views(images, params, **policy.rendering), expected.clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("length", "size"), [(50, 7), (50, 33), (9, 40), (1, 5), (2, 3), (333, 224)])
def test_bicubic_weights_in_plain_loops(length: int, size: int) -> None:
    """The offset rounded to 1/1024, as TensorFlow's table has it: the oracle's sizes all fall on its entries."""

    def keys(x: float, a: float = -0.75) -> float:
        x = abs(x)
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a

    expected = torch.zeros(size, length, dtype=torch.float64)
    for out in range(size):
        place = np.float32(out) * (np.float32(length) / np.float32(size))
        offset = round(float(place - np.floor(place)) * 1024) / 1024
        for tap in (-1, 0, 1, 2):
            expected[out, min(max(int(place) + tap, 0), length - 1)] += keys(offset - tap)
    ours = axis_weights("tensorflow", torch.tensor([length]), 0, torch.arange(size)[None], size, length)
    torch.testing.assert_close(ours[0].double(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["blur_kernel9", "blur_kernel22"])
def test_blur(oracle: dict[str, np.ndarray], name: str) -> None:
    """Zero padding. The photo is 96 by 128 and our views are square: the same kernel on both axes, side by side."""
    expected = {float(key.rsplit("/", 1)[1]): value for key, value in oracle.items() if f"/{name}/" in key}
    assert len(expected) >= 2
    radius = {"blur_kernel9": 4, "blur_kernel22": 11}[name]
    x = torch.from_numpy(oracle["image/input"]).permute(2, 0, 1)[None]
    for sigma, value in expected.items():
        kernels = [colour.blur_matrix(torch.tensor([sigma]), side, radius, "tensorflow") for side in (96, 128)]
        ours = kernels[0] @ x @ kernels[1].transpose(1, 2)
        torch.testing.assert_close(ours[0].permute(1, 2, 0), torch.from_numpy(value), rtol=0, atol=TOLERANCE)


def test_the_chain_is_its_ops_in_order_with_a_clip_after_each(oracle: dict[str, np.ndarray]) -> None:
    """Google's order for one view: bicubic, contrast, brightness (v1), saturation, hue, grey off, blur: by hand."""
    images = photo(oracle)
    policy = Policy(size=32, semantics="tensorflow", brightness="add", flip=0.0, jitter=1.0, grey=0.0, blur=1.0)
    crop = torch.tensor([[7, 11, 60, 90]], dtype=torch.int32)
    factors, order = torch.tensor([[-0.3, 1.7, 1.4, 0.13]]), torch.tensor([[1, 0, 2, 3]], dtype=torch.int32)
    params = one_view(images, policy, crop=crop, extent=crop[:, 2:], factors=factors, order=order,
                      sigma=torch.tensor([0.8]))  # fmt: skip
    x = oracle["image/crop_7_11_60_90/bicubic_32"].astype(np.float64)
    mean = x.mean((0, 1))
    x = np.clip((x - mean) * 1.7 + mean, 0, 1)
    x = np.clip(x - 0.3, 0, 1)
    x = np.array([[saturate_and_turn(pixel, 1.4, 0.13) for pixel in row] for row in x])
    taps = np.exp(-0.5 * (np.arange(-1, 2) / 0.8) ** 2)
    taps /= taps.sum()
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    x = sum(taps[i] * taps[j] * padded[i : i + 32, j : j + 32] for i in range(3) for j in range(3))
    ours = make_views(images, params, **policy.rendering)[0].permute(1, 2, 0)
    torch.testing.assert_close(ours.double(), torch.from_numpy(x), rtol=0, atol=2e-5)


def saturate_and_turn(pixel: np.ndarray, factor: float, turns: float) -> tuple[float, float, float]:
    """Python's own HSV."""
    import colorsys

    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    return colorsys.hsv_to_rgb((hue + turns) % 1, min(saturation * factor, 1), value)


def test_a_view_without_jitter_is_not_clipped_before_grey(oracle: dict[str, np.ndarray]) -> None:
    """Bicubic overshoots 1; Google clips after grey, so the grey of the unclipped view counts."""
    images = photo(oracle)
    policy = Policy(size=32, semantics="tensorflow", flip=0.0, jitter=0.5, grey=0.5, blur=0.0)
    crop = torch.tensor([[7, 11, 60, 90]], dtype=torch.int32)
    no, yes = torch.tensor([False]), torch.tensor([True])
    params = one_view(images, policy, crop=crop, extent=crop[:, 2:], jitter=no, grey=yes)
    x = oracle["image/crop_7_11_60_90/bicubic_32"]
    expected = np.clip(x @ np.array([0.2989, 0.587, 0.114]), 0, 1)
    assert np.abs(expected - np.clip(x, 0, 1) @ np.array([0.2989, 0.587, 0.114])).max() > 1e-4
    ours = make_views(images, params, **policy.rendering)[0]
    for channel in ours:
        torch.testing.assert_close(channel.double(), torch.from_numpy(expected), rtol=0, atol=1e-5)
