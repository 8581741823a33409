"""A call as a CUDA graph, for the tests on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def captured(call: Callable[[], T], before: Callable[[], object] | None = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """The graph of `call`, and the result that each replay writes.

    It runs once on a side stream first, where it compiles and sets up what is lazy. before: runs between that and the
    capture, outside the graph.
    """
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        call()
    current.wait_stream(side)
    if before is not None:
        before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result
