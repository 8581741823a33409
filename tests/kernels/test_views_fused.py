"""The fused views against the plain torch reference: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fastsimclr.kernels.views import colour, fused, make_views
from fastsimclr.kernels.views.fused_blur import blur_kernel
from fastsimclr.kernels.views.op import FIELDS, Pixels, make_views_op
from fastsimclr.loaders.batch import Ragged
from fastsimclr.loaders.draw import Policy, ViewParams, draw
from tests.loading import simclr

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOTH = ("torchvision", "tensorflow")
# The same float32 formulas: some twenty roundings of values in [0, 1], and sums in another order. Hue divides by small
# chroma and is clipped.
TOLERANCE = 1e-5
# Sampling positions of up to 32 pixels, rounded in another order, times the steepest slope, 1 a pixel.
ROTATED = 5e-5
SIDES = [(40, 50), (23, 61), (7, 5)]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel does not write, or reads before it is written, is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def ragged(sides: list[tuple[int, int]], gap: int = 0) -> tuple[Ragged, Tensor]:
    """Smooth random images `gap` bytes of 255 apart, and their sizes [N, 2]."""
    generator = torch.Generator().manual_seed(len(sides))
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


def drawn(policy: Policy, sizes: Tensor, views: int = 1, **changes: Any) -> ViewParams:
    n = len(sizes)
    return dataclasses.replace(draw(policy, 3, torch.zeros(n), torch.arange(n), views, sizes), **changes)


def policy_of(size: int, semantics: Any = "torchvision", **changes: Any) -> Policy:
    """A policy of crops, and what `changes` asks for."""
    base: dict[str, Any] = dict(size=size, flip=0.0, jitter=0.0, grey=0.0, blur=0.0, normalise="none")
    return Policy(**(base | {"semantics": semantics} | changes))


def both(
    images: Ragged, params: ViewParams, policy: Policy, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Fused and reference."""
    images, params = images.to(DEVICE), params.to(DEVICE)
    look = policy.rendering
    ours = make_views(images, params, **look, dtype=dtype, backend="fused")
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    return ours, make_views(images, params, **look, dtype=dtype, backend="reference")


def check(images: Ragged, params: ViewParams, policy: Policy, tolerance: float = TOLERANCE) -> None:
    ours, expected = both(images, params, policy)
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


EACH: dict[str, dict[str, Any]] = {
    "resize": {}, "flip": {"flip": 0.5}, "rotate": {"rotate": 40.0, "flip": 0.5}, "right angle": {"rotate": 90.0},
    "quarter": {"rotate90": 0.8, "flip": 0.5}, "grey": {"grey": 0.5}, "blur": {"blur": 0.7}, "sobel": {"sobel": 0.6},
    "blur, sobel": {"blur": 0.5, "sobel": 0.6}, "noise": {"noise": 0.7},
    "cutout": {"cutout": 0.8, "normalise": "imagenet"},
}  # fmt: skip


# The fast set has both semantics of these ops, which differ between them. The other ops are slow.
TWICE = ("resize", "grey", "sobel")


@pytest.mark.parametrize(
    "op, semantics",
    [
        pytest.param(op, semantics, marks=[] if op in TWICE else pytest.mark.slow)
        for op in EACH
        for semantics in reversed(BOTH)
    ],
)
def test_each_op(op: str, semantics: str) -> None:
    images, sizes = ragged(SIDES[1:], gap=1)
    policy = policy_of(20, semantics, **EACH[op])
    params = drawn(policy, sizes, 2)
    for name in policy.ops - {"rotate"}:
        chosen = getattr(params, {"blur": "sigma"}.get(name, name)).view(4, -1).any(1)
        assert chosen.any() and (op != "flip" or not chosen.all())
    check(images, params, policy, ROTATED if policy.rotate else TOLERANCE)


@pytest.mark.parametrize(
    ("semantics", "brightness", "part"),
    [
        ("torchvision", "multiply", slice(0, None, 3)),
        pytest.param("tensorflow", "multiply", slice(1, None, 3), marks=pytest.mark.slow),
        pytest.param("tensorflow", "add", slice(2, None, 3), marks=pytest.mark.slow),
        pytest.param("torchvision", "multiply", slice(None), marks=pytest.mark.slow),
        pytest.param("tensorflow", "multiply", slice(None), marks=pytest.mark.slow),
        pytest.param("tensorflow", "add", slice(None), marks=pytest.mark.slow),
    ],
)
def test_every_order_of_the_jitter(semantics: str, brightness: str, part: slice) -> None:
    """Each of the 24 orders under one of the formulas; under each of them where slow."""
    orders = torch.tensor(list(itertools.permutations(range(4)))[part], dtype=torch.int32)
    images, sizes = ragged([(9, 11)] * len(orders))
    policy = policy_of(8, semantics, brightness=brightness, jitter=0.9, grey=0.2)
    check(images, drawn(policy, sizes, order=orders), policy)


@pytest.mark.parametrize("semantics", BOTH)
def test_solarised_pixels(semantics: str) -> None:
    """A value within a rounding of one half may fall on either side of the threshold: few do."""
    images, sizes = ragged(SIDES)
    policy = policy_of(32, semantics, solarise=0.7, jitter=0.8)
    ours, expected = both(images, drawn(policy, sizes, 2), policy)
    far = (ours - expected).abs() > TOLERANCE
    assert float(far.float().mean()) < 1e-3
    near = ((ours - 0.5).abs() < TOLERANCE) | ((expected - 0.5).abs() < TOLERANCE)
    assert (near | ~far).all()


@pytest.mark.parametrize(
    ("size", "semantics", "views"),
    [
        (7, "torchvision", 2),
        pytest.param(32, "tensorflow", 1, marks=pytest.mark.slow),
        *(pytest.param(*case, 2, marks=pytest.mark.slow) for case in itertools.product((7, 32), BOTH)),
    ],
)
def test_the_whole_chain_in_one_tile(size: int, semantics: Any, views: int) -> None:
    images, sizes = ragged(SIDES, gap=5)
    policy = dataclasses.replace(simclr(size, semantics), jitter=0.9, blur=0.6, sobel=0.2, cutout=0.3, noise=0.3)
    # ImageNet's normalisation divides by .22.
    check(images, drawn(policy, sizes, views), policy, 5 * TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("semantics", ["torchvision", pytest.param("tensorflow", marks=pytest.mark.slow)])
def test_the_whole_chain_in_several_tiles(semantics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums, halos across tiles, and scratch memory for one view at a time."""
    monkeypatch.setattr(fused, "SCRATCH_BYTES", 3 * 33 * 33 * 4)
    images, sizes = ragged([(40, 50), (23, 61)])
    policy = dataclasses.replace(simclr(33, semantics), jitter=1.0, blur=1.0, grey=0.0)
    orders = torch.tensor([[0, 2, 1, 3], [3, 1, 0, 2]], dtype=torch.int32)
    blurred = torch.tensor([0.9, 0.0])
    check(images, drawn(policy, sizes, order=orders, sigma=blurred), policy, 5 * TOLERANCE)


@pytest.mark.parametrize(
    ("dtype", "digits", "semantics", "views"),
    [
        (torch.float16, 11, "torchvision", 1),
        (torch.bfloat16, 8, "tensorflow", 1),
        *(
            pytest.param(dtype, digits, semantics, 2, marks=pytest.mark.slow)
            for dtype, digits in ((torch.float16, 11), (torch.bfloat16, 8))
            for semantics in BOTH
        ),
    ],
)
def test_sixteen_bits(dtype: torch.dtype, digits: int, semantics: Any, views: int) -> None:
    """Within TOLERANCE and one unit in the last place, and 3e-4 of a value in [0, 1] where a view waited as float16.

    One unit and not a half: where the two float32 values straddle a rounding boundary, and as Triton's interpreter
    cuts a bfloat16 off instead of rounding it. Scratch holds x - .5 with 11 digits: half a unit is 2^-13 at most, and
    the blur rounds twice like that.
    """
    images, sizes = ragged(SIDES)
    policy = dataclasses.replace(simclr(24, semantics), jitter=0.9, blur=0.5)
    sigma = torch.tensor([0.0, 0.2, 0.7, 0.0, 1.2, 2.0] if views == 2 else [0.0, 0.7, 2.0])
    params = drawn(policy, sizes, views, sigma=sigma)
    ours, expected = both(images, params, policy, dtype)
    scale = 0.225 if policy.rendering["std"] else 1.0
    unit = 2.0 ** (expected.float().abs().clamp(min=2**-14).log2().floor() - digits + 1)
    waited = (params.sigma > 0).to(DEVICE)[:, None, None, None].float() * 3e-4 / scale
    over = (ours.float() - expected.float()).abs() / (TOLERANCE / scale + unit + waited)
    assert float(over.max()) <= 1, over.amax((1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("gap", [0, 1, 5])
def test_windows_at_every_edge(gap: int) -> None:
    """First and last in the buffer, 1 pixel, one row, one column, the last pixel alone: nothing leaks in."""
    images, sizes = ragged([(1, 30), (20, 1), (1, 1), (9, 9)], gap=gap)
    whole = torch.cat([torch.zeros_like(sizes), sizes], 1)
    last = torch.cat([sizes - 1, torch.ones_like(sizes)], 1)
    crop = torch.cat([whole, last])
    for semantics in BOTH:
        policy = policy_of(5, semantics)
        check(images, drawn(policy, sizes, 2, crop=crop, extent=crop[:, 2:]), policy)


def test_a_wide_image_in_few_pixels() -> None:
    """Triangles of 2 * 400 / 3 taps: as exact as with few."""
    images, sizes = ragged([(1, 400)])
    policy = policy_of(3)
    whole = torch.tensor([[0, 0, 1, 400]], dtype=torch.int32)
    check(images, drawn(policy, sizes, crop=whole, extent=whole[:, 2:]), policy)


@pytest.mark.slow
@settings(max_examples=settings().max_examples // 6)  # each takes seconds in the interpreter
@given(st.data())
def test_any_sizes(data: st.DataObject) -> None:
    sides = data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=2))
    images, sizes = ragged(sides, gap=data.draw(st.integers(0, 3)))
    size, semantics = data.draw(st.integers(1, 34)), data.draw(st.sampled_from(BOTH))
    policy = policy_of(size, semantics, flip=0.5, jitter=0.5, grey=0.2, blur=0.5)
    check(images, drawn(policy, sizes), policy)


@pytest.mark.parametrize(
    ("kept", "span", "semantics"),
    [
        pytest.param(torch.float32, 16, "torchvision", marks=pytest.mark.slow),
        (torch.float16, 64, "tensorflow"),
        pytest.param(torch.float32, 16, "tensorflow", marks=pytest.mark.slow),
        pytest.param(torch.float16, 64, "torchvision", marks=pytest.mark.slow),
        *(pytest.param(torch.float16, 32, semantics, marks=pytest.mark.slow) for semantics in BOTH),
    ],
)
def test_a_wide_blur(kept: torch.dtype, span: int, semantics: Any) -> None:
    """Radius 21 on 40 pixels, as a view of 420 pixels has it: several spans a tile, and reflections from both edges."""
    size, radius = 40, 21
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sigma = torch.tensor([7.0, 0.5], device=DEVICE)
    out = torch.empty(2, 3, size, size, device=DEVICE, memory_format=torch.channels_last)
    scratch = (x - 0.5).to(kept)
    blur_kernel[(2 * 4,)](
        out=out, scratch=scratch, edges=None, sigma=sigma, sobel=None, noise=None, noise_key=None, solarise=None,
        cutout=None, first_view=0, gain_r=1.0, gain_g=1.0, gain_b=1.0, offset_r=0.0, offset_g=0.0, offset_b=0.0,
        SIZE=size, RADIUS=radius, SIDE=32, SPAN=span, TORCHVISION=semantics == "torchvision",
        **fused.LAUNCH,
    )  # fmt: skip
    weights = colour.blur_matrix(sigma, size, radius, semantics).double()
    expected = torch.einsum("bst,bctu,bvu->bcsv", weights, scratch.double() + 0.5, weights)
    # float16: the weights of both axes and the result of the first are rounded to 11 digits, each by 2^-12 of values up
    # to one half. What is flat stays flat where the kernel does not reach an edge: its sum is that of rounded weights.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE if kept == torch.float32 else 3.7e-4)


class Recorder:
    """Stands for a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.launches.append(arguments)


KINDS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8", torch.bool: "*i1",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("semantics", BOTH)
def test_what_is_compiled_ahead_is_what_is_launched(
    semantics: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every argument is named and no other, which the interpreter does not ask; SimCLR's launches are variants."""
    compiled = fused.variants()
    names = ("mean_kernel", "cut_kernel", "blur_kernel", "sobel_kernel")
    recorders = {name: Recorder(getattr(fused, name)) for name in names}
    for name, recorder in recorders.items():
        monkeypatch.setattr(fused, name, recorder)
    dataset, side = torch.zeros(1, 40, 40, 3, dtype=torch.uint8), torch.full((1,), 40, dtype=torch.int32)
    batch = Pixels(buffer=dataset, offsets=torch.tensor([0]), heights=side, widths=side, ids=None)
    held = Pixels(buffer=dataset, offsets=None, heights=None, widths=None, ids=torch.tensor([0]))
    every = dataclasses.replace(
        simclr(40, semantics), rotate=9.0, rotate90=0.5, sobel=0.5, noise=0.5, solarise=0.5, cutout=0.5
    )
    for pixels, policy, counts in (
        (batch, simclr(224, semantics), [1, 1, 1, 0]),
        (held, simclr(32, semantics, strength=0.5, blur=0.0), [0, 1, 0, 0]),
        (batch, every, [1, 1, 1, 1]),
    ):
        params = drawn(policy, torch.tensor([[40, 40]], dtype=torch.int32))
        fused.make_views(pixels, params, **policy.rendering, dtype=dtype)
        assert [len(recorder.launches) for recorder in recorders.values()] == counts
        for recorder in recorders.values():
            for launch in recorder.launches:
                warps, stages = launch.pop("num_warps"), launch.pop("num_stages")
                assert set(launch) == set(recorder.kernel.arg_names)
                constants = {key: value for key, value in launch.items() if value is None or key.isupper()}
                types = {key: KINDS[value.dtype] for key, value in launch.items() if isinstance(value, Tensor)}
                same = [v for v in compiled if v.kernel is recorder.kernel and v.constants == constants]
                same = [v for v in same if types.items() <= v.signature.items()]
                assert policy is every or [(v.warps, v.stages) for v in same] == [(warps, stages)]
            recorder.launches.clear()


BAD: dict[str, dict[str, Any]] = {
    "source": {"source": 3}, "negative source": {"source": -1}, "outside": {"crop": [5, 5, 4, 4]},
    "no pixels": {"crop": [0, 0, 0, 4]}, "negative": {"crop": [-1, 0, 4, 4]}, "order": {"order": [0, 1, 2, 2]},
    "order of 4": {"order": [0, 1, 2, 4]}, "factors": {"factors": [1.0, float("nan"), 1.0, 0.0]},
    "infinite": {"factors": [float("inf"), 1.0, 1.0, 0.0]}, "angle": {"angle": float("nan")},
    "sigma": {"sigma": float("nan")}, "noise": {"noise": float("-inf")},
}  # fmt: skip


def spoiled() -> tuple[Ragged, ViewParams, Policy]:
    """Row 0 is good, each of the others has one fault of BAD."""
    images, sizes = ragged([(8, 8)] * 3)
    policy = policy_of(20, jitter=1.0, blur=1.0, rotate=10.0, noise=1.0, cutout=1.0, sobel=0.5)
    params = drawn(policy, sizes, 5)
    for row, changes in enumerate(BAD.values(), 1):
        for name, value in changes.items():
            getattr(params, name)[row] = torch.tensor(value)
    params = dataclasses.replace(params, extent=params.crop[:, 2:])
    rows = slice(0, len(BAD) + 1)
    return images, part(params, rows), policy


def part(params: ViewParams, rows: slice) -> ViewParams:
    return dataclasses.replace(
        params, **{f.name: getattr(params, f.name)[rows] for f in dataclasses.fields(params)[:-1]}
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of the interpreter
def test_rows_that_make_no_sense_are_views_of_nan() -> None:
    """As on a device, where no row can be checked without waiting: through the kernels themselves."""
    images, params, policy = spoiled()
    there, given_rows = images.to(DEVICE), params.to(DEVICE)
    pixels = Pixels(buffer=there.buffer, offsets=there.offsets, heights=there.heights, widths=there.widths, ids=None)
    views = fused.make_views(pixels, given_rows, **policy.rendering, dtype=torch.float16)
    assert views[0].isfinite().all()
    assert views[1:].isnan().all(), [name for name, view in zip(BAD, views[1:], strict=True) if not view.isnan().all()]


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_rows_that_make_no_sense_are_refused_on_the_cpu(backend: Any) -> None:
    if DEVICE.type != "cpu":
        backend = "reference"
    images, params, policy = spoiled()
    for row, (name, changes) in enumerate(BAD.items(), 1):
        with pytest.raises(ValueError, match=rf"row 1 of the views.*{next(iter(changes))}.*; found"):
            mixed = [part(params, slice(0, 1)), part(params, slice(row, row + 1))]
            joined = {f.name: torch.cat([getattr(p, f.name) for p in mixed]) for f in dataclasses.fields(params)[:-1]}
            make_views(images, dataclasses.replace(params, **joined), **policy.rendering, backend=backend)
            pytest.fail(name)


def test_arguments_that_do_not_fit_are_refused() -> None:
    images, sizes = ragged([(8, 8)] * 2)
    params = drawn(policy_of(8), sizes)
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        (r"crop is .*int64.*give torch.int32 \[2, 4\]", {"crop": params.crop.long()}, {}),
        (r"flip is .*\[1\].*give torch.bool \[2\]", {"flip": params.flip[:1]}, {}),
        (r"names \['blurr'\]", {"ops": frozenset(["blurr"])}, {}),
        ("size=0", {}, {"size": 0}),
        ("dtype=torch.int32", {}, {"dtype": torch.int32}),
        ("not float64; use backend=auto", {}, {"dtype": torch.float64, "backend": "fused"}),
        ("std > 0", {}, {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.0, 0.2)}),
        ("backend='triton'", {}, {"backend": "triton"}),
    ]
    for match, changes, keywords in cases:
        with pytest.raises(ValueError, match=match):
            make_views(images, dataclasses.replace(params, **changes), **({"size": 8} | keywords))
    holes = dataclasses.replace(images, buffer=torch.stack([images.buffer] * 2, 1)[:, 0])
    with pytest.raises(ValueError, match="contiguous"):
        make_views(holes, params, size=8)
    extent = torch.ones_like(params.extent)
    with pytest.raises(ValueError, match="extent is the crop's"):
        make_views(images, dataclasses.replace(params, extent=extent), size=8)
    short = dataclasses.replace(images, buffer=images.buffer[:-1])
    with pytest.raises(ValueError, match="each image lies in the buffer"):
        make_views(short, drawn(policy_of(8), sizes), size=8)


def test_no_views_and_views_of_nothing() -> None:
    images, sizes = ragged([(8, 8)])
    none = drawn(policy_of(8), sizes[:0]).to(DEVICE)
    for backend in ("fused", "reference"):
        assert make_views(images.to(DEVICE), none, size=8, backend=backend).shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match="1 views of no images"):
        make_views(images.select(torch.arange(0)), drawn(policy_of(8), sizes), size=8)


@pytest.mark.parametrize("backend", [pytest.param("fused", marks=pytest.mark.slow), "reference"])
def test_compiled_whole_and_under_autocast(backend: Any) -> None:
    images, sizes = ragged([(12, 10)] * 2)
    policy = policy_of(9, jitter=1.0)
    params, there = drawn(policy, sizes).to(DEVICE), images.to(DEVICE)

    def twice(scale: Tensor) -> Tensor:
        return scale * make_views(there, params, **policy.rendering, backend=backend)

    scale = torch.full((), 2.0, device=DEVICE)
    plain = twice(scale)
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        torch.testing.assert_close(compiled(scale), plain, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_the_operation_keeps_its_promises(implementation: str) -> None:
    """Schema, no gradient, shapes without values: torch's own checks."""
    images, sizes = ragged([(12, 10)])
    params, there = drawn(policy_of(9, flip=0.5), sizes).to(DEVICE), images.to(DEVICE)
    assert {f.name for f in dataclasses.fields(params)[:-1]} == set(FIELDS)
    described = [there.offsets, there.heights, there.widths]
    columns = [getattr(params, name) for name in FIELDS]
    rest = (described, None, "flip", "torchvision", "multiply", None, None, implementation)
    torch.library.opcheck(make_views_op, (there.buffer, columns, 9, torch.float16, *rest))
