"""Evaluation of features against plain loops and scikit-learn."""

# N images to classify, T labelled images, C channels, K classes

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from fastsimclr.distributed.ranks import Ranks
from fastsimclr.evaluation.features import Features, calibrate_bn, extract, raw_pixels
from fastsimclr.evaluation.knn import knn as knn_of_all_settings
from fastsimclr.evaluation.logistic import logistic_regression
from fastsimclr.evaluation.scores import score
from fastsimclr.loaders import ArraySource, Batch, DataConfig, EvalLoader, Policy
from fastsimclr.models import BatchNorm, ModelConfig, build_encoder
from fastsimclr.runtime.device import Runtime

ALONE = Ranks()
RUNTIME = Runtime(device=torch.device("cpu"), precision="fp32")
PLAIN = Policy(size=8, crop="centre", flip=0, jitter=0, grey=0, blur=0, normalise="none")


def clusters(n: int, classes: int, seed: int, spread: float = 1.0) -> Features:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, 6))
    labels = rng.integers(0, classes, n)
    values = centres[labels] + spread * rng.normal(size=(n, 6))
    return Features(values=torch.tensor(values, dtype=torch.float32), labels=torch.tensor(labels))


def knn(train: Features, test: Features, classes: int, *, k: int, temperature: float) -> dict[str, float]:
    """The metrics of one setting, in one process."""
    (found,) = knn_of_all_settings(train, test, classes, ks=[k], temperatures=[temperature], ranks=ALONE).values()
    return found.metrics


def fit(train: Features, test: Features, classes: int, l2: float) -> tuple[dict[str, float], int]:
    """The metrics on `test`, and the iterations, in one process."""
    fitted = logistic_regression(train, classes, l2=l2, ranks=ALONE)
    return fitted.score(test, ALONE).metrics, fitted.iterations


def loop_knn(train: Features, test: Features, classes: int, k: int, temperature: float) -> tuple[float, float]:
    """(top1, top5) one image at a time in float64. Wu et al. 2018, Sec. 3.4."""
    bank = [(row, int(label)) for row, label in zip(train.values.double().tolist(), train.labels, strict=True)]
    top1 = top5 = 0
    for row, label in zip(test.values.double().tolist(), test.labels.tolist(), strict=True):
        near = []
        for other, other_label in bank:
            dot = sum(a * b for a, b in zip(row, other, strict=True))
            near.append((dot / math.hypot(*row) / math.hypot(*other), other_label))
        votes = [0.0] * classes
        for similarity, other_label in sorted(near, reverse=True)[:k]:
            votes[other_label] += math.exp(similarity / temperature)
        ranked = sorted(range(classes), key=lambda c: -votes[c])
        top1 += ranked[0] == label
        top5 += label in ranked[:5]
    return top1 / len(test.labels), top5 / len(test.labels)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.1), (20, 0.07), (1000, 1.0)])
def test_knn_is_the_plain_loop(k: int, temperature: float) -> None:
    train, test = clusters(63, 7, seed=0), clusters(41, 7, seed=1)
    result = knn(train, test, 7, k=k, temperature=temperature)
    top1, top5 = loop_knn(train, test, 7, k, temperature)
    assert result["top1"] == pytest.approx(top1)
    if k >= 20:  # with fewer neighbours than that, classes without any vote share the last of the five places
        assert result["top5"] == pytest.approx(top5)


def test_knn_with_even_votes_is_scikit_learns() -> None:
    # With one neighbour, or a temperature so high that all votes weigh the same, it is the plain cosine kNN.
    train, test = clusters(100, 4, seed=2), clusters(60, 4, seed=3)
    reference = KNeighborsClassifier(1, metric="cosine").fit(train.values.numpy(), train.labels.numpy())
    expected = reference.score(test.values.numpy(), test.labels.numpy())
    assert knn(train, test, 4, k=1, temperature=0.1)["top1"] == pytest.approx(expected)


def test_knn_in_blocks_is_knn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = clusters(50, 7, seed=0), clusters(33, 7, seed=1)
    whole = knn(train, test, 7, k=5, temperature=0.1)
    split = torch.split
    monkeypatch.setattr(torch, "split", lambda tensor, size: split(tensor, 4))
    assert knn(train, test, 7, k=5, temperature=0.1) == whole


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_logistic_regression_is_scikit_learns(l2: float) -> None:
    train, test = clusters(120, 7, seed=4), clusters(400, 7, seed=5)
    result, iterations = fit(train, test, 7, l2)

    def unit_rms(features: Features) -> npt.NDArray[np.float64]:
        """Each row scaled to a root mean square of 1, that is to length sqrt(C)."""
        x = features.values.double().numpy()
        return np.asarray(x / np.sqrt((x**2).mean(axis=1, keepdims=True)))

    x = unit_rms(train)
    # Theirs: sum of cross-entropies + |W|² / (2 C); ours: mean + l2 / 2 |W|². So C = 1 / (l2 T).
    reference = LogisticRegression(C=1 / (l2 * len(x)), max_iter=2000, tol=1e-8)
    reference.fit(x, train.labels.numpy())
    logits = reference.decision_function(unit_rms(test))
    labels = test.labels.numpy()
    ranked = np.argsort(-logits, axis=1)[:, :5]
    # One image in 400 may lie on a border between two classes.
    assert result["top1"] == pytest.approx((ranked[:, 0] == labels).mean(), abs=1 / 400 + 1e-6)
    assert result["top5"] == pytest.approx((ranked == labels[:, None]).any(axis=1).mean(), abs=1 / 400 + 1e-6)
    assert 0 < iterations <= 200


def test_logistic_regression_takes_any_scale_a_zero_feature_and_an_absent_class() -> None:
    train, test = clusters(40, 3, seed=0), clusters(20, 3, seed=1)
    large, small = (
        Features(values=torch.cat([f.values * scale, torch.zeros(len(f.labels), 1)], dim=1), labels=f.labels)
        for f, scale in ((train, 1e4), (test, 1e-4))
    )
    scaled, _ = fit(large, small, 9, 1e-3)
    plain, _ = fit(train, test, 9, 1e-3)
    assert scaled["top1"] == pytest.approx(plain["top1"], abs=1 / 20 + 1e-6)  # the zero column changes the length
    assert plain["top1"] > 0.5


def test_several_settings_are_each_setting_alone() -> None:
    train, test = clusters(63, 7, seed=0), clusters(41, 7, seed=1)
    table = knn_of_all_settings(train, test, 7, ks=(20, 5, 1000, 63), temperatures=(0.1, 1.0), ranks=ALONE)
    assert list(table) == [(20, 0.1), (20, 1.0), (5, 0.1), (5, 1.0), (63, 0.1), (63, 1.0)]  # 1000 is cut to 63
    for (k, temperature), found in table.items():
        assert found.top1 == pytest.approx(loop_knn(train, test, 7, k, temperature)[0])


def test_accuracy_of_the_five_best() -> None:
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [9.0, 8, 7, 6, 5, 4, 3], [0.0, 1, 2, 3, 4, 5, 6]])
    assert score(logits, torch.tensor([0, 4, 0]), ALONE).metrics == pytest.approx({"top1": 1 / 3, "top5": 2 / 3})
    assert score(logits[:, :5], torch.tensor([0, 4, 3]), ALONE).metrics == pytest.approx({"top1": 1 / 3})


def test_accuracy_of_each_class() -> None:
    labels = torch.tensor([2, 0, 2, 0, 2])
    logits = nn.functional.one_hot(torch.tensor([2, 1, 0, 0, 2]), 4).float()
    assert score(logits, labels, ALONE).per_class(["a", "b", "c", "d"]) == [
        {"name": "a", "images": 2, "correct": 1},
        {"name": "b", "images": 0, "correct": 0},
        {"name": "c", "images": 3, "correct": 2},
        {"name": "d", "images": 0, "correct": 0},
    ]


def grey_levels(n: int) -> ArraySource:
    """n images of one colour: image i has level i in every pixel."""
    pixels = np.repeat(np.arange(n, dtype=np.uint8), 8 * 8 * 3).reshape(n, 8, 8, 3)
    return ArraySource("levels", pixels, np.arange(n) % 3, ("a", "b", "c"))


@pytest.mark.parametrize("threads", [1, 3])
def test_extract_keeps_order_and_labels(threads: int) -> None:
    config = DataConfig(threads=threads, loader="native")
    loader = EvalLoader(grey_levels(70), config, batch=16)
    features = extract(raw_pixels, loader, PLAIN, RUNTIME)
    assert features.values.shape == (70, 192)
    torch.testing.assert_close(features.values, (torch.arange(70.0) / 255)[:, None].expand(70, 192))
    assert features.labels.tolist() == [i % 3 for i in range(70)]
    assert not features.values.is_inference()


def test_extract_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no image to evaluate"):
        extract(raw_pixels, iter(()), PLAIN, RUNTIME)


class Keep(nn.Module):
    """A BN alone, and what went into it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchNorm(3)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        out: Tensor = self.norm(images)
        return out


def batches(n: int, size: int) -> Iterator[Batch]:
    rng = np.random.default_rng(0)
    source = ArraySource("noise", rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), np.zeros(n, np.int64), ("a",))
    return iter(EvalLoader(source, DataConfig(loader="native"), batch=size))


def test_calibrated_statistics_are_the_plain_averages() -> None:
    module = Keep()
    assert module.norm.running_mean is not None
    module.norm.running_mean.add_(7.0)
    momentum = module.norm.momentum
    calibrate_bn(module, batches(48, 16), PLAIN, RUNTIME)
    seen = torch.stack(module.seen).double()  # three batches of 16
    mean = seen.mean(dim=(0, 1, 3, 4))
    variance = torch.stack([batch.transpose(0, 1).flatten(1).var(dim=1) for batch in seen]).mean(dim=0)
    assert module.norm.running_mean is not None and module.norm.running_var is not None
    torch.testing.assert_close(module.norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.norm.running_var.double(), variance, rtol=1e-5, atol=1e-6)
    assert module.norm.momentum == momentum and not module.training


def test_calibration_leaves_the_weights() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(arch="resnet18", width=0.125), 8)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    calibrate_bn(encoder, batches(32, 16), PLAIN, RUNTIME)
    assert all(torch.equal(p, before[name]) for name, p in encoder.named_parameters())
    assert not any(module.training for module in encoder.modules())
