"""The paper's other augmentations: quarter turns, Sobel, noise, cutout, against numpy, scipy and torchvision."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage, stats
from torch import Tensor

from fastsimclr.bench.view_errors import normals as slow_normals
from fastsimclr.kernels.views import make_views, noise, stencil
from fastsimclr.kernels.views.resample import quarter_turns
from fastsimclr.loaders.draw import Policy, ViewParams, draw
from fastsimclr.loaders.philox import philox4x32
from tests.kernels.test_views import EXTRAS, SIDES, TOLERANCE, check, drawn, expected_views, plain, ragged
from tests.loading import simclr

# log and cos of float32 against float64: some roundings of values up to 5.9, where the cosine is steepest.
NORMAL_TOLERANCE = 1e-5


def pixels(size: int, views: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(views, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_quarter_turns_are_numpys(size: int) -> None:
    x = pixels(size, 6)
    turned = quarter_turns(x, torch.tensor([0, 1, 2, 3, -1, 6], dtype=torch.int32))
    for row, turns in enumerate((0, 1, 2, 3, 3, 2)):
        assert np.array_equal(turned[row].numpy(), np.rot90(x[row].numpy(), turns, (1, 2)))


@pytest.mark.parametrize("policy", [plain(33, rotate90=0.7, flip=0.5), plain(33, rotate90=0.7, flip=0.5, rotate=30.0)])
def test_a_view_is_turned_before_it_is_flipped(policy: Policy) -> None:
    """All eight of turn and flip occur; the tolerance of a rotation is that of tests/kernels/test_views.py."""
    images, sizes = ragged(SIDES * 4)
    params = drawn(policy, sizes, 2)
    assert len({(int(q), bool(f)) for q, f in zip(params.quarter, params.flip, strict=True)}) == 8
    check(images, params, policy, 1e-4 if policy.rotate else TOLERANCE)


@given(size=st.integers(1, 40), seed=st.integers(0, 99))
def test_sobel_is_scipys(size: int, seed: int) -> None:
    x = pixels(size, 2, seed)
    ours = stencil.sobel(x.clone(), torch.tensor([True, False]))
    for plane, edges in zip(x[0].double().numpy(), ours[0].double().numpy(), strict=True):
        gy, gx = (ndimage.sobel(plane, axis, mode="reflect") for axis in (0, 1))
        # Eight roundings of float32 in values up to 1.
        np.testing.assert_allclose(edges, np.sqrt(gx**2 + gy**2) / np.sqrt(32), rtol=0, atol=1e-6)
    assert torch.equal(ours[1], x[1])


def test_sobel_stays_within_zero_and_one() -> None:
    """The strongest edges there are: random black and white, and a corner."""
    x = (pixels(64) > 0.5).float()
    x[0] = 0
    x[0, :, 32:, 32:] = 1
    edges = stencil.sobel(x, torch.ones(3, dtype=torch.bool))
    assert edges.min() == 0 and 0.7 < edges[0].max() <= 1 and edges.max() <= 1
    flat = stencil.sobel(torch.full((1, 3, 9, 9), 0.37), torch.tensor([True]))
    assert (flat == 0).all()


def test_philox_is_that_of_the_draws() -> None:
    """Against numpy's, which has the published known answers; keys and counters of all sizes, high bits set too."""
    counters = np.array([0, 1, 2, 63, 1000, 50175, 2**31 - 1, 2**31, 2**32 - 1])
    for key in (0, 1, 0x243F6A88, 2**31, 2**32 - 1):
        words = noise.philox(torch.from_numpy(counters), torch.tensor([[key]]))
        given = np.zeros((len(counters), 4), dtype=np.uint32)
        given[:, 0] = counters
        assert np.array_equal(torch.stack(words, -1)[0].numpy(), philox4x32(given, (key, 0)).astype(np.int64))


def test_normals_are_those_of_float64() -> None:
    keys = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 20020507], dtype=torch.int32)
    ours = noise.normals(keys, 32 * 32).view(-1, 3, 32, 32)
    expected = np.stack([slow_normals(key, 32) for key in keys.tolist()])
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=NORMAL_TOLERANCE)


def test_normals_are_normal_and_independent() -> None:
    """Fixed keys, so this always passes or never does; .001 is the chance that right numbers are unlucky here."""
    x = noise.normals(torch.arange(40, dtype=torch.int32), 2500).double()
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 0.001
    n = x.numel()
    mean, variance, skew, excess = x.mean(), x.var(), (x**3).mean(), (x**4).mean() - 3
    for value, std in ((mean, 1), (variance - 1, 2**0.5), (skew, 15**0.5), (excess, 96**0.5)):
        assert abs(value) < 4 * std / n**0.5
    # Channels, their squares (Box-Muller's two share a radius), neighbouring pixels, neighbouring keys.
    r, g, b = (x[:, channel].flatten() for channel in range(3))
    for one, other in ((r, g), (r, b), (g, b), (r**2, g**2), (r[1:], r[:-1]), (r[2500:], r[:-2500])):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 4 / len(one) ** 0.5
    assert x.isfinite().all() and x.abs().max() > 4


def test_noise_without_a_std_changes_nothing() -> None:
    x = pixels(9, 2)
    ours = noise.add_noise(x, torch.tensor([0.0, 0.3]), torch.tensor([5, 5], dtype=torch.int32))
    assert torch.equal(ours[0], x[0])
    expected = (x[1].double() + 0.3 * torch.from_numpy(slow_normals(5, 9))).clamp(0, 1)
    torch.testing.assert_close(ours[1].double(), expected, rtol=0, atol=NORMAL_TOLERANCE)
    assert ((ours[1] == 0) | (ours[1] == 1)).any()  # something was clipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cutout_is_exactly_zero_after_normalisation(dtype: torch.dtype) -> None:
    images, sizes = ragged(SIDES)
    policy = plain(17, cutout=0.5, normalise="imagenet")
    boxes = torch.tensor([[0, 0, 0, 0], [0, 0, 17, 17], [3, 5, 4, 2], [16, 0, 1, 9], [0, 16, 3, 1]], dtype=torch.int32)
    without = make_views(images, drawn(policy, sizes, 1, cutout=torch.zeros_like(boxes)), **policy.rendering)
    views = make_views(images, drawn(policy, sizes, 1, cutout=boxes), **policy.rendering, dtype=dtype)
    for view, whole, (top, left, height, width) in zip(views, without, boxes.tolist(), strict=True):
        expected = whole.clone()
        expected[:, top : top + height, left : left + width] = 0
        assert torch.equal(view, expected.to(dtype))
    assert (without != 0).all()  # so every zero is cutout's


def test_cutout_hides_even_what_is_no_number() -> None:
    x = stencil.cutout(torch.full((1, 3, 4, 4), torch.nan), torch.tensor([[1, 1, 2, 3]], dtype=torch.int32))
    assert (x[..., 1:3, 1:] == 0).all() and x.isnan().sum() == 3 * (16 - 6)


@pytest.mark.parametrize("semantics", ["torchvision", "tensorflow"])
@pytest.mark.parametrize("normalise", ["none", "imagenet"])
def test_each_op_stands_at_its_place(semantics: Any, normalise: Any) -> None:
    """Every op at once. torchvision: the oracle's whole chain; tensorflow: the same tail after the same head."""
    images, sizes = ragged(SIDES * 3)
    policy = dataclasses.replace(simclr(32, semantics), rotate=20.0, solarise=0.5, normalise=normalise, **EXTRAS)
    params = drawn(policy, sizes, 2, ops=policy.ops)
    assert policy.ops == {"rotate", "quarter", "flip", "jitter", "grey", "blur", "sobel", "noise", "solarise", "cutout"}
    ours = make_views(images, params, **policy.rendering)
    if semantics == "torchvision":
        expected = expected_views(images, params, policy)
    else:
        tail = ("sobel", "noise", "solarise", "cutout")
        head = dataclasses.replace(params, ops=params.ops - set(tail))
        plainly = make_views(images, head, **(policy.rendering | {"mean": None, "std": None}))
        expected = torch.stack([slow_tail(view, params, row, policy) for row, view in enumerate(plainly)])
    # Rotation's tolerance over ImageNet's std of .22; a value next to one half may be solarised on one side alone.
    error = (ours - expected).abs()
    assert (error > 1e-3).float().mean() < 2e-3
    assert error[error <= 1e-3].mean() < 1e-5


def slow_tail(x: Tensor, params: ViewParams, row: int, policy: Policy) -> Tensor:
    """Sobel, noise, solarise, normalise, cutout of one view in float64, pixel ops spelled out."""
    view = x.double().numpy()
    if params.sobel[row]:
        view = np.stack([np.hypot(ndimage.sobel(p, 0), ndimage.sobel(p, 1)) for p in view]) / np.sqrt(32)
    view = np.clip(view + float(params.noise[row]) * slow_normals(int(params.noise_key[row]), policy.size), 0, 1)
    if params.solarise[row]:
        view = np.where(view >= 0.5, 1 - view, view)
    if (mean := policy.rendering["mean"]) is not None and (std := policy.rendering["std"]) is not None:
        view = (view - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    top, left, height, width = params.cutout[row].tolist()
    view[:, top : top + height, left : left + width] = 0
    return torch.from_numpy(view).float()


def test_ops_without_a_chance_change_nothing() -> None:
    """`ops` is a licence to skip: computed for nobody, the extras change no bit."""
    images, sizes = ragged(SIDES)
    params = drawn(simclr(32), sizes)
    every = dataclasses.replace(params, ops=params.ops | {"quarter", "sobel", "noise", "cutout"})
    ours, theirs = (make_views(images, p, **simclr(32).rendering) for p in (params, every))
    assert torch.equal(ours, theirs)


def test_a_row_that_asks_for_nothing_is_left_as_it_is() -> None:
    """Blurred, noisy and cut by nothing, beside rows that are: not a bit changes."""
    images, sizes = ragged(SIDES)
    policy = plain(32, blur=1.0, noise=1.0, cutout=1.0, sobel=1.0)
    params = drawn(policy, sizes, 2)
    none = torch.zeros_like(params.noise_key)
    quiet = torch.arange(len(params)) % 2 == 0
    mixed = dataclasses.replace(
        params,
        sigma=torch.where(quiet, none, params.sigma),
        noise=torch.where(quiet, none, params.noise),
        cutout=torch.where(quiet[:, None], none[:, None], params.cutout),
        sobel=~quiet,
    )
    views = make_views(images, mixed, **policy.rendering)
    clean = make_views(images, dataclasses.replace(params, ops=frozenset()), **policy.rendering)
    assert torch.equal(views[quiet], clean[quiet]) and (views[~quiet] != clean[~quiet]).any((1, 2, 3)).all()


def test_views_with_extras_do_not_depend_on_the_batch() -> None:
    images, sizes = ragged(SIDES * 4)
    policy = dataclasses.replace(simclr(24), **EXTRAS)
    params = drawn(policy, sizes)
    views = make_views(images, params, **policy.rendering)
    for row in (0, 7, 39):
        names = [f.name for f in dataclasses.fields(params) if f.name != "ops"]
        one = dataclasses.replace(params, **{name: getattr(params, name)[row : row + 1] for name in names})
        torch.testing.assert_close(make_views(images, one, **policy.rendering)[0], views[row], rtol=0, atol=1e-5)


def test_two_views_of_an_image_get_different_noise() -> None:
    images, sizes = ragged([(32, 32)])
    policy = plain(32, crop="centre", noise=1.0)
    zero = torch.zeros(1, dtype=torch.int64)
    views = make_views(images, draw(policy, 0, zero, zero, 2, sizes), **policy.rendering)
    clean = make_views(images, draw(plain(32, crop="centre"), 0, zero, zero, 1, sizes), **policy.rendering)
    first, second = (views - clean).flatten(1)
    assert first.std() > 0.01 and abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.1
