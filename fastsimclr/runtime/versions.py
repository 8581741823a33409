"""Checks the installed versions of torch, torchvision, triton and numpy, before any of them is imported.

pip keeps most of these rules when it installs everything at once. They break when one package is upgraded on its own,
and the error is then raised somewhere inside torch or triton, without a remedy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib import metadata

LOWEST = {"torch": "2.11", "torchvision": "0.26", "triton": "3.6", "numpy": "2.0"}
"""The oldest supported versions; `make test-lowest` tests with them. triton may be absent, the others may not."""

Installed = Callable[[str], "str | None"]


def installed_version(package: str) -> str | None:
    """The installed version of `package`, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def torch_requirement() -> str:
    """What the installed torchvision requires of torch, such as "==2.11.0"; "" where it states nothing."""
    try:
        requirements = metadata.requires("torchvision") or []
    except metadata.PackageNotFoundError:
        return ""
    found = (re.match(r"torch\s*\(?([^;)\[]*)", text) for text in requirements if re.match(r"torch\b(?!-)", text))
    return next((match[1].strip() for match in found if match), "")


def version_problems(
    installed: Installed = installed_version, torch_of_torchvision: Callable[[], str] = torch_requirement
) -> list[str]:
    """Combinations under which training cannot work, each with the pip command that mends it; [] where all is well."""
    problems = []
    for package, lowest in LOWEST.items():
        version = installed(package)
        if version is not None and _numbers(version) < _numbers(lowest):
            problems.append(
                f"{package} {version} is older than {lowest}, the oldest supported version;"
                f" run: pip install --upgrade '{package}>={lowest}'"
            )
    torch, wanted = installed("torch"), torch_of_torchvision()
    if torch is not None and not _satisfies(torch, wanted):
        problems.append(
            f"torchvision {installed('torchvision')} requires torch{wanted}, but torch {torch} is installed;"
            f" run: pip install --upgrade 'torch=={torch.partition('+')[0]}' torchvision"
        )
    interpreter = interpreter_problem(installed)
    if interpreter is not None and os.environ.get("TRITON_INTERPRET") == "1":
        problems.append(interpreter)
    return problems


def interpreter_problem(installed: Installed = installed_version) -> str | None:
    """Why kernels cannot run in Triton's interpreter (TRITON_INTERPRET=1) here, with the remedy; None where they can.

    Triton 3.6's interpreter converts arrays of one element by int(array), which numpy 2.4 refuses.
    """
    triton, numpy = installed("triton"), installed("numpy")
    if triton is None or numpy is None or not _numbers(triton) < (3, 7) or _numbers(numpy) < (2, 4):
        return None
    return f"triton {triton}'s interpreter does not work with numpy {numpy}; run: pip install 'numpy<2.4'"


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version as numbers: "2.14.1+cu130" -> (2, 14, 1)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _satisfies(version: str, specifiers: str) -> bool:
    """Whether `version` meets specifiers such as "==2.11.0" or ">=2.14,<3"; operators other than these are not held."""
    have = _numbers(version)
    for text in filter(None, (part.strip() for part in specifiers.split(","))):
        operator, wanted = text[:2].rstrip("0123456789"), _numbers(text.lstrip("=<>!~ "))
        same = have[: len(wanted)]
        holds = {"==": same == wanted, ">=": have >= wanted, "<": have < wanted, "<=": have <= wanted or same == wanted}
        if not holds.get(operator, True):
            return False
    return True
