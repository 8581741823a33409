"""Evaluation by several ranks is that of one: features, neighbours, logistic regression and counts."""

# N images to classify, T labelled images, C channels, K classes

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsimclr import stages
from fastsimclr.distributed.ranks import Ranks
from fastsimclr.evaluation.config import LinearConfig
from fastsimclr.evaluation.features import Features, extract, raw_pixels
from fastsimclr.evaluation.knn import knn
from fastsimclr.evaluation.logistic import logistic_regression
from fastsimclr.evaluation.scores import by_group, calibration, confusion, score
from fastsimclr.loaders import DataConfig, EvalLoader, Policy
from fastsimclr.loaders.sets.folder import open_folder
from fastsimclr.recipe import Recipe, parse_recipe
from fastsimclr.runtime.device import Runtime
from tests.smoke import SmokeRun

PLAIN = Policy(size=8, crop="centre", flip=0, jitter=0, grey=0, blur=0, normalise="none")
CLASSES = 7


def clusters(n: int, seed: int) -> Features:
    """n points around one centre a class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    values = np.random.default_rng(99).normal(size=(CLASSES, 6))[labels] + rng.normal(size=(n, 6))
    return Features(values=torch.tensor(values), labels=torch.tensor(labels))


Pool = Callable[..., list[Any]]
Whole = tuple[Features, Features]


def share(features: Features, ranks: Ranks, dtype: torch.dtype = torch.float32) -> Features:
    """This rank's contiguous part, as the loader cuts it."""
    n = len(features.labels)
    part = slice(ranks.rank * n // ranks.world, (ranks.rank + 1) * n // ranks.world)
    return Features(values=features.values[part].to(dtype), labels=features.labels[part])


def evaluate_on(ranks: Ranks, whole: Whole, dtype: torch.dtype) -> dict[str, Any]:
    train, test = (share(features, ranks, dtype) for features in whole)
    near = knn(train, test, CLASSES, ks=(5, 20), temperatures=(0.1, 0.5), ranks=ranks)
    fitted = logistic_regression(train, CLASSES, l2=1e-3, ranks=ranks)
    logits = test.values.to(torch.float32)  # 6 channels: as good as 6 classes, exactly the same on all ranks
    predicted, labels = logits.argmax(dim=1), test.labels % 6
    sure = calibration(logits, predicted, labels, ranks)
    return {
        "confusion": confusion(predicted, labels, 6, ranks).tolist(),
        "groups": by_group(predicted == labels, test.labels // 3, 4, ranks).tolist(),
        "bins": sure.bins_3B,
        "nll": sure.nll,
        "knn": {setting: found.counts_3K.tolist() for setting, found in near.items()},
        "weight": fitted.weight,
        "bias": fitted.bias,
        "iterations": fitted.iterations,
        "linear": fitted.score(test, ranks).counts_3K.tolist(),
    }


@pytest.mark.parametrize("world", [2, 4])
def test_many_ranks_evaluate_as_one(ranks_pool: Pool, world: int) -> None:
    whole = clusters(63, 0), clusters(41, 1)  # neither is a multiple of the ranks
    (one,) = ranks_pool(1, evaluate_on, whole, torch.float64)
    results = ranks_pool(world, evaluate_on, whole, torch.float64)
    for found in results:
        assert found["knn"] == one["knn"] and found["linear"] == one["linear"]
        assert sum(one["linear"][0]) == 41
        assert found["confusion"] == one["confusion"] and found["groups"] == one["groups"]
        assert sum(one["groups"][0]) == sum(images for _, _, images in one["confusion"]) == 41
        torch.testing.assert_close(found["bins"], one["bins"], rtol=0, atol=1e-12)
        assert found["nll"] == pytest.approx(one["nll"], abs=1e-12)
        for key in ("weight", "bias"):
            torch.testing.assert_close(found[key], one[key], rtol=0, atol=1e-6)
            assert torch.equal(found[key], results[0][key])  # every rank took the same steps
        assert found["iterations"] == results[0]["iterations"]


def test_many_ranks_in_float32_differ_by_rounding(ranks_pool: Pool) -> None:
    whole = clusters(63, 0), clusters(41, 1)
    (one,) = ranks_pool(1, evaluate_on, whole, torch.float32)
    for found in ranks_pool(2, evaluate_on, whole, torch.float32):
        # L-BFGS ends where the gradient is below 1e-5; the curvature along W is at least l2 = 1e-3.
        torch.testing.assert_close(found["weight"], one["weight"], rtol=0, atol=2 * 1e-5 / 1e-3)
        assert found["knn"] == one["knn"]


def test_more_ranks_than_images(ranks_pool: Pool) -> None:
    whole = clusters(63, 0), clusters(2, 1)
    (one,) = ranks_pool(1, evaluate_on, whole, torch.float64)
    for found in ranks_pool(4, evaluate_on, whole, torch.float64):
        assert found["knn"] == one["knn"] and found["linear"] == one["linear"]
        assert found["confusion"] == one["confusion"] and found["groups"] == one["groups"]


def save_images(root: Path, n: int) -> None:
    """n images of one colour in a class folder: image i has level 10 i in every pixel."""
    (root / "a").mkdir(parents=True)
    for i in range(n):
        Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(root / "a" / f"{i:02}.png")


def extract_on(ranks: Ranks, root: Path) -> tuple[list[float], list[int], list[list[int]]]:
    """Levels and ids of this rank's images, and counts over all ranks by a classifier that is right on bright ones."""
    source = open_folder(root, labels=None, val=None, val_labels=None)[0]
    config = DataConfig(threads=1, loader="native", max_bad_fraction=0.5)
    loader = EvalLoader(source, config, batch=2, rank=ranks.rank, world=ranks.world)
    features = extract(raw_pixels, loader, PLAIN, Runtime(device=torch.device("cpu"), precision="fp32", ranks=ranks))
    levels = features.values[:, 0] * 255
    logits = torch.stack([levels - 55, 55 - levels], dim=1)
    assert features.ids is not None
    return levels.round().tolist(), features.ids.tolist(), score(logits, features.labels, ranks).counts_3K.tolist()


@pytest.mark.parametrize(("world", "images"), [(2, 11), (4, 11), (4, 3)])
def test_no_image_counts_twice_and_damaged_ones_not_at_all(
    ranks_pool: Pool, tmp_path: Path, world: int, images: int
) -> None:
    save_images(tmp_path, images)
    (tmp_path / "a" / "01.png").write_text("no image")
    results = ranks_pool(world, extract_on, tmp_path)
    expected = [10.0 * i for i in range(images) if i != 1]
    assert [level for levels, _, _ in results for level in levels] == expected
    assert [10.0 * i for _, ids, _ in results for i in ids] == expected
    bright = sum(level > 55 for level in expected)
    for _, _, counts in results:
        assert counts == [[len(expected), 0], [bright, 0], [len(expected), 0]]


def test_no_image_on_any_rank_is_an_error_on_each(ranks_pool: Pool, tmp_path: Path) -> None:
    save_images(tmp_path, 2)
    for path in (tmp_path / "a").iterdir():
        path.write_text("no image")
    with pytest.raises(RuntimeError, match="there is no image to evaluate") as error:
        ranks_pool(2, extract_on, tmp_path)
    assert "rank 0 of 2" in str(error.value) and "rank 1 of 2" in str(error.value)


@pytest.fixture(scope="module")
def pretrained(smoke_run: SmokeRun) -> Path:
    return smoke_run("pretrain")


def stages_on(ranks: Ranks, recipe: Recipe, run: Path, out: Path) -> dict[str, dict[str, Any]]:
    """The results of kNN with its baselines and of linear evaluation with sweeps, by all ranks.

    In double precision: no image may change its class because sums are taken in another order.
    """
    with pytest.MonkeyPatch.context() as patch:
        runtime = Runtime(device=torch.device("cpu"), precision="fp64", ranks=ranks)
        patch.setattr("fastsimclr.stages.setting.choose_runtime", lambda *given: runtime)
        setting = stages.Setting(recipe)
        near = stages.evaluate_knn(setting, run, out / "knn", False)
        linear = stages.evaluate_linear(setting, run, out / "linear", False)
        sgd = replace(recipe, linear=LinearConfig(method="sgd", labels="all", sweep_lr=(0.1, 1.0), batch=32))
        steps = stages.evaluate_linear(stages.Setting(sgd), run, out / "sgd", False)
    return {"knn": near, "lbfgs": linear, "sgd": steps}


@pytest.fixture(scope="module")
def recipe(pretrained: Path) -> Recipe:
    made = parse_recipe((pretrained / "recipe.yaml").read_text())
    return replace(made, linear=LinearConfig(labels="all", sweep_l2=(1.0, 0.1)))


@pytest.fixture(scope="module")
def by_one(pretrained: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return stages_on(Ranks(), recipe, pretrained, tmp_path_factory.mktemp("one"))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_stages_by_many_ranks_are_those_of_one(
    ranks_pool: Pool, pretrained: Path, recipe: Recipe, by_one: dict[str, Any], tmp_path: Path, world: int
) -> None:
    for found in ranks_pool(world, stages_on, recipe, pretrained, tmp_path):
        for name, one in by_one.items():
            mine, expected = dict(found[name]["metrics"]), dict(one["metrics"])
            if name == "lbfgs":
                # It ends where the gradient is below 1e-5, in float32; the curvature along W is at least l2 = 0.1, and
                # the features' length is sqrt(C) = 8: how far logits, so log-probabilities, may lie apart.
                apart = 2 * 8 * 2 * 1e-5 / 0.1
                assert mine.pop("nll") == pytest.approx(expected.pop("nll"), abs=apart)
                assert mine.pop("ece") == pytest.approx(expected.pop("ece"), abs=apart)
            assert mine == pytest.approx(expected, abs=1e-6), name
            images, expected = ([entry["images"] for entry in of["per_class"]] for of in (found[name], one))
            assert images == expected and sum(images) == 64
            assert found[name]["confusion"] == one["confusion"] and len(one["confusion"]) == 10
        for name in ("lbfgs", "sgd"):
            sweeps = (of[name]["sweep"] for of in (found, by_one))
            tried, expected = ([row["held_out_top1"] for row in sweep["tried"]] for sweep in sweeps)
            assert tried == pytest.approx(expected, abs=1e-6)
