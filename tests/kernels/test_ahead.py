"""Every fused kernel, compiled with no GPU: nothing spills, and the loss runs on tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from fastsimclr.kernels import ahead

ROOT = Path(__file__).resolve().parents[2]
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# Under Triton 3.8 ptxas holds this kernel to 96 registers, for one more block per processor, at the price of two words.
KNOWN_SPILLS = {("3.8", 100, "views cut, 32 px, torchvision, fp16, SimCLR"): {"stack": 8, "spills": 4}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "sm", [90, *(pytest.param(sm, marks=pytest.mark.full) for sm in ahead.ARCHITECTURES if sm != 90)]
)
@pytest.mark.parametrize("package", ahead.FUSED)
def test_nothing_spills_and_everything_fits(package: str, sm: int) -> None:
    """Of each kernel, in a process that does not interpret kernels; products use tensor cores."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastsimclr.kernels.ahead", "--json", "--sm", str(sm), package]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    compiled: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    minor = ".".join(triton.__version__.split(".")[:2])
    known = {name: spill for (version, at, name), spill in KNOWN_SPILLS.items() if (version, at) == (minor, sm)}
    known = {row["name"]: known[row["name"]] for row in compiled if row["name"] in known}
    assert done.returncode == (1 if known else 0), done.stderr
    assert {row["architecture"] for row in compiled} == {sm}
    shared = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have: CUDA C guide, table of limits
    for row in compiled:
        spill = {"stack": row["stack"], "spills": row["spills"]}
        assert spill == known.get(row["name"], {"stack": 0, "spills": 0}), row
        assert row["shared"] <= shared[row["architecture"]], row
        assert row["registers"] * 32 * row["warps"] <= 65536, row
    products = [row for row in compiled if row["tensor_cores"]]
    for row in products:
        assert TENSOR_CORES[row["architecture"]] in row["tensor_cores"], row
    if package == "nt_xent":
        kinds = {row["name"].split()[0] for row in products}
        assert {"nt_xent.forward", "nt_xent.backward"} <= kinds


GREEDY = """
import triton, triton.language as tl
from fastsimclr.kernels.ahead import Variant

@triton.jit
def greedy(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i[:, None] * N + i[None, :])
    tl.store(Y + i[:, None] * N + i[None, :], tl.dot(x, x))

def variants():
    signature, constants = {"X": "*fp16", "Y": "*fp32"}, {"N": 128}
    return [Variant(name="greedy", kernel=greedy, signature=signature, constants=constants, warps=1)]
"""


@pytest.mark.slow
def test_a_spill_is_seen_and_none_in_a_kernel_of_lars(tmp_path: Path) -> None:
    """128 x 128 sums in the 32 threads of a warp need 512 registers each; a thread has 255."""
    (tmp_path / "greedy.py").write_text(GREEDY)
    code = (
        "import greedy; from fastsimclr.kernels.ahead import compile_for, variants\n"
        "for variant in (greedy.variants()[0], variants(['lars'])[0]): print(compile_for(variant, 90))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = os.pathsep.join((str(ROOT), str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.stdout.count("spills=") == 2, done.stderr
    spilt, fits = done.stdout.splitlines()
    assert "spills=0" not in spilt and "stack=0" not in spilt, spilt
    assert "spills=0" in fits and "stack=0" in fits, fits
