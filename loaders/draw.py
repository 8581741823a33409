"""The random parameters of every view, as a pure function of (seed, epoch, sample id, view)."""

# N images, V views, M = V * N rows, view-major: row v * N + n is view v of image n

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import permutations
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsimclr.loaders.crops import I64, Semantics, centre_crops, random_crops
from fastsimclr.loaders.philox import philox4x32, uniform

Brightness = Literal["multiply", "add"]
Triple = tuple[float, float, float]

_IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The fourth word of the counter: which numbers of a view. Crop tries come last, one block each.
_FLAGS, _FACTORS, _REST, _QUARTER, _SOBEL, _NOISE, _CUTOUT, _TRIES = 0, 1, 2, 3, 4, 5, 6, 16
_ORDERS = np.array(list(permutations(range(4))), dtype=np.int32)


class Rendering(TypedDict):
    """What kernels.views.make_views needs of a policy beside the drawn parameters."""

    size: int
    semantics: Semantics
    brightness: Brightness
    mean: Triple | None
    std: Triple | None


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which views are drawn and how they are rendered. Defaults: SimCLR on ImageNet (arXiv 2002.05709, appendix A)."""

    semantics: Semantics = "torchvision"
    """Whose definition of each op holds: torchvision's, or that of TensorFlow as used by google-research/simclr."""
    size: int = 224
    """Side of the square views in pixels."""
    crop: Literal["random", "centre"] = "random"
    """random: a random resized crop. centre: for evaluation; the whole image where size is at most 32."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of a random crop's area, as a part of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of a random crop's width / height."""
    centre_fraction: float = 0.875
    """Side of a centre crop, as a part of the image's shorter side."""
    rotate: float = 0.0
    """Largest rotation in degrees, drawn uniformly to both sides; the corners it uncovers are black. 0: none."""
    rotate90: float = 0.0
    """Probability of a turn by 90, 180 or 270 degrees, each as likely."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter: brightness, contrast, saturation and hue in random order."""
    strength: float = 1.0
    """Strength s of colour jitter: factors within .8 s of 1, hue within .2 s. ImageNet 1.0, CIFAR-10 0.5."""
    brightness: Brightness = "multiply"
    """multiply: SimCLR v2. add: SimCLR v1, which adds U(-.8 s, .8 s); under tensorflow semantics only."""
    grey: float = 0.2
    """Probability of turning a view grey."""
    blur: float = 0.5
    """Probability of a Gaussian blur, its kernel a tenth of the side; views below 20 pixels are not blurred."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation in pixels of the view."""
    sobel: float = 0.0
    """Probability of replacing each channel by the strength of its edges, by Sobel's filter."""
    noise: float = 0.0
    """Probability of adding Gaussian noise, drawn for each value of the view on its own."""
    noise_sigma: tuple[float, float] = (0.02, 0.1)
    """Range of the noise's standard deviation, of values in [0, 1]. Our choice: SimCLR's paper states none."""
    solarise: float = 0.0
    """Probability of inverting the pixels at or above one half. 0 in SimCLR, .2 for one view in BYOL."""
    cutout: float = 0.0
    """Probability of cutout (arXiv 1708.04552): a square about a random pixel becomes 0 after normalisation."""
    cutout_side: float = 0.5
    """Side of cutout's square as a part of the view's side; it may reach over the border. CIFAR-10: .5."""
    one_branch: bool = False
    """Leave the first view as it is, uncropped (its central square), and augment the others alone: how single
    augmentations are compared in arXiv 2002.05709, Sec. 3.1."""
    normalise: Literal["auto", "none", "imagenet"] | tuple[Triple, Triple] = "auto"
    """(mean, std) of the channels in [0, 1]. auto: ImageNet's under torchvision semantics, none under tensorflow."""

    def __post_init__(self) -> None:
        for key in ("rotate90", "flip", "jitter", "grey", "blur", "sobel", "noise", "solarise", "cutout"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"views.{key}={getattr(self, key)} is not a probability; give a number from 0 to 1")
        for key in ("scale", "ratio", "sigma", "noise_sigma"):
            low, high = getattr(self, key)
            if not 0 < low <= high:
                raise ValueError(f"views.{key}={(low, high)} is not a range; give (low, high) with 0 < low <= high")
        if self.scale[1] > 1:
            raise ValueError(f"views.scale={self.scale} asks for more than the image; its end can be 1 at most")
        if self.size < 1:
            raise ValueError(f"views.size={self.size} leaves no pixels; give the side of a view, at least 1")
        for key, usual in (("centre_fraction", ".875"), ("cutout_side", ".5")):
            if not 0 < getattr(self, key) <= 1:
                raise ValueError(f"views.{key}={getattr(self, key)} is not within (0, 1]; {usual} is usual")
        if not 0 <= self.strength <= 2.5:
            raise ValueError(f"views.strength={self.strength} shifts the hue by more than half a turn; give 0 to 2.5")
        if self.brightness == "add" and self.semantics == "torchvision":
            raise ValueError(
                "views.brightness=add exists under tensorflow semantics only; set views.semantics=tensorflow"
            )
        if not math.isfinite(self.rotate):
            raise ValueError(f"views.rotate={self.rotate} is not a number of degrees; 0 is none")
        if not isinstance(self.normalise, str) and not all(value > 0 for value in self.normalise[1]):
            raise ValueError(
                f"views.normalise={self.normalise} has a standard deviation of 0; give (mean, std), std > 0"
            )

    @property
    def rendering(self) -> Rendering:
        """The keyword arguments with which make_views renders this policy's draws."""
        stats = self.normalise
        if stats == "auto":
            stats = "imagenet" if self.semantics == "torchvision" else "none"
        mean, std = (None, None) if stats == "none" else _IMAGENET if stats == "imagenet" else stats
        return Rendering(size=self.size, semantics=self.semantics, brightness=self.brightness, mean=mean, std=std)

    @property
    def ops(self) -> frozenset[str]:
        """The ops that some view may need; the others are not computed at all."""
        chances = {"flip": self.flip, "jitter": self.jitter * self.strength, "grey": self.grey, "blur": self.blur}
        chances |= {"solarise": self.solarise, "rotate": self.rotate, "quarter": self.rotate90}
        chances |= {"sobel": self.sobel, "noise": self.noise, "cutout": self.cutout}
        return frozenset(op for op, chance in chances.items() if chance)

    def plain(self) -> Policy:
        """The same crops without any op after them."""
        off = dict.fromkeys(("rotate", "rotate90", "flip", "jitter", "grey", "blur"), 0.0)
        off |= dict.fromkeys(("sobel", "noise", "solarise", "cutout"), 0.0)
        return replace(self, one_branch=False, **off)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class ViewParams:
    """One row for each of M = V * N views, view-major (row v * N + n is view v of image n). Angles in radians.

    source: int32 [M], which of the batch's N images.       crop: int32 [M, 4], top, left, height, width in pixels.
    angle: float32 [M], rotation about the crop's centre, counter-clockwise, 0 for none.
    quarter: int32 [M], 0 to 3 counter-clockwise turns by 90 degrees.
    flip, jitter, grey, sobel, solarise: bool [M], whether the op is applied.
    factors: float32 [M, 4], brightness, contrast, saturation, hue (in turns).
    order: int32 [M, 4], a permutation of 0..3: which of the four factors comes first, second, third, fourth.
    sigma: float32 [M], of the Gaussian blur in output pixels, 0 for no blur.
    noise: float32 [M], standard deviation of the Gaussian noise, 0 for none.
    noise_key: int32 [M], 32 random bits that choose the noise.
    cutout: int32 [M, 4], top, left, height, width in output pixels, all 0 for none.
    extent: int32 [M, 2], crop height and width once more, always on the CPU: shapes without a sync.
    ops: the ops that the policy may apply, of rotate, quarter, flip, jitter, grey, blur, sobel, noise, solarise,
        cutout.
    """

    source: Tensor
    crop: Tensor
    angle: Tensor
    quarter: Tensor
    flip: Tensor
    jitter: Tensor
    factors: Tensor
    order: Tensor
    grey: Tensor
    sigma: Tensor
    sobel: Tensor
    noise: Tensor
    noise_key: Tensor
    solarise: Tensor
    cutout: Tensor
    extent: Tensor
    ops: frozenset[str]

    def __len__(self) -> int:
        return self.source.shape[0]

    def of_finished_crops(self, size: int) -> ViewParams:
        """The same views where the crops lie ready as M images [size, size, 3]: the whole of image m is view m."""
        m = len(self)
        whole = torch.tensor([0, 0, size, size], dtype=torch.int32).repeat(m, 1)
        return replace(self, source=torch.arange(m, dtype=torch.int32), crop=whole, extent=whole[:, 2:])

    def to(self, device: torch.device, pin: bool = False) -> ViewParams:
        """The same rows on `device`, in one copy; from pinned memory and without a sync where `pin`."""
        if device == self.source.device:
            return self
        columns: dict[str, Tensor] = {f.name: getattr(self, f.name) for f in fields(self)[:-2]}  # not extent, ops
        # Words before flags, so that each column of words begins on a multiple of four bytes.
        names = sorted(columns, key=lambda name: columns[name].dtype == torch.bool)
        packed = torch.cat([columns[name].flatten().view(torch.uint8) for name in names])
        packed = (packed.pin_memory() if pin else packed).to(device, non_blocking=pin)
        pieces = torch.split_with_sizes(packed, [columns[name].nbytes for name in names])
        moved: dict[str, Any] = {
            name: piece.view(columns[name].dtype).view(columns[name].shape)
            for name, piece in zip(names, pieces, strict=True)
        }
        return replace(self, **moved)


def draw(
    policy: Policy,
    seed: int,
    epochs: Tensor | I64,
    ids: Tensor | I64,
    views: int,
    sizes: Tensor | npt.NDArray[np.int32],
    first_view: int = 0,
) -> ViewParams:
    """The parameters of views first_view .. first_view + views - 1 of N samples, M = views * N rows on the CPU.

    epochs, ids: int64 [N], not negative. sizes: int32 [N, 2], height and width in pixels. All on the CPU.
    Each row depends on (policy, seed, its epoch, its id, its view, its size) alone, not on the rest of the batch:
    Philox4x32-10 with key (seed, epoch) and counter (low half of id, high half, view, block).
    Raises ValueError for a seed or epoch outside [0, 2**32), a negative id, or an image without pixels.
    """
    if policy.one_branch:
        both = replace(policy, one_branch=False)
        plain = replace(policy.plain(), crop="centre", centre_fraction=1.0)
        kept = 1 if first_view == 0 and views else 0
        parts = (
            draw(plain, seed, epochs, ids, kept, sizes),
            draw(both, seed, epochs, ids, views - kept, sizes, first_view + kept),
        )
        columns = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(ViewParams)[:-1]}
        return ViewParams(**columns, ops=policy.ops)
    ids_N, epochs_N = np.asarray(ids, dtype=np.int64), np.asarray(epochs, dtype=np.int64)
    sizes_N2 = np.asarray(sizes, dtype=np.int64)
    n = len(ids_N)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} is not in [0, 2**32); use {seed % 2**32}")
    if sizes_N2.shape != (n, 2) or epochs_N.shape != (n,):
        raise ValueError(f"sizes {sizes_N2.shape} and epochs {epochs_N.shape} do not fit {n} ids; give [N, 2] and [N]")
    if n and (ids_N.min() < 0 or epochs_N.min() < 0 or epochs_N.max() >= 2**32 or sizes_N2.min() < 1):
        raise ValueError("an id or epoch is negative, an epoch is over 2**32 - 1, or an image has no pixels")

    sizes_M2 = np.tile(sizes_N2, (views, 1))
    counter = np.empty((views * n, 4), dtype=np.uint32)
    counter[:, 0] = np.tile(ids_N & 0xFFFFFFFF, views)
    counter[:, 1] = np.tile(ids_N >> 32, views)
    counter[:, 2] = np.repeat(np.arange(first_view, first_view + views), n)
    epoch_M = np.tile(epochs_N.astype(np.uint32), views)

    def numbers(rows: I64 | slice, first_try: int, count: int) -> npt.NDArray[np.float64]:
        blocks = np.repeat(counter[rows, None], count, axis=1)
        blocks[..., 3] = np.arange(first_try, first_try + count)
        return uniform(philox4x32(blocks, (seed, epoch_M[rows, None])))

    u_M34 = numbers(slice(None), 0, 3)
    chance, spread, rest = u_M34[:, _FLAGS], 2 * u_M34[:, _FACTORS] - 1, u_M34[:, _REST]
    if policy.crop == "random":
        crop = random_crops(
            policy.semantics, policy.scale, policy.ratio, sizes_M2, lambda rows, t, k: numbers(rows, _TRIES + t, k)
        )
    elif policy.size <= 32:
        crop = np.concatenate([np.zeros_like(sizes_M2), sizes_M2], axis=1)
    else:
        crop = centre_crops(policy.semantics, policy.centre_fraction, sizes_M2)
    box = crop.astype(np.int32)
    sigma = policy.sigma[0] + (policy.sigma[1] - policy.sigma[0]) * rest[:, 2]
    return ViewParams(
        source=torch.arange(n, dtype=torch.int32).repeat(views),
        crop=torch.from_numpy(box),
        angle=torch.from_numpy((math.radians(policy.rotate) * (2 * rest[:, 3] - 1)).astype(np.float32)),
        flip=torch.from_numpy(chance[:, 0] < policy.flip),
        jitter=torch.from_numpy(chance[:, 1] < policy.jitter),
        factors=torch.from_numpy(_factors(policy, spread)),
        order=torch.from_numpy(_ORDERS[(rest[:, 0] * len(_ORDERS)).astype(np.int64)]),
        grey=torch.from_numpy(chance[:, 2] < policy.grey),
        sigma=torch.from_numpy(np.where(rest[:, 1] < policy.blur, sigma, 0).astype(np.float32)),
        solarise=torch.from_numpy(chance[:, 3] < policy.solarise),
        extent=torch.from_numpy(box[:, 2:]),
        ops=policy.ops,
        **_extras(policy, views * n, lambda block: numbers(slice(None), block, 1)[:, 0]),
    )


def _factors(policy: Policy, spread: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """spread, uniform in (-1, 1), [M, 4], as brightness, contrast, saturation and hue, float32 [M, 4]."""
    reach = 0.8 * policy.strength
    low, high = max(1 - reach, 0), 1 + reach
    factors = low + (high - low) * (spread + 1) / 2
    if policy.brightness == "add":
        factors[:, 0] = reach * spread[:, 0]
    factors[:, 3] = 0.2 * policy.strength * spread[:, 3]
    return factors.astype(np.float32)


def _extras(policy: Policy, m: int, numbers: Callable[[int], npt.NDArray[np.float64]]) -> dict[str, Any]:
    """The columns of the ops beyond SimCLR's own. numbers: block -> [M, 4], asked only for ops with a chance."""
    quarter, key, cutout = np.zeros(m, np.int32), np.zeros(m, np.int32), np.zeros((m, 4), np.int32)
    sobel, noise = np.zeros(m, np.bool_), np.zeros(m, np.float32)
    if policy.rotate90:
        u = numbers(_QUARTER)
        quarter = np.where(u[:, 0] < policy.rotate90, 1 + 3 * u[:, 1], 0).astype(np.int32)
    if policy.sobel:
        sobel = numbers(_SOBEL)[:, 0] < policy.sobel
    if policy.noise:
        u, (low, high) = numbers(_NOISE), policy.noise_sigma
        chosen = u[:, 0] < policy.noise
        noise = np.where(chosen, low + (high - low) * u[:, 1], 0).astype(np.float32)
        # A uniform number is a random word and a half: these are the word's bits again.
        key = np.where(chosen, u[:, 2] * 2.0**32, 0).astype(np.uint32).view(np.int32)
    if policy.cutout:
        u, side = numbers(_CUTOUT), max(1, round(policy.cutout_side * policy.size))
        first = (u[:, 1:3] * policy.size).astype(np.int64) - side // 2
        start, end = np.clip(first, 0, policy.size), np.clip(first + side, 0, policy.size)
        boxes = np.concatenate([start, end - start], axis=1)
        cutout = np.where(u[:, :1] < policy.cutout, boxes, 0).astype(np.int32)
    columns = {"quarter": quarter, "sobel": sobel, "noise": noise, "noise_key": key, "cutout": cutout}
    return {name: torch.from_numpy(column) for name, column in columns.items()}
