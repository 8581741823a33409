"""LARS against both of its formulas in plain loops over one tensor at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsimclr.kernels.lars import Variant, lars_step
from fastsimclr.kernels.lars.inputs import Rule, Tensors
from fastsimclr.kernels.lars.reference import lars_step_reference

Array = NDArray[np.float64]
SHAPES = [(8, 4, 3, 3), (16, 8), (8,), (1,), (4, 4), (5, 7)]
EXCLUDED = [False, False, True, True, False, False]


def google_step(w: Array, g: Array, v: Array, lr: float, decay: float, momentum: float, excluded: bool) -> Array:
    """One tensor by simclr's formula; v changes in place, the new weight returns."""
    ratio = 1.0
    if not excluded:
        g = g + decay * w
        w_norm, g_norm = math.sqrt((w * w).sum()), math.sqrt((g * g).sum())
        if w_norm > 0 and g_norm > 0:
            ratio = 0.001 * w_norm / g_norm
    v[...] = momentum * v + lr * ratio * g
    return w - v


def lightly_step(w: Array, g: Array, v: Array, lr: float, decay: float, momentum: float, excluded: bool) -> Array:
    """One tensor by the formula of lightly.utils.lars; v changes in place, the new weight returns."""
    w_norm, g_norm = math.sqrt((w * w).sum()), math.sqrt((g * g).sum())
    if not excluded and w_norm != 0 and g_norm != 0:
        g = (g + decay * w) * (0.001 * w_norm / (g_norm + decay * w_norm + 1e-8))
    v[...] = momentum * v + g
    return w - lr * v


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("decay", [0.0, 1e-4, 0.5])
@pytest.mark.parametrize("variant, oracle", [("google", google_step), ("lightly", lightly_step)])
def test_matches_the_plain_loops(variant: Variant, oracle: Any, decay: float, as_tensor: bool) -> None:
    """Five steps; tensor 4 starts at zero and tensor 5 has a zero gradient in the middle step."""
    params, momenta = tensors(0), [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    params[4].zero_()
    weights, buffers = [p.numpy().copy() for p in params], [m.numpy().copy() for m in momenta]
    for step in range(5):
        lr, grads = 0.5 + step, tensors(step + 1)
        if step == 2:
            grads[5].zero_()
        before = [g.clone() for g in grads]
        rate = torch.tensor(lr, dtype=torch.float64) if as_tensor else lr
        lars_step(params, grads, momenta, lr=rate, weight_decay=decay, excluded=EXCLUDED, variant=variant)
        assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True)), "the gradients were changed"
        for i, (w, v, flag) in enumerate(zip(weights, buffers, EXCLUDED, strict=True)):
            weights[i] = oracle(w, grads[i].numpy(), v, lr, decay, 0.9, flag)
            np.testing.assert_allclose(params[i].numpy(), weights[i], rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(momenta[i].numpy(), v, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("variant", ["google", "lightly"])
def test_no_decay_still_scales(variant: Variant) -> None:
    """The size of an adapted step follows the weight, not the gradient; decay 0 must not change that."""
    for size in (1.0, 1000.0):
        w, g, v = torch.full((10,), 2.0), torch.full((10,), size), torch.zeros(10)
        lars_step([w], [g], [v], lr=1.0, weight_decay=0.0, excluded=[False], variant=variant)
        assert torch.allclose(w, torch.full((10,), 2.0 - 0.001 * 2.0), rtol=1e-6)


class Operators(TorchDispatchMode):
    """Records the operators that were dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["google", "lightly"])
def test_few_operators_and_no_wait_for_the_device(variant: Variant) -> None:
    counts = []
    for copies in (1, 20):
        params, grads = tensors(0, torch.float32) * copies, tensors(1, torch.float32) * copies
        momenta = [torch.zeros_like(p) for p in params]
        with Operators() as seen:
            lars_step_reference(
                Tensors(
                    params,
                    grads,
                    momenta,
                    [None] * len(params),
                    weight_decay=[1e-4, 1e-3] * (len(params) // 2),
                    l2=[0.1] * len(params),
                    lr_scale=[0.5] * len(params),
                    excluded=EXCLUDED * copies,
                ),
                Rule(torch.tensor(0.1), 0.9, 0.001, variant, 1e-8, torch.tensor(0.5), found_inf=None),
            )
        assert not {"_local_scalar_dense", "item", "is_nonzero", "nonzero"} & set(seen.names)
        counts.append(len(seen.names))
    assert counts[0] == counts[1] <= 30


def test_all_or_none_excluded_and_nothing_at_all() -> None:
    for flag in (False, True):
        w, v = torch.ones(3), torch.zeros(3)
        lars_step([w], [torch.ones(3)], [v], lr=1.0, weight_decay=0.0, excluded=[flag])
        assert torch.allclose(w, torch.full((3,), 0.0 if flag else 0.999))
    lars_step([], [], [], lr=1.0, weight_decay=0.0, excluded=[])


def test_nan_gradient_is_not_hidden() -> None:
    w, v = torch.ones(3), torch.zeros(3)
    lars_step([w], [torch.tensor([1.0, math.nan, 1.0])], [v], lr=1.0, weight_decay=0.0, excluded=[False])
    assert w[1].isnan()


def test_bad_input_is_named() -> None:
    one = [torch.ones(1)]
    with pytest.raises(ValueError, match=r"1 params, 1 grads, 1 momenta, 2 excluded flags"):
        lars_step(one, one, one, lr=1.0, weight_decay=0.0, excluded=[True, False])
    with pytest.raises(ValueError, match=r"variant='apex'.*'lightly'"):
        lars_step(one, one, one, lr=1.0, weight_decay=0.0, excluded=[True], variant="apex")  # type: ignore[arg-type]
