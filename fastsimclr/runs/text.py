"""Text of a run: files written whole, aligned tables, and what differs between two recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fastsimclr.loaders.whole import write_whole


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    write_whole(path, text.encode())


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines of text, the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        row[0].ljust(widths[0]) + "".join("  " + cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def differences(before: str, now: str) -> list[str]:
    """What differs between two recipes in YAML, each as "section.key: old -> new"."""

    def flat(value: Any, within: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {within: value}
        return {k: v for key, item in value.items() for k, v in flat(item, f"{within}.{key}").items()}

    old, new = ({key[1:]: value for key, value in flat(yaml.safe_load(text), "").items()} for text in (before, now))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]
