"""The objectives: their losses and gradients against the formulas in plain code, and what stays frozen."""

# N images, K classes

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from fastsimclr.methods import Contrastive, CrossEntropy, Distillation, Ensemble
from fastsimclr.models import BatchNorm, ClassifierNet, ModelConfig, build_classifier, build_simclr

TINY = ModelConfig(arch="resnet18", width=0.125, head_layers=2, head_dim=8)


def classifier(seed: int, classes: int = 5) -> ClassifierNet:
    torch.manual_seed(seed)
    return build_classifier(TINY, 8, classes, init="normal")


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def changed(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The keys whose tensors differ in any bit."""
    return [key for key in a if not torch.equal(a[key], b[key])]


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("label_weight", [0.0, 0.3, 1.0])
def test_distillation_is_the_formula(temperature: float, label_weight: float) -> None:
    student, teacher = classifier(1).eval(), classifier(2).eval()
    objective = Distillation(student, teacher, temperature=temperature, label_weight=label_weight).eval()
    labels = [2, -1, 0, -1, 4, 4]
    x = images(len(labels))
    outcome = objective(x, torch.tensor(labels))
    student_logits = student(x).detach().double()
    s, t = student_logits.tolist(), teacher(x).detach().double().tolist()
    distilled = 0.0
    gradient = torch.zeros_like(student_logits)
    for n, (s_row, t_row) in enumerate(zip(s, t, strict=True)):
        p, q = softmax(t_row, temperature), softmax(s_row, temperature)
        distilled -= sum(p[k] * math.log(q[k]) for k in range(5)) / len(s)
        for k in range(5):
            gradient[n, k] += (1 - label_weight) * (q[k] - p[k]) / temperature / len(s)
    labelled = [n for n, label in enumerate(labels) if label >= 0]
    supervised = -sum(math.log(softmax(s[n], 1)[labels[n]]) for n in labelled) / len(labelled)
    for n in labelled:
        for k in range(5):
            gradient[n, k] += label_weight * (softmax(s[n], 1)[k] - (k == labels[n])) / len(labelled)
    expected = (1 - label_weight) * distilled + label_weight * supervised
    # float32 logits and softmax against float64: a few units in the last place.
    assert outcome.loss.item() == pytest.approx(expected, rel=1e-5)
    agreement = sum(a.index(max(a)) == b.index(max(b)) for a, b in zip(s, t, strict=True))
    assert outcome.metrics["teacher_agreement"].item() == pytest.approx(agreement / len(s))
    # The classifier's bias sees the sum of the logits' gradients.
    outcome.loss.backward()
    bias = student.classifier.bias.grad
    assert bias is not None
    torch.testing.assert_close(bias.double(), gradient.sum(dim=0), rtol=1e-4, atol=1e-7)


def test_distillation_without_any_label_has_no_label_term() -> None:
    student, teacher = classifier(1).eval(), classifier(2).eval()
    x, none = images(4), torch.full((4,), -1)
    plain = Distillation(student, teacher, temperature=1.0).eval()(x, none).loss
    mixed = Distillation(student, teacher, temperature=1.0, label_weight=0.25).eval()(x, none).loss
    assert mixed.item() == pytest.approx(0.75 * plain.item(), rel=1e-6)


def test_an_ensemble_of_another_temperature_is_refused() -> None:
    ensemble = Ensemble([classifier(2), classifier(3)], 2.0)
    assert Distillation(classifier(1), ensemble, temperature=2.0).teacher is ensemble
    with pytest.raises(ValueError, match=r"temperature=1.0 is not the ensemble's 2.0, .*; give both the same"):
        Distillation(classifier(1), ensemble, temperature=1.0)


def test_the_teacher_stays_as_it_is() -> None:
    student, teacher = classifier(1), classifier(2)
    objective = Distillation(student, teacher, temperature=1.0).train()
    before_teacher, before_student = state(teacher), state(student)
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        objective(images(6, step), torch.full((6,), -1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert changed(before_teacher, state(teacher)) == []
    assert all(p.grad is None for p in teacher.parameters())
    assert len(changed(before_student, state(student))) > 10
    assert not any(module.training for module in teacher.modules())
    assert all(module.training for module in student.modules())


def step_cross_entropy(objective: CrossEntropy, n: int = 6) -> None:
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    for seed in range(2):
        objective.train()(images(n, seed), torch.arange(n) % 5).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_cross_entropy_is_the_mean_negative_log_likelihood() -> None:
    network = classifier(3).eval()
    x, labels = images(4), [1, 1, 4, 0]
    logits = network(x).detach().double().tolist()
    outcome = CrossEntropy(network).eval()(x, torch.tensor(labels))
    expected = -sum(math.log(softmax(row, 1)[k]) for row, k in zip(logits, labels, strict=True)) / 4
    assert outcome.loss.item() == pytest.approx(expected, rel=1e-5)
    correct = sum(row.index(max(row)) == k for row, k in zip(logits, labels, strict=True)) / 4
    assert outcome.metrics["top1"].item() == correct


def test_frozen_body_moves_the_classifier_alone() -> None:
    network = classifier(3)
    before = state(network)
    step_cross_entropy(CrossEntropy(network, frozen_body=True))
    assert changed(before, state(network)) == ["classifier.weight", "classifier.bias"]


def test_frozen_bn_moves_weights_but_no_statistics() -> None:
    network = classifier(3)
    before = state(network)
    step_cross_entropy(CrossEntropy(network, frozen_bn=True))
    moved = set(changed(before, state(network)))
    statistics = {key for key in before if key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert statistics
    assert moved & statistics == set()
    norms = [name for name, module in network.named_modules() if isinstance(module, BatchNorm)]
    assert {f"{name}.bias" for name in norms} <= moved


def test_without_freezing_everything_moves() -> None:
    network = classifier(3)
    before = state(network)
    step_cross_entropy(CrossEntropy(network))
    still = {name for name in before if name not in changed(before, state(network))}
    # gamma 0 at the end of each block keeps the inner weights of a fresh block where they are for one step only.
    assert still == set()


@pytest.mark.parametrize("scaling", ["paper", "google"])
def test_contrastive_is_algorithm_1_on_the_projections(scaling: str) -> None:
    torch.manual_seed(0)
    network = build_simclr(TINY, 8).eval()
    objective = Contrastive(network, temperature=0.2, scaling=scaling).eval()  # type: ignore[arg-type]
    x, n = images(10), 5
    outcome = objective(x, torch.full((n,), -1))
    z = torch.nn.functional.normalize(network(x)[1].detach().double(), dim=1)
    s = (z @ z.T / 0.2).tolist()
    total, hits = 0.0, 0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        others = [k for k in range(2 * n) if k != i]
        total += math.log(sum(math.exp(s[i][k]) for k in others)) - s[i][j]
        hits += max(others, key=lambda k: s[i][k]) == j
    expected = total / (2 * n) * (2 if scaling == "google" else 1)
    assert outcome.loss.item() == pytest.approx(expected, rel=1e-5)
    assert outcome.metrics["contrastive_top1"].item() == pytest.approx(hits / (2 * n))
    outcome.loss.backward()
    assert all(p.grad is not None for p in network.parameters())


def test_the_classifier_is_what_lars_treats_as_a_supervised_head() -> None:
    network, teacher = classifier(1), classifier(2)
    assert list(CrossEntropy(network).supervised_heads()) == [network.classifier]
    assert list(Distillation(network, teacher, temperature=1.0).supervised_heads()) == [network.classifier]
    assert list(Contrastive(build_simclr(TINY, 8), temperature=1.0, scaling="paper").supervised_heads()) == []
