"""The peak memory of one call: what it allocates on a GPU, and on a CPU what a fresh process grows by during it."""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

Call = Callable[[], object]
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PRELOAD = ["fastsimclr.bench.loss", "fastsimclr.bench.views", "fastsimclr.bench.lars", "fastsimclr.bench.micro"]


def peak_on_gpu(call: Call, device: torch.device) -> int:
    """Bytes that `call` allocates at most above what was there before it, results included, inputs not.

    One call more comes first, which compiles and chooses algorithms. torch.OutOfMemoryError where it does not fit.
    """
    call()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_in_child(make_small: Callable[[], Call], make: Callable[[], Call]) -> int:
    """Bytes by which the resident memory of a fresh process grows at most during the call that `make` makes.

    Both must be picklable. The small call comes first, so that what libraries set up once is not counted.
    MemoryError where the memory does not suffice; RuntimeError with the child's traceback where it fails otherwise.
    """
    context = multiprocessing.get_context("forkserver")  # torch is imported once, in a process that runs nothing
    context.set_forkserver_preload(_PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_probe, args=(sender, make_small, make, torch.get_num_threads()))
    child.start()
    sender.close()
    try:
        peak, failure = receiver.recv()
    except EOFError:
        peak, failure = None, "its process ended without a word"
    child.join()
    receiver.close()
    if child.exitcode == -signal.SIGKILL or "can't allocate memory" in failure:
        raise MemoryError("the process ran out of memory")
    if peak is None:
        raise RuntimeError(f"measuring peak memory failed: {failure}")
    return int(peak)


def _probe(sender: Connection, make_small: Callable[[], Call], make: Callable[[], Call], threads: int) -> None:
    try:
        torch.set_num_threads(threads)
        make_small()()
        call = make()
        _give_back()
        before = _reset_peak()
        result = call()
        peak = _peak() - before
        del result
        sender.send((peak, ""))
    except Exception:
        sender.send((None, traceback.format_exc()))


def _give_back() -> None:
    """Return what malloc keeps of freed memory to the system, where it can: else the call would reuse it unseen."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _reset_peak() -> int:
    """Resident bytes now, from where the peak counts; the peak so far where it cannot be reset (not on Linux)."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return _peak()
    return _field("VmRSS")


def _peak() -> int:
    if _STATUS.is_file():
        return _field("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _field(name: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def free_memory() -> int | None:
    """Bytes that a process may still allocate without swapping, where the system says so."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    (line,) = (line for line in info.read_text().splitlines() if line.startswith("MemAvailable:"))
    return 1024 * int(line.split()[1])
