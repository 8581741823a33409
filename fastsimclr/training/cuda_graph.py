"""A step's forward and backward pass as one CUDA graph, for steps so small that launching them takes longer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsimclr.methods import Outcome
from fastsimclr.training.gradient_cache import Scale
from fastsimclr.training.step import Step

WARM_UP = 11
"""Steps before the capture, in which cuDNN and the allocator settle. As many as torch's documentation asks for under
DDP; a graph here is of one rank, without it, and might do with fewer: not tried."""


class GraphedStep:
    """`step` of `network`, run as it is for WARM_UP steps, then captured, and from then on replayed.

    Its shapes must stay. Optimizer and views are not in the graph: the loss scale and the learning rate are theirs, and
    views come in ragged sizes. Raises RuntimeError, with torch's reason, for a step that cannot be captured.
    """

    def __init__(self, step: Step, network: nn.Module) -> None:
        self._step, self._network = step, network
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._seen = 0

    def __call__(self, images: Tensor, labels: Tensor, scale: Scale) -> Outcome:
        if self._seen < WARM_UP:
            self._seen += 1
            return self._aside(images, labels, scale)
        if self._graph is None:
            self._capture(images, labels, scale)
        assert self._graph is not None
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        found = self._outcome
        return Outcome(loss=found.loss.clone(), metrics={key: value.clone() for key, value in found.metrics.items()})

    def _aside(self, images: Tensor, labels: Tensor, scale: Scale) -> Outcome:
        """The step on the stream of the capture, where it allocates what the capture will."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outcome = self._step(images, labels, scale)
        current.wait_stream(self._stream)
        images.record_stream(self._stream)
        labels.record_stream(self._stream)
        return outcome

    def _capture(self, images: Tensor, labels: Tensor, scale: Scale) -> None:
        for parameter in self._network.parameters():
            parameter.grad = None  # the graph is to write gradients, not to add to them
        self._images, self._labels = images.clone(), labels.clone()
        self._graph = torch.cuda.CUDAGraph()
        # Another thread ships batches meanwhile; its calls are not part of the capture, and do not break it.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._outcome = self._step(self._images, self._labels, scale)
        self._gradients = [(p, p.grad) for p in self._network.parameters() if p.grad is not None]
