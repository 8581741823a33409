"""Views under torchvision semantics: each op and the whole chain against torchvision's, on ragged images."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fastsimclr.bench.view_errors import torchvision_view
from fastsimclr.kernels.views import make_views, reference
from fastsimclr.loaders.batch import Ragged
from fastsimclr.loaders.draw import Policy, ViewParams, draw
from tests.loading import crop_flip, evaluation, simclr

# float32 on both sides, some twenty roundings of values in [0, 1]; hue divides by small chroma and is clipped.
TOLERANCE = 1e-5
SIDES = [(40, 50), (33, 90), (120, 24), (7, 5), (64, 64)]
EXTRAS: dict[str, Any] = dict(rotate90=0.5, sobel=0.5, noise=0.5, cutout=0.5)


def ragged(sides: list[tuple[int, int]], seed: int = 0, gap: int = 0) -> tuple[Ragged, Tensor]:
    """Smooth random images, so that hue and blur have something to keep, `gap` bytes apart; and their sizes [N, 2]."""
    generator = torch.Generator().manual_seed(seed)
    pieces, offsets, end = [], [], 0
    for height, width in sides:
        coarse = torch.rand(1, 3, max(height // 4, 1), max(width // 4, 1), generator=generator)
        image = F.resize(coarse, [height, width])[0].mul(1.6).sub(0.3).clamp(0, 1).mul(255).round().to(torch.uint8)
        pieces += [image.permute(1, 2, 0).flatten(), torch.full((gap,), 255, dtype=torch.uint8)]
        offsets.append(end)
        end += 3 * height * width + gap
    sizes = torch.tensor(sides, dtype=torch.int32)
    buffer = torch.cat(pieces)[: end - gap]
    return Ragged(buffer=buffer, offsets=torch.tensor(offsets), heights=sizes[:, 0], widths=sizes[:, 1]), sizes


def drawn(policy: Policy, sizes: Tensor, views: int = 2, **changes: Any) -> ViewParams:
    n = len(sizes)
    return dataclasses.replace(draw(policy, 11, torch.zeros(n), torch.arange(n), views, sizes), **changes)


def expected_views(images: Ragged, params: ViewParams, policy: Policy) -> Tensor:
    """The views by torchvision's own functions, one at a time."""
    sources = [images.image(row) for row in params.source.tolist()]
    return torch.stack([torchvision_view(image, params, row, policy) for row, image in enumerate(sources)])


def check(images: Ragged, params: ViewParams, policy: Policy, tolerance: float = TOLERANCE) -> None:
    views = make_views(images, params, **policy.rendering)
    expected = expected_views(images, params, policy)
    torch.testing.assert_close(views, expected, rtol=0, atol=tolerance)


def plain(size: int, **changes: Any) -> Policy:
    """A policy of one op: random crops, and what `changes` asks for."""
    base: dict[str, Any] = dict(size=size, flip=0.0, jitter=0.0, grey=0.0, blur=0.0, normalise="none")
    return Policy(**(base | changes))


@pytest.mark.parametrize("size", [1, 5, 32, 77])
def test_crop_and_resize(size: int) -> None:
    images, sizes = ragged(SIDES)
    check(images, drawn(plain(size), sizes, views=4), plain(size))


@pytest.mark.parametrize("policy", [evaluation(48), evaluation(32)])
def test_evaluation(policy: Policy) -> None:
    images, sizes = ragged(SIDES)
    check(images, drawn(policy, sizes, views=1), policy)


@pytest.mark.parametrize("policy", [plain(32, flip=1.0), plain(32, rotate=30.0, flip=0.5), plain(33, rotate=90.0)])
def test_flip_and_rotate(policy: Policy) -> None:
    images, sizes = ragged(SIDES)
    # Sampling positions of the two grids differ by their rounding, times the steepest slope of the image.
    check(images, drawn(policy, sizes, views=4), policy, 1e-4 if policy.rotate else TOLERANCE)


@pytest.mark.parametrize("op", range(4))
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.7])
def test_one_jitter_op(op: int, factor: float) -> None:
    images, sizes = ragged(SIDES)
    policy = plain(32, jitter=1.0)
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(len(sizes), 1)
    factors[:, op] = factor if op < 3 else {0.0: -0.5, 0.3: -0.1, 1.0: 0.0, 1.7: 0.5}[factor]
    params = drawn(policy, sizes, 1, factors=factors)
    check(images, params, policy)


@pytest.mark.parametrize("policy", [plain(32, grey=0.5), plain(32, solarise=0.5)])
def test_grey_and_solarise(policy: Policy) -> None:
    images, sizes = ragged(SIDES)
    params = drawn(policy, sizes, 4)
    views = make_views(images, params, **policy.rendering)
    expected = expected_views(images, params, policy)
    # A value within a rounding of one half may fall on either side of the threshold.
    near = ((views - 0.5).abs() < TOLERANCE) | ((expected - 0.5).abs() < TOLERANCE)
    assert ((views - expected).abs() <= TOLERANCE).logical_or(near).all()
    assert (views - expected).abs().mean() < TOLERANCE


@pytest.mark.parametrize("size", [16, 20, 32, 64, 100])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur(size: int, sigma: float) -> None:
    images, sizes = ragged(SIDES)
    policy = plain(size, blur=0.5, sigma=(sigma, sigma))
    check(images, drawn(policy, sizes, 2), policy)


@pytest.mark.parametrize("size", [32, 48])
def test_the_whole_chain(size: int) -> None:
    """Every order of the jitter ops; twice the tolerance of one op, divided by ImageNet's std of .22."""
    images, sizes = ragged(SIDES * 10)
    policy = dataclasses.replace(simclr(size), blur=0.7, jitter=0.9)
    orders = torch.tensor(list(itertools.permutations(range(4))) * 5, dtype=torch.int32)[:100]
    check(images, drawn(policy, sizes, 2, order=orders), policy, 1e-4)


def test_the_whole_chain_on_photographs(imagenet_samples: Any) -> None:
    import simplejpeg

    files = sorted(imagenet_samples.iterdir())[::40]
    photos = [torch.from_numpy(simplejpeg.decode_jpeg(file.read_bytes())) for file in files]
    sizes = torch.tensor([photo.shape[:2] for photo in photos], dtype=torch.int32)
    offsets = torch.tensor([0] + [photo.numel() for photo in photos[:-1]]).cumsum(0)
    buffer = torch.cat([photo.flatten() for photo in photos])
    images = Ragged(buffer=buffer, offsets=offsets, heights=sizes[:, 0], widths=sizes[:, 1])
    check(images, drawn(simclr(224), sizes, 1), simclr(224), 1e-4)


@pytest.mark.parametrize("gap", [0, 1, 5, 64])
def test_windows_at_every_edge_and_gap(gap: int) -> None:
    """Wide windows beside narrow images, first and last in the buffer, 1 pixel and 1 x 100: nothing leaks in."""
    for sides in ([(1, 1)], [(1, 100), (50, 1)], [(50, 1), (1, 100)], [(3, 90), (60, 2), (1, 1)], [(9, 9), (9, 9)]):
        images, sizes = ragged(sides, gap=gap)
        policy = plain(9)
        n = len(sides)
        whole = torch.cat([torch.zeros_like(sizes), sizes], 1)
        last = torch.cat([sizes - 1, torch.ones_like(sizes)], 1)
        crop = torch.cat([whole, last])
        check(images, drawn(policy, sizes, 2, crop=crop, extent=crop[:, 2:]), policy)
        for row in range(n):
            alone = drawn(policy, sizes, 2)
            part = dataclasses.replace(
                alone, **{f.name: getattr(alone, f.name)[row : row + 1] for f in dataclasses.fields(alone)[:-1]}
            )
            check(images, part, policy)


def test_a_choice_of_a_resident_set() -> None:
    """Three rows of a buffer of many images, one of them twice: what ids select from a set held in memory."""
    images, sizes = ragged([(32, 32)] * 12)
    index = torch.tensor([11, 0, 11])
    check(images.select(index), drawn(simclr(32), sizes[index], 2), simclr(32), 1e-4)


def test_views_do_not_depend_on_the_batch() -> None:
    images, sizes = ragged(SIDES * 8)
    params = drawn(simclr(40), sizes)
    views = make_views(images, params, **simclr(40).rendering)
    for row in (0, 17, 79):
        fields = dataclasses.fields(params)[:-1]
        one = dataclasses.replace(params, **{f.name: getattr(params, f.name)[row : row + 1] for f in fields})
        torch.testing.assert_close(make_views(images, one, **simclr(40).rendering)[0], views[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_type_and_layout(dtype: torch.dtype) -> None:
    images, sizes = ragged(SIDES)
    params = drawn(simclr(32), sizes)
    exact = make_views(images, params, **simclr(32).rendering)
    with torch.autocast("cpu", torch.bfloat16):
        views = make_views(images, params, **simclr(32).rendering, dtype=dtype)
    assert views.dtype == dtype and views.shape == (10, 3, 32, 32)
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(views, exact.to(dtype))


def test_precision_settings_are_neither_used_nor_changed() -> None:
    images, sizes = ragged(SIDES)
    params = drawn(simclr(32), sizes)
    exact = make_views(images, params, **simclr(32).rendering)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(make_views(images, params, **simclr(32).rendering), exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_ops_left_out_by_the_policy_change_nothing() -> None:
    """`ops` is a licence to skip: with it or without it the views of crop_flip are the same."""
    images, sizes = ragged(SIDES)
    params = drawn(crop_flip(32), sizes)
    every = dataclasses.replace(params, ops=simclr(32).ops)
    ours, theirs = (make_views(images, p, **crop_flip(32).rendering) for p in (params, every))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("semantics", ["torchvision", "tensorflow"])
def test_nothing_waits_for_the_device(semantics: Any) -> None:
    """On the meta device there are no values to read: a sync or a shape that depends on the data would raise."""
    images, sizes = ragged(SIDES)
    policy = dataclasses.replace(simclr(48, semantics), rotate=10.0, solarise=0.2, **EXTRAS)
    meta = torch.device("meta")
    # The reference itself: through make_views the meta device would meet the operator's stand-in alone.
    params = drawn(policy, sizes).to(meta)
    views = reference.make_views(images.to(meta), params, **policy.rendering, dtype=torch.float16)
    assert views.shape == (10, 3, 48, 48) and views.device == meta


def test_no_views_of_no_images() -> None:
    images, sizes = ragged(SIDES)
    params = drawn(simclr(32), sizes[:0])
    assert make_views(images, params, **simclr(32).rendering).shape == (0, 3, 32, 32)


def test_bad_arguments_are_refused() -> None:
    images, sizes = ragged(SIDES)
    params = drawn(simclr(32), sizes)
    with pytest.raises(ValueError, match="backend='eager' is not available for views"):
        make_views(images, params, size=32, backend="eager")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="both or neither"):
        make_views(images, params, size=32, mean=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="semantics='jax'"):
        make_views(images, params, size=32, semantics="jax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on cpu, parameters on meta"):
        make_views(images, params.to(torch.device("meta")), size=32)
