"""The draws: known answers of the generator, purity, and distributions against torchvision and plain loops."""

from __future__ import annotations

import dataclasses
import math
import random
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision import transforms

from fastsimclr.loaders.crops import random_crops
from fastsimclr.loaders.draw import Policy, ViewParams, draw
from fastsimclr.loaders.philox import philox4x32, uniform
from tests.loading import crop_flip, evaluation, simclr

DRAWS = 4000
# Fixed seeds: a test either always passes or never does; .001 is the chance that a right sampler was unlucky here.
P_LEAST = 0.001
COLUMNS = tuple(f.name for f in dataclasses.fields(ViewParams) if f.name not in ("extent", "ops"))
EXTRAS = dict(rotate90=0.6, sobel=0.5, noise=0.5, cutout=0.5)

# What draw(simclr(224), 42, epochs, ids, 2, sizes) gave in version 0.1.0, in the test that uses them.
GOLDEN_CROPS = [
    [56, 113, 191, 178], [174, 93, 164, 148], [10, 0, 14, 15], [35, 176, 253, 202], [33, 5, 263, 207], [10, 18, 12, 11],
]  # fmt: skip
GOLDEN_FLIPS = [False, True, False, True, False, True]
GOLDEN_ORDERS = [[1, 0, 3, 2], [3, 0, 2, 1], [1, 3, 2, 0], [3, 2, 0, 1], [0, 1, 3, 2], [2, 0, 3, 1]]
GOLDEN_FACTORS = [1.642277, 1.1120776, 1.6218002, -0.19396973]
GOLDEN_SIGMAS = [0.95500451, 0, 0, 0, 0, 0]


def params_of(policy: Policy, height: int = 300, width: int = 400, n: int = DRAWS, seed: int = 3) -> ViewParams:
    sizes = torch.tensor([[height, width]], dtype=torch.int32).expand(n, 2)
    return draw(policy, seed, torch.full((n,), 5), torch.arange(n), 1, sizes)


def fills(values: torch.Tensor, low: float, high: float) -> None:
    """The values lie in the range and come within a hundredth of its ends."""
    margin = 0.01 * (high - low)
    assert low <= values.min() <= low + margin and high - margin <= values.max() <= high


def same_law(ours: torch.Tensor, theirs: list[float] | np.ndarray) -> None:
    assert stats.ks_2samp(ours.double().numpy(), np.asarray(theirs, dtype=np.float64), method="asymp").pvalue > P_LEAST


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    words = np.array([int(word, 16) for word in counter.split()], dtype=np.uint32)
    first, second = (int(word, 16) for word in key.split())
    expected = [int(word, 16) for word in answer.split()]
    assert philox4x32(words, (first, second)).tolist() == expected
    per_row = np.full((2, 3), first, dtype=np.uint32), np.full((2, 3), second, dtype=np.uint32)
    assert philox4x32(np.tile(words, (2, 3, 1)), per_row).tolist() == [[expected] * 3] * 2


def test_uniform_lies_strictly_between_zero_and_one() -> None:
    ends = uniform(np.array([0, 2**32 - 1], dtype=np.uint32))
    assert 0 < ends[0] < ends[1] < 1


@pytest.mark.parametrize("semantics", ["torchvision", "tensorflow"])
def test_a_view_depends_on_seed_epoch_id_view_and_size_alone(semantics: str) -> None:
    generator = torch.Generator().manual_seed(0)
    n, views = 40, 3
    policy = dataclasses.replace(simclr(224, semantics), rotate=10.0, solarise=0.3, **EXTRAS)  # type: ignore[arg-type]
    ids = torch.randint(0, 2**40, (n,), generator=generator)
    epochs = torch.randint(0, 3, (n,), generator=generator)
    sizes = torch.randint(1, 500, (n, 2), generator=generator, dtype=torch.int32)
    whole = draw(policy, 7, epochs, ids, views, sizes)
    chosen = torch.randperm(n, generator=generator)[:13]
    for view in range(views):
        index = chosen.roll(view)
        part = draw(policy, 7, epochs[index], ids[index], 1, sizes[index], first_view=view)
        assert torch.equal(part.source, torch.arange(13, dtype=torch.int32))
        for column in COLUMNS[1:]:
            assert torch.equal(getattr(part, column), getattr(whole, column)[view * n + index]), column
        assert np.array_equal(part.extent, whole.extent[view * n + index.numpy()])
    for other in (
        draw(policy, 8, epochs, ids, views, sizes),
        draw(policy, 7, epochs + 1, ids, views, sizes),
        draw(policy, 7, epochs, ids + 2**33, views, sizes),
        draw(policy, 7, epochs, ids, views, sizes, first_view=views),
    ):
        assert not torch.isclose(other.factors, whole.factors).any(1).float().mean() > 0.05


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (300, 400),
        (3, 2),
        *(pytest.param(*size, marks=pytest.mark.slow) for size in [(32, 32), (40, 400), (500, 90), (1, 1)]),
    ],
)
def test_torchvision_crops_follow_random_resized_crop(height: int, width: int) -> None:
    ours = params_of(simclr(224), height, width).crop
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(DRAWS)]
    )
    for column in range(4):
        same_law(ours[:, column], theirs[:, column])
    same_law(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    same_law(ours[:, 3].double() / ours[:, 2], theirs[:, 3] / theirs[:, 2])


def tensorflow_crop(height: int, width: int, generator: random.Random) -> tuple[int, int, int, int]:
    """tf.image.sample_distorted_bounding_box, retold one number at a time."""
    for _ in range(100):
        aspect = generator.uniform(3 / 4, 4 / 3)
        least, most = 0.08 * height * width, 1.0 * height * width
        low, high = round(math.sqrt(least / aspect)), round(math.sqrt(most / aspect))
        if round(high * aspect) > width:
            high = int((width + 0.5 - 1e-7) / aspect)
        high = min(high, height)
        h = low if low < high else high
        if h < high:
            h += generator.randrange(high - h + 1)
        w = round(h * aspect)
        if h * w < least:
            h += 1
            w = round(h * aspect)
        if h * w > most:
            h -= 1
            w = round(h * aspect)
        if not (least <= h * w <= most and 0 < w <= width and 0 < h <= height) or h * w < 0.1 * height * width:
            continue
        top = generator.randrange(height - h) if h < height else 0
        left = generator.randrange(width - w) if w < width else 0
        return top, left, h, w
    return 0, 0, height, width


@pytest.mark.parametrize(("height", "width"), [(300, 400), (32, 32), (40, 400), (500, 90), (1, 1), (3, 2)])
def test_tensorflow_crops_follow_the_plain_loop(height: int, width: int) -> None:
    ours = params_of(simclr(224, "tensorflow"), height, width).crop
    generator = random.Random(0)
    theirs = np.array([tensorflow_crop(height, width, generator) for _ in range(DRAWS)])
    for column in range(4):
        same_law(ours[:, column], theirs[:, column])
    same_law(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    same_law(ours[:, 3].double() / ours[:, 2], theirs[:, 3] / theirs[:, 2])


@pytest.mark.parametrize("semantics", ["torchvision", "tensorflow"])
def test_crops_lie_inside_images_of_any_size(semantics: str) -> None:
    sizes = torch.randint(1, 60, (3000, 2), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    for policy in (simclr(224, semantics), evaluation(224, semantics), evaluation(32, semantics)):  # type: ignore[arg-type]
        top, left, height, width = draw(policy, 0, torch.zeros(3000), torch.arange(3000), 1, sizes).crop.unbind(1)
        assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
        assert (top + height <= sizes[:, 0]).all() and (left + width <= sizes[:, 1]).all()


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.5])
def test_jitter_and_blur_follow_torchvision(strength: float) -> None:
    params = params_of(simclr(224, strength=strength))
    jitter = transforms.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    torch.manual_seed(0)
    drawn = [
        transforms.ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(DRAWS)
    ]
    for column in range(4):
        same_law(params.factors[:, column], [row[1 + column] for row in drawn])
        reach = (0.8 if column < 3 else 0.2) * strength
        fills(params.factors[:, column].double(), *((max(1 - reach, 0), 1 + reach) if column < 3 else (-reach, reach)))
    counts = np.unique(params.order.numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > P_LEAST
    same_law(params.sigma[params.sigma > 0], [transforms.GaussianBlur.get_params(0.1, 2.0) for _ in range(DRAWS)])


@pytest.mark.parametrize(("semantics", "tries"), [("torchvision", 10), ("tensorflow", 100)])
def test_each_try_has_its_own_numbers_and_all_are_used(semantics: str, tries: int) -> None:
    """A row that never succeeds asks for every try once; one that succeeds in its last try keeps that window."""
    asked: list[int] = []

    def numbers(rows: np.ndarray, first: int, count: int) -> np.ndarray:
        u = np.full((len(rows), count, 4), 0.9999999)
        u[..., 0] = 0.5 if semantics == "torchvision" else 0.9999999
        asked.extend(range(first, first + count))
        if first + count == tries:
            u[0, -1] = [1e-9, 0.5, 0.0, 0.0] if semantics == "torchvision" else [0.5, 1e-9, 0.0, 0.0]
        return u

    # Too flat for any window of a ratio near 2 (or with a scale that a ratio near 2 cannot reach).
    ratio, sizes = (1 / 2, 2.0), np.array([[400, 100], [400, 100]])
    scale = (0.08, 1.0) if semantics == "torchvision" else (0.2, 1.0)
    boxes = random_crops(semantics, scale, ratio, sizes, numbers)  # type: ignore[arg-type]
    assert asked == list(range(tries))
    assert boxes[1].tolist() == ([100, 0, 200, 100] if semantics == "torchvision" else [0, 0, 400, 100])
    assert boxes[0].tolist() != boxes[1].tolist()


def test_brightness_is_additive_for_v1() -> None:
    policy = dataclasses.replace(simclr(224, "tensorflow", strength=0.5), brightness="add")
    same_law(params_of(policy).factors[:, 0], np.random.default_rng(0).uniform(-0.4, 0.4, DRAWS))


def test_chances_are_those_of_the_policy_and_independent() -> None:
    params = params_of(dataclasses.replace(simclr(224), solarise=0.1, flip=0.3, rotate=15.0), n=20000)
    chances = {"flip": 0.3, "jitter": 0.8, "grey": 0.2, "solarise": 0.1}
    for name, chance in chances.items():
        assert stats.binomtest(int(getattr(params, name).sum()), 20000, chance).pvalue > P_LEAST
    assert stats.binomtest(int((params.sigma > 0).sum()), 20000, 0.5).pvalue > P_LEAST
    same_law(params.angle, np.random.default_rng(0).uniform(-math.radians(15), math.radians(15), 20000))
    numbers = [getattr(params, name).double() for name in chances] + [params.angle.double(), params.sigma.double()]
    numbers += list(params.factors.double().T) + list(params.crop.double().T[:2])
    correlation = torch.corrcoef(torch.stack(numbers)) - torch.eye(len(numbers))
    correlation[-1, -2] = correlation[-2, -1] = 0  # the two corners share the crop's size
    assert correlation.abs().max() < 4.5 / math.sqrt(20000)


def test_the_draws_of_simclr_are_what_they_were() -> None:
    """Recorded before the extras came: whoever resumes a run or repeats a result gets the same views."""
    sizes = torch.tensor([[300, 400], [375, 500], [32, 32]], dtype=torch.int32)
    ids, epochs = torch.tensor([0, 4711, 2**33]), torch.tensor([0, 7, 799])
    params = draw(simclr(224), 42, epochs, ids, 2, sizes)
    assert params.crop.tolist() == GOLDEN_CROPS
    assert params.flip.tolist() == GOLDEN_FLIPS
    assert params.order.tolist() == GOLDEN_ORDERS
    assert params.factors[1].tolist() == pytest.approx(GOLDEN_FACTORS, rel=1e-6)
    assert params.sigma.tolist() == pytest.approx(GOLDEN_SIGMAS, rel=1e-6)
    every = draw(dataclasses.replace(simclr(224), **EXTRAS), 42, epochs, ids, 2, sizes)  # type: ignore[arg-type]
    for column in COLUMNS:
        if column not in ("quarter", "sobel", "noise", "noise_key", "cutout"):
            assert torch.equal(getattr(every, column), getattr(params, column)), column
        else:
            assert not getattr(params, column).any(), column


def test_extras_follow_the_policy() -> None:
    chances = {"rotate90": 0.6, "sobel": 0.3, "noise": 0.4, "cutout": 0.7}
    policy = Policy(size=32, noise_sigma=(0.05, 0.3), **chances)  # type: ignore[arg-type]
    params, n = params_of(policy, n=20000), 20000
    chosen = {"rotate90": params.quarter > 0, "sobel": params.sobel, "noise": params.noise > 0}
    chosen["cutout"] = params.cutout.any(1)
    for name, chance in chances.items():
        assert stats.binomtest(int(chosen[name].sum()), n, chance).pvalue > P_LEAST
    assert params.quarter.unique().tolist() == [0, 1, 2, 3]
    assert stats.chisquare(params.quarter.bincount()[1:].numpy()).pvalue > P_LEAST
    same_law(params.noise[chosen["noise"]], np.random.default_rng(0).uniform(0.05, 0.3, n))
    fills(params.noise[chosen["noise"]].double(), 0.05, 0.3 + 1e-7)
    keys = params.noise_key[chosen["noise"]]
    same_law(keys.double(), np.random.default_rng(0).uniform(-(2**31), 2**31, n))
    assert len(keys.unique()) > len(keys) - 3 and not params.noise_key[~chosen["noise"]].any()
    for bit in range(32):
        assert stats.binomtest(int(((keys >> bit) & 1).sum()), len(keys), 0.5).pvalue > P_LEAST / 32
    numbers = [column.double() for column in (*chosen.values(), params.flip, params.jitter, params.grey)]
    correlation = torch.corrcoef(torch.stack(numbers)) - torch.eye(len(numbers))
    assert correlation.abs().max() < 4.5 / math.sqrt(n)


def paper_cutout(side: int, length: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """The square of cutout's authors (util/cutout.py): its centre anywhere, cut at the borders."""
    y, x = generator.integers(side), generator.integers(side)
    y1, y2 = np.clip((y - length // 2, y + length // 2), 0, side)
    x1, x2 = np.clip((x - length // 2, x + length // 2), 0, side)
    return y1, x1, y2 - y1, x2 - x1


def test_cutout_is_its_authors_square() -> None:
    boxes = params_of(Policy(size=32, cutout=1.0)).cutout
    generator = np.random.default_rng(0)
    theirs = np.array([paper_cutout(32, 16, generator) for _ in range(DRAWS)])
    for column in range(4):
        same_law(boxes[:, column], theirs[:, column])
    same_law(boxes[:, 2] * boxes[:, 3], theirs[:, 2] * theirs[:, 3])
    assert boxes[:, 2].min() == 8 and boxes[:, 2].max() == 16 and boxes[:, 0].max() == 23


@pytest.mark.parametrize(("size", "part"), [(1, 0.5), (2, 0.1), (7, 0.4), (33, 1.0), (224, 0.25)])
def test_cutout_lies_inside_views_of_any_size(size: int, part: float) -> None:
    top, left, height, width = params_of(Policy(size=size, cutout=1.0, cutout_side=part)).cutout.unbind(1)
    side = max(1, round(part * size))
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= size).all() and (left + width <= size).all()
    for length in (height, width):
        # A centre on the border leaves half of the square.
        assert length.min() >= side // 2 and length.min() >= 1 and length.max() <= side


def test_extras_ask_for_no_numbers_that_nobody_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four random numbers a view: three for SimCLR and its first crop try, one for each extra op."""
    blocks: list[int] = []

    def counted(counter: np.ndarray, key: object) -> np.ndarray:
        blocks.extend(np.unique(counter[..., 3]).tolist())
        return philox4x32(counter, key)  # type: ignore[arg-type]

    monkeypatch.setattr(sys.modules[draw.__module__], "philox4x32", counted)
    plain = dataclasses.replace(simclr(224), crop="centre")
    params_of(plain, n=5)
    assert blocks == [0, 1, 2]
    for extra, block in (("rotate90", 3), ("sobel", 4), ("noise", 5), ("cutout", 6)):
        blocks.clear()
        params_of(dataclasses.replace(plain, **{extra: 0.5}), n=5)  # type: ignore[arg-type]
        assert blocks == [0, 1, 2, block]


def test_evaluation_crops() -> None:
    """Google: rint(.875 * shorter side), margins rounded up; torchvision: margins rounded to even; small: the whole."""
    assert params_of(evaluation(224, "tensorflow"), 96, 129, 1).crop.tolist() == [[6, 23, 84, 84]]
    assert params_of(evaluation(224), 96, 129, 1).crop.tolist() == [[6, 22, 84, 84]]
    assert params_of(evaluation(32), 20, 70, 1).crop.tolist() == [[0, 0, 20, 70]]
    assert evaluation(32).ops == frozenset() and crop_flip(32).ops == {"flip"}


def test_params_survive_the_move_to_a_device() -> None:
    """Shapes and types, through the one other device that every machine has; it holds no values."""
    params = params_of(dataclasses.replace(simclr(32), rotate=5.0, solarise=0.5, **EXTRAS), n=7)  # type: ignore[arg-type]
    moved = params.to(torch.device("meta"))
    for column in COLUMNS:
        ours, theirs = getattr(params, column), getattr(moved, column)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) and theirs.device.type == "meta"
    assert moved.extent is params.extent and moved.ops == params.ops
    assert params.to(torch.device("cpu")) is params


@pytest.mark.parametrize("n", [1, 7])
def test_the_one_copy_keeps_every_value(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A "device" whose copies stay on the CPU: packing and unpacking run as for a GPU, and the values can be read."""
    params = params_of(dataclasses.replace(simclr(32), rotate=5.0, solarise=0.5, **EXTRAS), n=n)  # type: ignore[arg-type]
    copies = []

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        copies.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "to", to)
    moved = params.to(torch.device("meta"))
    monkeypatch.undo()
    assert len(copies) == 1
    for column in COLUMNS:
        assert torch.equal(getattr(moved, column), getattr(params, column)), column
        assert getattr(moved, column).dtype == getattr(params, column).dtype


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flip": 1.5}, "flip=1.5 is not a probability"),
        ({"scale": (0.5, 0.2)}, "scale=(0.5, 0.2) is not a range"),
        ({"scale": (0.5, 1.2)}, "1 at most"),
        ({"brightness": "add"}, "semantics=tensorflow"),
        ({"size": 0}, "size=0"),
        ({"strength": 3.0}, "strength=3.0"),
        ({"centre_fraction": 0.0}, "centre_fraction=0.0"),
        ({"cutout_side": 1.5}, "cutout_side=1.5 is not within (0, 1]; .5 is usual"),
        ({"rotate90": -0.1}, "rotate90=-0.1 is not a probability"),
        ({"sobel": math.nan}, "sobel=nan is not a probability"),
        ({"noise": 2.0}, "noise=2.0 is not a probability"),
        ({"cutout": 1.01}, "cutout=1.01 is not a probability"),
        ({"noise_sigma": (0.0, 0.1)}, "noise_sigma=(0.0, 0.1) is not a range"),
    ],
)
def test_bad_policies_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        Policy(**change)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_bad_draws_are_refused() -> None:
    one, size = torch.zeros(1, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="use 0"):
        draw(simclr(32), 2**32, one, one, 2, size)
    with pytest.raises(ValueError, match="negative"):
        draw(simclr(32), 0, one, one - 1, 2, size)
    with pytest.raises(ValueError, match="do not fit"):
        draw(simclr(32), 0, one, one, 2, size[0])
