"""A recipe made concrete: which labels are kept, which data are shared, which crops a stage cuts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastsimclr.cli import main
from fastsimclr.loaders import DataConfig, Policy
from fastsimclr.recipe import Recipe, parse_recipe
from fastsimclr.stages import Setting

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
    setting = Setting(replace(DIGITS, data=DataConfig(source="folder", root=str(tmp_path), resident="always")))
    train, val = setting.splits.train, setting.splits.val
    pixels = [next(iter(setting.passes(source))).images.buffer for source in (train, val)]
    assert [int(buffer.max()) for buffer in pixels] == [10, 200]


def test_a_stage_may_crop_more_mildly_than_pretraining_and_takes_no_colour() -> None:
    setting = Setting(DIGITS)
    assert setting.crop_flip_policy().scale == DIGITS.views.scale
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
