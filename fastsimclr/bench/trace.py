"""One more round of a contestant under torch.profiler, as a Chrome trace."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastsimclr.bench.record import Contestant, logger


def trace(contestant: Contestant, path: Path, device: torch.device) -> str:
    """Write the trace of a round that does not count (open it in Perfetto or chrome://tracing); a note for the report.

    Call it after the rounds: profiling slows down what it watches.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        done = contestant.run()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    logger.info("trace of %s: %s", contestant.name, path)
    return f"{path} is a Chrome trace of {len(done.step_s)} further steps of {contestant.name}, which do not count"
