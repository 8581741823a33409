"""Networks as ONNX files, normalisation included."""

# N images, S their side

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsimclr.deploy.card import Card
from fastsimclr.deploy.files import need
from fastsimclr.models.selective_kernel import ShortcutPool

OPSET = 20  # what torch's exporter takes by default; ONNX Runtime 1.17 and later reads it
MOST_BYTES = 2**31 - 2**24  # a protobuf message ends at 2 GiB; the graph itself needs less than 16 MiB


class _Whole(nn.Module):
    """The network behind the normalisation of its preprocessing: [N, 3, S, S] in [0, 1] -> its outputs."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: list[float] | None, std: list[float] | None) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean or [0.0] * 3).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std or [1.0] * 3).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.network((images - self.mean) / self.std)
        return outputs


class _PaddedPool(nn.Module):
    """ShortcutPool of stride 2 with the zeros written out: ONNX has no divisor of one's own, and torch drops it."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x_NCHW, (0, x_NCHW.shape[3] % 2, 0, x_NCHW.shape[2] % 2)), 2)


def write_onnx(network: nn.Module, card: Card, path: Path) -> None:
    """Input `images`: float32 [N, 3, S, S] in [0, 1], any N; output `logits` or `features`; metadata: the card.

    ValueError where onnx or onnxscript is not installed, or the weights are more than one ONNX file holds.
    """
    need("--format onnx", "export", "onnx", "onnxscript")
    import onnx

    size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    if size > MOST_BYTES:
        raise ValueError(f"{path}: {size:,} bytes of weights, an ONNX file holds {MOST_BYTES:,}; use safetensors")
    prepared = card.preprocessing
    side = prepared["size"]
    module = _Whole(_exportable(network), prepared["mean"], prepared["std"]).eval()
    for chatty in ("onnx_ir", "onnxscript"):  # they tell of every pass over the graph
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with warnings.catch_warnings():  # torch 2.11's exporter of its own pytrees
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        program = torch.onnx.export(
            module,
            (torch.zeros(2, 3, side, side),),  # torch.export takes a dimension of 1 for a constant
            input_names=["images"],
            output_names=["logits" if card.part == "classifier" else "features"],
            dynamic_shapes={"images": {0: torch.export.Dim("N", min=1)}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model: Any = program.model_proto
    onnx.helper.set_model_props(model, card.metadata())
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def _exportable(network: nn.Module) -> nn.Module:
    """A copy with the same outputs, of modules that ONNX can say."""
    copied = copy.deepcopy(network)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, ShortcutPool) and child.stride == 2:
                setattr(module, name, _PaddedPool())
    return copied
