"""The command line: recipes in, one recipe out, help for every key, and errors of one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastsimclr.cli.main import CONFIGS, main
from fastsimclr.recipe import Recipe, dump_recipe, parse_recipe

STAGES = ("pretrain", "linear", "knn", "finetune", "supervised", "distill", "run", "demo")


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command."""
    try:
        code = main(words)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which a command is refused."""
    code, out, err = call(capsys, *words)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code in (1, 2), (words, out, err)
    assert len(lines) == 1 and err.endswith(lines[0] + "\n"), err
    assert "Traceback" not in err and "usage:" not in err
    return lines[0]


def keys(config: Any, within: str = "") -> Iterator[str]:
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from keys(value, f"{within}{field.name}.")
        else:
            yield within + field.name


@pytest.mark.parametrize("command", STAGES)
def test_help_says_something_of_every_key(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    entries: dict[str, str] = {}
    for line in out.partition("options:")[2].splitlines():
        if option := re.match(r"  --([\w.]+)(?: \S+)*", line):
            key, line = option[1], line[option.end() :]
            entries[key] = ""
        if entries and (line.startswith(" " * 8) or (line.strip() and option)):
            entries[key] += " " + line.strip()
    for key in (*keys(Recipe()), "config", "out", "traceback", "print_config"):
        words = entries[key].split("(type:")[0].split("(required")[0].split()
        assert len(words) >= 3, f"--{key} has no help: {entries[key]!r}"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for command in (*STAGES, "bench"):
        assert re.search(rf"^    {command}  +\w", out, re.M)


@pytest.mark.slow
def test_the_printed_recipe_is_a_recipe_for_every_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    printed: dict[str, str] = {}  # text: a command that printed it
    for command in STAGES:
        code, out, err = call(capsys, command, "--seed", "7", "--print_config")
        assert code == 0, (command, err)
        printed.setdefault(out, command)
    for out, command in printed.items():
        assert parse_recipe(out).seed == 7, command
        path = tmp_path / f"{command}.yaml"
        path.write_text(out)
        for other in ("pretrain", "distill", "run"):
            code, again, err = call(capsys, other, "--config", str(path), "--print_config")
            assert (code, yaml.safe_load(again)) == (0, yaml.safe_load(out)), (command, other, err)


def test_demo_is_the_digits_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    _, demo, _ = call(capsys, "demo", "--print_config")
    _, digits, _ = call(capsys, "run", "--config", "digits.yaml", "--print_config")
    assert demo == digits
    assert yaml.safe_load(demo)["data"]["labels_per_class"] == 2


FAST = ("digits.yaml", "folder.yaml", "v2-paper.yaml")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.name, marks=() if path.name in FAST else pytest.mark.slow)
        for path in sorted(CONFIGS.glob("*.yaml"))
    ],
)
def test_every_recipe_parses_and_comes_back(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    recipe = parse_recipe(path.read_text())
    assert parse_recipe(dump_recipe(recipe)) == recipe
    code, out, err = call(capsys, "pretrain", "--config", path.name, "--print_config")
    assert code == 0, err
    assert yaml.safe_load(out) == yaml.safe_load(dump_recipe(recipe))


@pytest.mark.parametrize("words", [["--config", "digits.yaml"], ["--config=digits.yaml"], ["--config", "digits"]])
def test_recipes_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # not found because the tests run in the checkout
    _, out, _ = call(capsys, "pretrain", *words, "--print_config")
    assert parse_recipe(out) == parse_recipe((CONFIGS / "digits.yaml").read_text())


def test_later_options_override_earlier_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("pretrain: {epochs: 3, optim: {lr: 0.25}}\nviews: {scale: [0.2, 0.9]}\n")
    words = ["--config", "digits.yaml", "--config", str(more), "--pretrain.epochs", "5", "--smoke"]
    _, out, _ = call(capsys, "pretrain", *words, "--data.threads=1", "--print_config")
    recipe = parse_recipe(out)
    assert (recipe.pretrain.epochs, recipe.pretrain.optim.lr, recipe.pretrain.optim.name) == (5, 0.25, "lars")
    assert (recipe.views.scale, recipe.views.size, recipe.smoke, recipe.data.threads) == ((0.2, 0.9), 8, True, 1)


@pytest.mark.parametrize(("word", "smoke"), [("--smoke", True), ("--smoke=true", True), ("--smoke=false", False)])
def test_smoke_needs_no_value(capsys: pytest.CaptureFixture[str], word: str, smoke: bool) -> None:
    _, out, _ = call(capsys, "pretrain", word, "--seed", "1", "--print_config")
    assert parse_recipe(out).smoke is smoke


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], ["give a command first", "pretrain", "demo"]),
        (["nonsense"], ["'nonsense'", "pretrain"]),
        (["pretrain", "--pretrain.bach", "3"], ["--pretrain.bach"]),
        (["pretrain", "--pretrain.batch", "many"], ["pretrain.batch", "int", "many"]),
        (["pretrain", "--pretrain.batch", "1.5"], ["pretrain.batch", "int", "1.5"]),
        (["pretrain", "--model.arch", "resnet19"], ["model.arch", "resnet18", "resnet19"]),
        (["pretrain", "--data.source", "imagenet"], ["data.source", "folder", "imagenet"]),
        (["pretrain", "--views.scale", "[0.5]"], ["views.scale", "2", "[0.5]"]),
        (["pretrain", "--data", "3"], ["data"]),
        (["pretrain", "--resume", "always"], ["--resume", "always", "auto"]),
        (["pretrain", "--pretrain.batch", "0"], ["pretrain.batch=0", "greater than 0"]),
        (["pretrain", "--pretrain.batch", "1"], ["pretrain.batch=1", "at least 2"]),
        (["pretrain", "--trainer.log_every_steps", "0"], ["trainer.log_every_steps=0", "at least 1"]),
        (["pretrain", "--model.width", "-1"], ["model.width=-1", "positive"]),
        (["pretrain", "--seed", "-1"], ["seed=-1", "between 0 and"]),
        (["pretrain", "--finetune.head_layer", "5"], ["finetune.head_layer=5", "0"]),
        (["pretrain", "--distill.label_weight", "2"], ["distill.label_weight=2.0", "between 0 and 1"]),
        (["pretrain", "--data.labels_per_class", "1", "--data.label_fraction", ".1"], ["labels_per_class", "exclude"]),
        (["pretrain", "--data.source", "folder"], ["data.root"]),
        (["pretrain", "--config"], ["--config"]),
        (["pretrain", "--config", "nowhere.yaml"], ["--config nowhere.yaml", "digits.yaml"]),
        (["run", "--resume", "auto"], ["--resume"]),
        (["run", "--seeds", "0", "--config", "digits.yaml"], ["--seeds 0", "at least 1"]),
        (["study"], ["labels", "study --help"]),
        (["linear"], ["from", "required"]),
        (["distill"], ["teacher", "required"]),
        (["linear", "--from", "nowhere"], ["nowhere/recipe.yaml", "--out"]),
        (["linear", "--fro", "nowhere"], ["--fro"]),
        (["distill", "--teacher", "nowhere", "--student", "resnet18"], ["nowhere/recipe.yaml"]),
        (["pretrain", "--device", "tpu"], ["device='tpu'", "cpu"]),
        (["pretrain", "--device", "cuda:99"], ["device='cuda:99'", "--device cpu"]),
        (["pretrain", "--device", "xpu"], ["device='xpu'", "cuda"]),
    ],
    ids=" ".join,
)
def test_wrong_words_are_refused_by_name(
    capsys: pytest.CaptureFixture[str], words: list[str], named: list[str]
) -> None:
    line = refused(capsys, *words)
    assert [name for name in named if name not in line] == [], line


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("pretrain: {bach: 3}", ["pretrain.bach"]),
        ("colour: red", ["colour"]),
        ("seed: many", ["seed", "int", "many"]),
        ("pretrain: 3", ["pretrain=3", "section"]),
        ("data: null", ["data=None", "section"]),
        ("pretrain: {optim: fast}", ["pretrain.optim='fast'", "section"]),
        ("- 1", ["list", "mapping"]),
        ("pretrain: [", ["not YAML"]),
        ("teacher: here", ["teacher"]),
        ("trainer: {precision: fp8}", ["trainer.precision", "fp8"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_recipes_are_refused_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, named: list[str]
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    line = refused(capsys, "pretrain", "--config", str(path), "--device", "none")
    assert [name for name in named if name not in line] == [], line
    with pytest.raises(ValueError):
        parse_recipe(text)


def test_a_traceback_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "pretrain", "--device", "tpu", "--traceback")
    assert code == 1
    assert err.startswith("Traceback") and "choose_runtime" in err and err.splitlines()[-1].startswith("error: device=")


def test_a_refused_command_leaves_nothing_to_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    """The parser of a command is kept."""
    refused(capsys, "pretrain", "--print_config", "--pretrain.bach", "3")
    assert "nowhere" in refused(capsys, "pretrain", "--data.source", "folder", "--data.root", "nowhere")
