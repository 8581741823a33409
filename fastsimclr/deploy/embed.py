"""`fastsimclr embed`: the features of images, as .npy or Parquet."""

# N images of a batch, C features

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastsimclr.deploy.files import atomic_outputs, need
from fastsimclr.deploy.origin import Origin
from fastsimclr.deploy.sinks import Dtype, Npy, Parquet, Sink
from fastsimclr.deploy.stream import Pass, StreamConfig
from fastsimclr.models import SimCLRNet


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(StreamConfig):
    """Write the features of images: FILE.npy with FILE.csv (path,label) beside it, or FILE.parquet."""

    layer: str = "encoder"
    """encoder (or 0), the number of a projection head's layer, after its ReLU, or projection, the head's output."""
    dtype: Dtype = "float32"
    """Of the numbers in the file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.out).suffix not in (".npy", ".parquet"):
            raise ValueError(f"--out={self.out} must end in .npy or .parquet; its ending chooses the format")


def embed(config: EmbedConfig) -> dict[str, object]:
    """Write the files, and return the counts. Stopped after a signal: the files then hold the images done by then."""
    out = Path(config.out)
    files = (out, out.with_suffix(".csv")) if out.suffix == ".npy" else (out,)
    if out.suffix == ".parquet":
        need("a Parquet file", "parquet", "pyarrow")
    with atomic_outputs(*files, overwrite=config.overwrite, read=Path(config.images)) as parts:
        run = Pass(config)
        network, columns = features(run.origin, config.layer)
        sink: Sink
        if out.suffix == ".npy":
            sink = Npy(parts[0], parts[1], columns, config.dtype)
        else:
            sink = Parquet(parts[0], columns, config.dtype)
        with closing(sink):
            for ids, rows_NC in run.outputs(network):
                sink.write(run.paths(ids), run.labels(ids), _numbers(rows_NC, config.dtype).numpy())
    run.end(config.out)
    return {"images": run.done, "damaged": run.damaged, "features": columns, "file": config.out}


def features(origin: Origin, layer: str) -> tuple[Callable[[Tensor], Tensor], int]:
    """(images -> features [N, C], C) of a layer by name; ValueError where the run has no such layer."""
    encoder, head = origin.network.encoder, origin.network.head
    last = len(head.layers)
    if layer == "projection" and (not isinstance(origin.network, SimCLRNet) or last == 0):
        raise ValueError(f"--layer=projection: {origin.path} keeps no whole projection head; use 0..{last}")
    names = {"encoder": 0, "projection": last} | {str(number): number for number in range(last + 1)}
    if layer not in names:
        raise ValueError(f"--layer={layer} is no layer of {origin.path}; use encoder or 0..{last}")
    chosen = names[layer]
    return lambda images: head.forward_to(encoder(images), chosen), head.width_at(chosen)


def _numbers(rows_NC: Tensor, dtype: Dtype) -> Tensor:
    if dtype == "float32":
        return rows_NC
    half_NC = rows_NC.half()
    if half_NC.isinf().any() and not rows_NC.isinf().any():
        largest = rows_NC.abs().max().item()
        raise ValueError(f"a feature is {largest:g}, over float16's {torch.finfo(torch.float16).max:g}; use float32")
    return half_NC
