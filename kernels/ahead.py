"""Compiles every Triton kernel for GPUs that are not there, and says what each needs.

Run by `python -m fastsimclr.kernels.ahead`. Registers, spills and tensor-core instructions are read from the machine
code with Triton's own cuobjdump.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
"""sm_80 (A100), sm_90 (H100, H200), sm_100 (B200)."""
FUSED = ("nt_xent", "views", "lars", "batch_norm")
"""Packages beside this file whose module `fused` has a function `variants() -> list[Variant]`."""
_TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|UTCHMMA)\b")
_SPILLS = re.compile(r"\b(LDL|STL)\b")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel as it is launched.

    signature: Triton's type of each argument that is no constant ("*fp16", "i32", "fp32"). constants: the constexpr
    arguments. aligned: pointers and integers known to be multiples of 16. tensor_cores: whether it must use them.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: Sequence[str] = ()
    warps: int = 4
    stages: int = 3
    tensor_cores: bool = False
    architectures: Sequence[int] = field(default=ARCHITECTURES)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a compiled kernel uses. registers: a thread. stack: bytes, with local memory. shared: bytes a block.

    spills, tensor_cores: instructions, looked for where there is such memory or the kernel has products.
    """

    name: str
    architecture: int
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_cores: str


def compile_for(variant: Variant, architecture: int) -> Resources:
    """Compile one kernel for sm_`architecture`; needs no GPU, and a process without TRITON_INTERPRET."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    source = ASTSource(
        fn=variant.kernel,
        signature={name: "constexpr" if name in variant.constants else variant.signature[name] for name in names},
        constexprs=dict(variant.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ff][Pp].?[Ff]usion.*", category=UserWarning)
        binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", str(cubin))
        stack, local = _number(r"STACK:(\d+)", usage), _number(r"LOCAL:(\d+)", usage)
        # A spill needs memory of its own; to read the machine code takes longer than to compile a small kernel.
        machine_code = _cuobjdump("-sass", str(cubin)) if stack or local or variant.tensor_cores else ""
    return Resources(
        name=variant.name,
        architecture=architecture,
        warps=variant.warps,
        registers=_number(r"REG:(\d+)", usage),
        stack=stack + local,
        spills=len(_SPILLS.findall(machine_code)),
        shared=binary.metadata.shared,
        tensor_cores=", ".join(sorted(set(_TENSOR_CORES.findall(machine_code)))),
    )


def _cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), *arguments], check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"cuobjdump printed no {pattern}: {text[:200]!r}; its format has changed")
    return int(found[1])


def variants(packages: Sequence[str] = FUSED) -> list[Variant]:
    """All kernels of the packages, as they are launched."""
    return [
        v for package in packages for v in importlib.import_module(f"fastsimclr.kernels.{package}.fused").variants()
    ]


def table(rows: Sequence[Resources]) -> str:
    """A line of Markdown a kernel, with what it needs on each of its architectures."""
    head = "| kernel | sm | warps | registers | shared memory, bytes | stack + spills | tensor cores |"
    lines = [head, "|" + " --- |" * 7]
    for name in dict.fromkeys(row.name for row in rows):
        own = [row for row in rows if row.name == name]
        columns: list[list[object]] = [
            [row.architecture for row in own],
            list(dict.fromkeys(row.warps for row in own)),
            [row.registers for row in own],
            list(dict.fromkeys(row.shared for row in own)),
            list(dict.fromkeys(row.stack + row.spills for row in own)),
            list(dict.fromkeys(row.tensor_cores or "-" for row in own)),
        ]
        lines.append(f"| {name} | " + " | ".join(" / ".join(map(str, cells)) for cells in columns) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, or JSON lines; the exit code is 1 where a kernel spills or lacks its tensor cores."""
    parser = argparse.ArgumentParser(prog="fastsimclr.kernels.ahead", description=__doc__)
    parser.add_argument("--json", action="store_true", help="A JSON object a line.")
    parser.add_argument("--sm", type=int, choices=ARCHITECTURES, help="One architecture; all where none is given.")
    parser.add_argument("packages", nargs="*", default=FUSED, help="Which of the packages; all where none is named.")
    options = parser.parse_args(arguments)
    chosen = variants(options.packages)
    pairs = [(variant, sm) for variant in chosen for sm in variant.architectures if options.sm in (None, sm)]
    rows = [compile_for(variant, sm) for variant, sm in pairs]
    print("\n".join(json.dumps(asdict(row)) for row in rows) if options.json else table(rows))
    must = {variant.name for variant in chosen if variant.tensor_cores}
    bad = [row for row in rows if row.spills or row.stack or (row.name in must and not row.tensor_cores)]
    for row in bad:
        print(f"{row.name} on sm_{row.architecture}: spills, or no tensor cores", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
