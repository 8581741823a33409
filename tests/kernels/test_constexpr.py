"""Triton's interpreter, in some versions, keeps `constexpr op tensor` a constexpr, which then breaks what follows.

In `tensor op constexpr` all versions give a tensor. So a module's constexpr is never the left operand of a tensor.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


def constants(tree: ast.Module) -> set[str]:
    """Names that a module binds to tl.constexpr(...)."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and "tl.constexpr(" in ast.unparse(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def left_constants(source: str, known: set[str]) -> list[str]:
    """Every expression of the jitted functions in `source` with one of the `known` constants left of something else."""

    def constant(node: ast.expr) -> bool:
        if isinstance(node, ast.BinOp):
            return constant(node.left) and constant(node.right)
        if isinstance(node, ast.UnaryOp):
            return constant(node.operand)
        return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id in known)

    def named(node: ast.expr) -> bool:
        return constant(node) and any(isinstance(part, ast.Name) for part in ast.walk(node))

    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or not any(
            "jit" in ast.unparse(d) for d in function.decorator_list
        ):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp) and named(node.left) and not constant(node.right):
                found.append(ast.unparse(node))
            if isinstance(node, ast.Compare) and named(node.left) and not all(map(constant, node.comparators)):
                found.append(ast.unparse(node))
    return found


ALL = set().union(*(constants(ast.parse(path.read_text())) for path in KERNELS.rglob("*.py")))


def test_constants_are_found() -> None:
    assert {"LOG2_E", "HEADROOM", "GREY_R", "KINDS_OF_GRAD"} <= ALL
    assert left_constants("@triton.jit\ndef f(x):\n    return HEADROOM - x * 2", ALL) == ["HEADROOM - x * 2"]
    assert left_constants("@triton.jit\ndef f(x):\n    return x * -HEADROOM + (LOG2_E - 1)", ALL) == []


@pytest.mark.parametrize("folder", sorted({path.parent.name for path in KERNELS.rglob("*.py")}))
def test_no_constant_stands_left_of_a_tensor(folder: str) -> None:
    paths = [path for path in KERNELS.rglob("*.py") if path.parent.name == folder]
    assert paths
    assert {path.name: found for path in paths if (found := left_constants(path.read_text(), ALL))} == {}
