"""The house rules: imports go downward only, side folders belong to the package, every install sees all of it."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fastsimclr", "loaders", "kernels")
SIDE = {"loaders", "kernels", "configs"}
# Loaders open more sources and have more backends where these are installed: imported when asked for, not before.
OPTIONAL = {"aiohttp", "datasets", "ffcv", "fsspec", "nvidia"}
LIBRARIES = {
    "fastsimclr.kernels": {"torch", "triton"},
    "fastsimclr.loaders": {"torch", "torchvision", "numpy", "cv2", "simplejpeg", "PIL", "sklearn", *OPTIONAL},
}


def modules() -> list[Path]:
    """Every module of the project, relative to the root, each once: links are not followed."""
    found = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return sorted(path for path in found if path.parts[0] != "fastsimclr" or path.parts[1] not in SIDE)


def installed(path: Path) -> str:
    """Where a module of the checkout lies in an installed package."""
    return path.as_posix() if path.parts[0] == "fastsimclr" else f"fastsimclr/{path.as_posix()}"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build or an import check reads, links kept, so that nothing is written into the tree."""
    for name in (*PACKAGES, "configs"):
        shutil.copytree(
            ROOT / name, tmp_path / "checkout" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "checkout" / name)
    return tmp_path / "checkout"


def python(code: str, cwd: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter in the folder `cwd`."""
    return subprocess.run([sys.executable, *options, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)


def import_contracts(root: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of pyproject.toml ([tool.importlinter]) on the tree at `root`."""
    return python("from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))", root)


def test_imports_go_downward() -> None:
    result = import_contracts(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fastsimclr/optim/upward.py", "import fastsimclr.methods.base"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("fastsimclr/methods/upward.py", "from fastsimclr.loaders.batch import Ragged"),
                ("loaders/upward.py", "import fastsimclr.kernels"),
                ("fastsimclr/unlisted.py", ""),
            ]
        ),
    ],
)
def test_import_contracts_can_fail(checkout: Path, module: str, line: str) -> None:
    (checkout / module).write_text(line)
    result = import_contracts(checkout)
    assert result.returncode == 1, result.stdout + result.stderr
    assert Path(module).stem in result.stdout


@pytest.mark.parametrize("side", LIBRARIES)
def test_side_packages_import_their_libraries_only(side: str) -> None:
    graph = grimp.build_graph("fastsimclr", include_external_packages=True, cache_dir=None)
    mine = {side, *graph.find_descendants(side)}
    imported = {name for module in mine for name in graph.find_modules_directly_imported_by(module)} - mine
    assert imported, f"no import found in {side}: the graph does not see the linked folder"
    assert imported - LIBRARIES[side] - sys.stdlib_module_names == set()


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_install_holds_the_whole_package(checkout: Path, tmp_path: Path, hook: str) -> None:
    built = python(f"import setuptools.build_meta as b; b.{hook}({str(tmp_path)!r})", checkout)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("fastsimclr-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "fastsimclr = fastsimclr.__main__:main" in archive.read(entry_points).decode()
    if hook == "build_wheel":
        recipes = {f"fastsimclr/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
        typed = {f"{package}/py.typed" for package in ("fastsimclr", "fastsimclr/loaders", "fastsimclr/kernels")}
        expected = {installed(path) for path in modules()} | recipes | typed
        if shutil.which("cc"):
            expected.add(f"fastsimclr/loaders/_cut{EXTENSION_SUFFIXES[0]}")
        assert {name for name in names if ".dist-info/" not in name} == expected
    (tmp_path / "elsewhere").mkdir()
    # -S and a plain path: this environment's own editable install of fastsimclr must not answer.
    code = (
        f"import shutil, site, sys; site.addsitedir({str(tmp_path / 'site')!r})\n"
        f"sys.path.append({sysconfig.get_path('purelib')!r})\n"
        "import fastsimclr.loaders.compiled, fastsimclr.loaders.cut, fastsimclr.kernels\n"
        "assert fastsimclr.loaders.compiled.COMPILED or not shutil.which('cc')\n"
        "print(fastsimclr.__file__, fastsimclr.loaders.cut.__file__, fastsimclr.kernels.__file__, sep='\\n')"
    )
    result = python(code, tmp_path / "elsewhere", "-S")
    assert result.returncode == 0, result.stderr
    home = tmp_path / "site" if hook == "build_wheel" else checkout
    assert all(Path(line).is_relative_to(home) for line in result.stdout.split()), result.stdout


@pytest.mark.parametrize("side", ["loaders", "kernels"])
def test_side_folder_is_refused_under_its_bare_name(side: str) -> None:
    result = python(f"import {side}", ROOT)
    assert result.returncode == 1
    assert f"import fastsimclr.{side}, not {side}" in result.stderr


def test_public_names_are_documented() -> None:
    """Every offender of every module is listed, as FILE: what it lacks."""
    faults = []
    for path in modules():
        tree = ast.parse((ROOT / path).read_text())
        definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        faults += [
            f"{path}: {node.name} has no docstring"
            for node in definitions
            if node.name[0] != "_" and not ast.get_docstring(node)
        ]
        if not ast.get_docstring(tree):
            faults.append(f"{path}: opens with no sentence that says what it is")
        if path.stem in {"utils", "helpers", "common"}:
            faults.append(f"{path}: its name says nothing")
    assert len(modules()) > 200, "the walk does not see the project"
    assert faults == []
