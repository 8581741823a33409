"""Each view op against torchvision on ImageNet samples, all 400 where slow, held to the bounds of docs/views.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fastsimclr.bench import view_errors as module
from fastsimclr.bench.view_errors import main, read_images, torchvision_view, view_errors
from fastsimclr.kernels.views import make_views
from tests.kernels.test_views import SIDES, drawn, plain, ragged

# Largest error of an op alone at 64 pixels, two to four times what is found. float32 rounds values near 1 by 6e-8.
BOUNDS = {
    "crop + resize": 3e-6,  # products of two axes' weights; torchvision's window of taps begins at a rounded place
    "flip": 1.2e-7,  # value * (1 / 255) against value / 255: so of every op that only moves pixels
    "quarter turn": 1.2e-7,
    "solarise": 1.2e-7,
    "cutout": 1.2e-7,
    "rotate": 3e-5,  # the places of the two grids differ by roundings, times the steepest slope
    "brightness": 3e-6,  # factors up to 1.8, before clipping
    "contrast": 3e-6,
    "saturation": 3e-6,
    "hue": 3e-6,
    "grey": 4e-7,
    "blur": 3e-6,
    "sobel": 4e-7,
    "noise": 1e-5,  # float32 against float64: above 2^23 it has no halves, so the log of a number near 1 is coarse
    "normalise": 2e-6,  # values up to 2.6
    "SimCLR's chain": 1e-5,
}
MEAN_BOUND = 3e-7
# 8-bit torchvision rounds (or cuts) once after an op: a level, of 1/255; contrast and saturation round a mean besides.
LEVEL = 1 / 255


@pytest.mark.parametrize("count", [12, pytest.param(400, marks=pytest.mark.full)])
def test_every_op_on_photographs(imagenet_samples: Path, count: int) -> None:
    """At 64 pixels: torchvision needs a minute for its part at 224, where `fastsimclr bench views` measures."""
    photos = read_images(imagenet_samples, count)
    rows = {row["op"]: row for row in view_errors(photos, "reference", size=64)}
    assert rows.keys() == BOUNDS.keys()
    for op, row in rows.items():
        assert row["images"] == count
        assert row["max"] <= BOUNDS[op], row
        assert row["mean"] <= MEAN_BOUND, row
        if row["uint8_max"] is not None and row["uint8_mean"] is not None:
            whole = op == "SimCLR's chain"
            assert row["uint8_max"] <= (0.06 if whole else 2 * LEVEL), row
            assert row["uint8_mean"] <= (0.01 if whole else LEVEL), row
            moves = op in ("flip", "quarter turn", "solarise", "normalise", "cutout")
            assert row["uint8_mean"] <= 1e-7 if moves else row["uint8_mean"] > 1e-4, row  # the oracle did round


@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.full)])
def test_crop_and_resize_at_224_on_photographs(imagenet_samples: Path, count: int) -> None:
    """Against torch's interpolation in float64 too: the greater part of the distance is torchvision's own rounding."""
    policy, photos = plain(224), read_images(imagenet_samples, count)
    worst, worst64 = 0.0, 0.0
    for first in range(0, count, 20):
        some = photos.select(torch.arange(first, first + 20))
        params = drawn(policy, torch.stack([some.heights, some.widths], 1), 1)
        for row, view in enumerate(make_views(some, params, **policy.rendering, backend="reference")):
            image = some.image(row)
            worst = max(worst, float((view - torchvision_view(image, params, row, policy)).abs().max()))
            top, left, height, width = params.crop[row].tolist()
            window = image[top : top + height, left : left + width].permute(2, 0, 1)[None].double() / 255
            exact = torch.nn.functional.interpolate(window, (224, 224), mode="bilinear", antialias=True)[0]
            worst64 = max(worst64, float((view - exact).abs().max()))
    assert worst < 6e-5
    assert worst64 < 2e-6


def changed(change: Any) -> Any:
    """make_views with its result changed."""
    return lambda *args, **kwargs: change(make_views(*args, **kwargs))


@pytest.mark.parametrize(
    ("change", "least"),
    [(lambda x: x + 1e-3, 9e-4), (lambda x: F.horizontal_flip(x), 0.05), (lambda x: x.roll(1, 3), 0.05)],
)
def test_the_measure_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch, change: Any, least: float) -> None:
    monkeypatch.setattr(module, "make_views", changed(change))
    images, _ = ragged(SIDES)
    for row in view_errors(images, "reference", size=24):
        assert row["max"] > least, row


def test_a_view_that_is_no_number_is_no_small_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(x: Tensor) -> Tensor:
        x[2, 1, 3, 3] = torch.nan
        return x

    monkeypatch.setattr(module, "make_views", changed(spoil))
    images, _ = ragged(SIDES)
    for row in view_errors(images, "reference", size=24):
        assert not row["max"] < 1 and not row["mean"] < 1, row


def test_the_table_has_a_line_for_each_op(imagenet_samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(imagenet_samples), "--images", "2", "--size", "16", "--backend", "reference"]) == 0
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert sorted(row.split(" | ")[0].removeprefix("| ") for row in rows) == sorted(BOUNDS)
    assert {line.count("|") for line in (head, rule, *rows)} == {8}


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no files; give a flat folder"):
        read_images(tmp_path, 4)
