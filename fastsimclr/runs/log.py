"""What a run tells: a JSONL record always, TensorBoard when installed, a progress bar on a terminal, tables."""

from __future__ import annotations

import json
import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

logger = logging.getLogger("fastsimclr")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line cut off by a crash is left out; damage elsewhere is a ValueError."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON: {line[:80]!r}; repair or delete that line") from None
    return records


class RunLog:
    """Appends records to RUN/metrics.jsonl, mirrors numbers to TensorBoard, and draws the bar.

    run: None for a rank that writes nothing, as all but the first.
    `from_step`: records of later steps are dropped first, so that a resumed run has each step once.
    """

    def __init__(self, run: Path | None, *, title: str, total_steps: int, from_step: int) -> None:
        self._bar = tqdm(
            total=total_steps,
            initial=from_step,
            desc=title,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=run is None or not sys.stderr.isatty(),
        )
        self._file = self._board = None
        if run is None:
            return
        path = run / "metrics.jsonl"
        kept = [record for record in read_records(path) if record["step"] <= from_step]
        temporary = path.with_name("metrics.jsonl.tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.replace(path)  # a crash here must not cost the earlier records
        self._file = path.open("a", buffering=1)
        self._board = _tensorboard(run, from_step)

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One line: what kind of record, after which step, and its numbers."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(f"{kind}/{key}", value, step)

    def progress(self, step: int, shown: dict[str, str]) -> None:
        """Move the bar to `step`."""
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(run: Path, from_step: int) -> Any:
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"), purge_step=from_step + 1)
