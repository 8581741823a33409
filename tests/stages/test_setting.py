"""A recipe made concrete: which labels are kept, which data are shared, which crops a stage cuts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastsimclr.cli.main import main
from fastsimclr.distributed.ranks import Ranks
from fastsimclr.loaders import DataConfig, DataError, Policy
from fastsimclr.optim import OptimConfig
from fastsimclr.recipe import Recipe, parse_recipe
from fastsimclr.runtime.device import Runtime
from fastsimclr.stages import Setting
from fastsimclr.training.config import TrainerConfig

DIGITS = Recipe(device="cpu", data=DataConfig(labels_per_class=2, label_seed=3), views=Policy(size=8))


def test_only_the_few_labels_reach_a_distillation_with_labels() -> None:
    setting = Setting(DIGITS)
    few, every = setting.labelled("subset"), setting.with_few_labels()
    assert len(every) == len(setting.splits.unlabelled) == 1438
    kept = np.flatnonzero(every.labels >= 0)
    assert sorted(every.describe(i) for i in kept) == sorted(few.describe(i) for i in range(20))
    truth = {setting.splits.train.describe(i): int(setting.splits.train.labels[i]) for i in range(1438)}
    assert [int(every.labels[i]) for i in kept] == [truth[every.describe(i)] for i in kept]
    assert every.fingerprint != setting.splits.unlabelled.fingerprint


def test_two_folders_of_like_files_are_not_taken_for_one_another(tmp_path: Path) -> None:
    for split, value in (("train", 10), ("val", 200)):
        for name in ("a", "b"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(place / "0.bmp")  # all files of one size
    setting = Setting(replace(DIGITS, data=DataConfig(source="folder", root=str(tmp_path), loader="resident")))
    train, val = setting.splits.train, setting.splits.val
    pixels = [next(iter(setting.passes(source))).images.buffer for source in (train, val)]
    assert [int(buffer.max()) for buffer in pixels] == [10, 200]


def test_a_stage_may_crop_more_mildly_than_pretraining_and_takes_no_colour() -> None:
    every = replace(DIGITS.views, solarise=0.2, rotate90=0.5, sobel=0.5, noise=0.5, cutout=0.5)
    setting = Setting(replace(DIGITS, views=every))
    assert setting.crop_flip_policy().scale == DIGITS.views.scale
    assert setting.crop_flip_policy().ops <= {"flip", "rotate"}
    mild = setting.crop_flip_policy((0.6, 1.0))
    assert (mild.scale, mild.jitter, mild.grey, mild.blur, mild.solarise) == ((0.6, 1.0), 0, 0, 0, 0)
    assert setting.evaluation_policy.ops == frozenset()


@pytest.mark.parametrize(
    ("words", "source", "arch"),
    [([], "digits", "resnet18"), (["--data.root", "somewhere"], "folder", "resnet50")],
)
def test_the_recipe_without_config(
    words: list[str], source: str, arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", *words, "--print_config"])
    recipe = parse_recipe(capsys.readouterr().out)
    assert (recipe.data.source, recipe.model.arch) == (source, arch)


def test_damage_found_in_a_part_is_measured_on_that_part(tmp_path: Path) -> None:
    for index in range(60):
        place = tmp_path / "ab"[index % 2]
        place.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(place / f"{index:02d}.png")
    for index in (0, 21):
        (tmp_path / "ab"[index % 2] / f"{index:02d}.png").write_bytes(b"not an image")
    data = DataConfig(source="folder", root=str(tmp_path), loader="native", max_bad_fraction=0.1)
    setting = Setting(replace(DIGITS, data=data))
    every = setting.splits.unlabelled
    list(setting.passes(every))
    (subset,) = (source for source in [setting.spread_subset(every, 10)])
    list(setting.passes(subset))  # fewer images than the damaged ones would be a tenth of
    (damaged,) = setting.data_facts()["damaged"].values()
    assert len(damaged) >= 1
    strict = Setting(replace(DIGITS, data=replace(data, max_bad_fraction=0.01)))
    with pytest.raises(DataError, match=r"at least [12] of \d+ images are damaged"):
        list(strict.passes(strict.splits.unlabelled))


def set_up(ranks: Ranks, lr: float) -> str:
    """What a Setting says on a rank whose recipe has another learning rate."""
    recipe = replace(DIGITS, trainer=TrainerConfig(precision="fp32"))
    if ranks.rank == 1:
        recipe = replace(recipe, pretrain=replace(recipe.pretrain, optim=OptimConfig(lr=lr)))
    runtime = Runtime(device=torch.device("cpu"), precision="fp32", ranks=ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastsimclr.stages.setting.choose_runtime", lambda *_: runtime)
        try:
            Setting(recipe)
        except ValueError as error:
            return str(error)
    return ""


def test_ranks_with_other_recipes_are_refused(ranks_pool: Callable[..., list[str]]) -> None:
    said = ranks_pool(2, set_up, 0.123)
    assert said[0] == said[1]
    assert "rank 1 was given another recipe than rank 0 (pretrain.optim.lr: 1.0 -> 0.123" in said[0]
