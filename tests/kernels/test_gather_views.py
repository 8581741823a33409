"""The dataset gather: views of the ids chosen, equal to those of a batch that was gathered first."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastsimclr.kernels.gather import gather_views
from fastsimclr.kernels.views import fused, make_views
from fastsimclr.kernels.views.op import Pixels
from fastsimclr.loaders.batch import Ragged
from fastsimclr.loaders.draw import Policy, ViewParams, draw

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CIFAR = Policy(size=16, strength=0.5, blur=0.0)
BACKENDS = ("fused", "reference")


def same_size(count: int, height: int, width: int) -> Tensor:
    """Random images, uint8 [N, H, W, 3]."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def as_ragged(dataset: Tensor) -> Ragged:
    count, height, width, _ = dataset.shape
    return Ragged(
        buffer=dataset.flatten(),
        offsets=torch.arange(count) * (3 * height * width),
        heights=torch.full((count,), height, dtype=torch.int32),
        widths=torch.full((count,), width, dtype=torch.int32),
    )


def drawn(policy: Policy, ids: Tensor, height: int, width: int, views: int = 2) -> ViewParams:
    sizes = torch.tensor([[height, width]], dtype=torch.int32).expand(len(ids), 2)
    return draw(policy, 5, torch.zeros(len(ids)), ids, views, sizes)


@pytest.mark.parametrize(
    ("semantics", "backend"),
    [
        ("torchvision", "reference"),
        ("torchvision", "fused"),
        *(pytest.param("tensorflow", backend, marks=pytest.mark.slow) for backend in BACKENDS),
    ],
)
def test_views_of_the_ids_are_those_of_the_images_selected(semantics: Any, backend: Any) -> None:
    """One size or ragged, an id twice: to the bit, as pixels and arithmetic are the same."""
    policy = dataclasses.replace(CIFAR, semantics=semantics, size=8)
    dataset, ids = same_size(9, 12, 14), torch.tensor([8, 0, 8, 3])
    params, look = drawn(policy, ids, 12, 14).to(DEVICE), policy.rendering
    images = as_ragged(dataset).to(DEVICE)
    expected = make_views(images.select(ids.to(DEVICE)), params, **look, backend=backend)
    for held in (dataset.to(DEVICE), images):
        views = gather_views(held, ids.to(DEVICE), params, **look, backend=backend)
        assert torch.equal(views, expected)
        assert views.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@settings(max_examples=settings().max_examples // 6)  # each takes up to a second in the interpreter
@given(st.data())
def test_any_sizes(data: st.DataObject) -> None:
    count, height, width = (data.draw(st.integers(1, 20)) for _ in range(3))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=3)))
    policy = dataclasses.replace(CIFAR, size=data.draw(st.integers(1, 32)), jitter=0.4)
    params, dataset = drawn(policy, ids, height, width, 1).to(DEVICE), same_size(count, height, width)
    views = gather_views(dataset.to(DEVICE), ids.to(DEVICE), params, **policy.rendering, backend="fused")
    picked = as_ragged(dataset[ids]).to(DEVICE)
    expected = make_views(picked, params, **policy.rendering, backend="reference")
    # The same float32 formulas, summed in another order, and divided by ImageNet's std of .22.
    torch.testing.assert_close(views, expected, rtol=0, atol=5e-5)


def test_an_id_outside_gives_views_of_nan() -> None:
    """As on a device, where ids are not waited for: through the kernels themselves."""
    dataset, ids = same_size(3, 8, 8).to(DEVICE), torch.tensor([2, 3, -1, 2**40], device=DEVICE)
    params = drawn(CIFAR, torch.arange(4), 8, 8).to(DEVICE)
    held = as_ragged(dataset.cpu()).to(DEVICE)
    for pixels in (
        Pixels(buffer=dataset, offsets=None, heights=None, widths=None, ids=ids),
        Pixels(buffer=held.buffer, offsets=held.offsets, heights=held.heights, widths=held.widths, ids=ids),
    ):
        views = fused.make_views(pixels, params, **CIFAR.rendering, dtype=torch.float16)
        assert views.flatten(1).isnan().all(1).tolist() == [False, True, True, True] * 2
        assert views[::4].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments_are_refused(backend: Any) -> None:
    dataset, ids = same_size(3, 8, 8), torch.tensor([0, 2])
    params = drawn(CIFAR, ids, 8, 8)
    if DEVICE.type != "cpu":
        backend = "reference"
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=r"row 1 of the views.*ids are 0 to 2"):
            gather_views(dataset, torch.tensor([0, wrong]), params, size=16, backend=backend)
    with pytest.raises(ValueError, match=r"ids is .*int32 \[2\].*give torch.int64 \[2\]"):
        gather_views(dataset, ids.int(), params, size=16, backend=backend)
    with pytest.raises(ValueError, match=r"dataset is \[3, 3, 8, 8\]; give \[N, H, W, 3\]"):
        gather_views(dataset.permute(0, 3, 1, 2), ids, params, size=16, backend=backend)
    with pytest.raises(ValueError, match="contiguous"):
        gather_views(dataset[:, ::2], ids, params, size=16, backend=backend)
    with pytest.raises(ValueError, match=r"row 0 of the views.*lies in its image"):
        gather_views(dataset[:, :4].contiguous(), ids, drawn(CIFAR, ids, 80, 8), size=16, backend=backend)


@pytest.mark.slow
def test_compiled_whole() -> None:
    dataset, ids = same_size(5, 8, 8).to(DEVICE), torch.tensor([4, 1], device=DEVICE)
    params = drawn(CIFAR, torch.arange(2), 8, 8).to(DEVICE)

    def views(dataset: Tensor, ids: Tensor) -> Tensor:
        return gather_views(dataset, ids, params, **CIFAR.rendering, backend="fused")

    compiled = torch.compile(views, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(dataset, ids), views(dataset, ids))
