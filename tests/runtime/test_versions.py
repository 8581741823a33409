"""The supported range of versions: one list, held by pip, by the start-up check and by the lowest test set."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from fastsimclr import __main__
from fastsimclr.runtime.versions import LOWEST, interpreter_problem, version_problems

ROOT = Path(__file__).parents[2]
GOOD = {"torch": "2.14.1+cu130", "torchvision": "0.29.1+cu130", "triton": "3.8.0", "numpy": "2.4.6"}


def problems(requirement: str = ">=2.14.0", **versions: str | None) -> list[str]:
    """The problems of GOOD with these versions instead, None: not installed."""
    return version_problems((GOOD | versions).get, lambda: requirement)


def test_versions_of_this_environment_work_together() -> None:
    assert version_problems() == []


def test_good_versions_have_no_problem() -> None:
    assert problems() == []
    assert problems("==2.14.1") == []
    assert problems(triton=None) == []
    assert problems("", torch="2.11.0", torchvision="0.26.0", triton="3.6.0", numpy="2.0.2") == []


@pytest.mark.parametrize(
    ("requirement", "versions", "remedy"),
    [
        ("==2.11.0", {}, "torchvision 0.29.1+cu130 requires torch==2.11.0, but torch 2.14.1+cu130 is installed"),
        ("==2.11.0", {}, "pip install --upgrade 'torch==2.14.1' torchvision"),
        (">=2.15.0,<3", {}, "pip install --upgrade 'torch==2.14.1' torchvision"),
        ("", {"torch": "2.10.0"}, "pip install --upgrade 'torch>=2.11'"),
        ("", {"triton": "3.5.1"}, "pip install --upgrade 'triton>=3.6'"),
        ("", {"numpy": "1.26.4"}, "pip install --upgrade 'numpy>=2.0'"),
    ],
)
def test_bad_versions_are_named_with_their_remedy(
    requirement: str, versions: dict[str, str], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (problem,) = problems(requirement, **versions)
    assert remedy in problem


def test_interpreter_of_triton_3_6_and_numpy_2_4(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = interpreter_problem((GOOD | {"triton": "3.6.0"}).get)
    assert problem is not None and "pip install 'numpy<2.4'" in problem
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert problems(triton="3.6.0") == [problem]
    monkeypatch.delenv("TRITON_INTERPRET")
    assert problems(triton="3.6.0") == []
    assert interpreter_problem((GOOD | {"triton": "3.6.0", "numpy": "2.3.5"}).get) is None
    assert interpreter_problem((GOOD | {"triton": "3.7.0"}).get) is None
    assert interpreter_problem((GOOD | {"triton": None}).get) is None


def test_a_problem_ends_the_command_before_torch_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(__main__, "version_problems", lambda: ["torch 2.10 is too old; run: pip install torch"])
    assert __main__.main() == 1
    assert capsys.readouterr().err == "error: torch 2.10 is too old; run: pip install torch\n"


def test_the_lowest_versions_are_stated_alike_everywhere() -> None:
    pins = dict(line.split("==") for line in (ROOT / "tests" / "lowest.txt").read_text().split("\n") if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)$", "\n".join(project["dependencies"]), re.MULTILINE))
    assert {name: bound for name, bound in LOWEST.items() if name != "triton"}.items() <= bounds.items()
    assert {name: ".".join(pin.split(".")[:2]) for name, pin in pins.items()} == LOWEST | bounds
