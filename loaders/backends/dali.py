"""The dali backend: NVIDIA DALI decodes each image once and cuts the crops that `draw` gives, on the CPU or by nvJPEG.

DALI reads JPEG in grey and YCbCr itself; whatever else strict decoding takes reaches it decoded, as PNM. With
photometric=dali its own operators do the rest: flip, colour_twist, Gaussian blur (docs/loaders.md has the difference).
"""

# N images of a batch, V views, S side

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsimclr.loaders.arrays import Pixels
from fastsimclr.loaders.backends.native import Buffers, DecodeJob
from fastsimclr.loaders.backends.screen import Screened, largest_batch, screened
from fastsimclr.loaders.batch import Batch
from fastsimclr.loaders.cut import Crops
from fastsimclr.loaders.decode import Encoded, decode
from fastsimclr.loaders.draw import Policy, ViewParams
from fastsimclr.loaders.source import DataError

INSTALL = "pip install nvidia-dali-cuda130 (nvidia-dali-cuda120 for CUDA 12; a GPU is not needed for loader=dali)"
OPS = frozenset({"flip", "jitter", "grey", "blur"})
"""What photometric=dali can do."""

_UNCHANGED = np.array([1, 1, 1, 0], dtype=np.float32)  # brightness, contrast, saturation, hue
_DEPTH = 2  # batches in DALI's own queue
_IDENTITY = 0.01  # a Gaussian so narrow that only its middle counts
_SMALLEST_BLURRED = 20  # as in kernels.views


def check_gpu() -> None:
    """DataError where loader=dali_gpu finds no GPU."""
    if not torch.cuda.is_available():
        raise DataError("data.loader=dali_gpu needs a CUDA device, and there is none; use dali or native")


def dali_batches(job: DecodeJob) -> Generator[Batch]:
    """The batches of job.plan() with the crops of job.crops. DataError where DALI fails in spite of the screening."""
    assert job.crops is not None  # Loader sees to it
    on_gpu = job.config.loader == "dali_gpu"
    given = screened(job, data=True)
    inputs = _Inputs(job, job.crops, given)
    try:
        pipe = _pipeline(job, job.crops, inputs, max(1, largest_batch(job)), on_gpu)
        buffers = Buffers()
        inputs.run(pipe.schedule_run)
        while (outputs := inputs.run(pipe.share_outputs)) is not None:
            found, params, _ = inputs.waiting.popleft()
            cuts = _on_gpu(outputs) if on_gpu else _on_cpu(outputs, buffers, job.pin)
            pipe.release_outputs()
            inputs.run(pipe.schedule_run)
            yield found.batch(job, cuts, _rest(params, job))
    finally:
        given.close()


class _Inputs:
    """What DALI calls for the data of its next batch; it remembers which batches are on their way."""

    def __init__(self, job: DecodeJob, crops: Crops, given: Iterator[Screened]) -> None:
        self.job, self.crops, self.given = job, crops, given
        self.waiting: deque[tuple[Screened, ViewParams, list[Any]]] = deque()
        self._error: Exception | None = None

    def __call__(self) -> tuple[Any, ...]:
        """The files of a batch, then for each view its anchors, its shapes and, for DALI's own ops, their values."""
        try:
            found = next(self.given)
            params = found.draw(self.crops)
            files = [
                _file(data, plain, self.job, int(owner))
                for data, plain, owner in zip(found.data, found.plain, found.owners, strict=True)
            ]
        except StopIteration:
            raise
        except Exception as error:  # DALI would wrap it
            self._error = error
            raise StopIteration from error
        n = len(found.ids)
        values: list[Any] = [files]
        for view in range(self.crops.views):
            rows = slice(view * n, (view + 1) * n)
            values += [params.crop[rows, :2].contiguous().numpy(), params.crop[rows, 2:].contiguous().numpy()]
            if self.job.config.photometric == "dali":
                values += _photometric(params, rows, self.crops.policy)
        self.waiting.append((found, params, values))
        return tuple(values)

    def run(self, step: Any) -> Any:
        """`step()`, None at the end of the data; what went wrong is raised with the names of the files."""
        try:
            result = step()
        except StopIteration:
            result = None
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            names = [self.job.source.describe(int(k)) for k in self.waiting[0][0].owners] if self.waiting else ["none"]
            raise DataError(
                f"DALI failed on a batch of {len(names)} images, from {names[0]} to {names[-1]}, which strict decoding"
                f" takes; use loader=native, or look at the file that it names: {' '.join(str(error).split())}"
            ) from error
        if self._error is not None:
            raise self._error
        return result


def _file(data: Encoded | Pixels, plain: bool, job: DecodeJob, index: int) -> npt.NDArray[np.uint8]:
    """A file's bytes as DALI is to see them, uint8 [bytes]."""
    if isinstance(data, np.ndarray):
        pixels = data
    elif plain:
        return np.frombuffer(data, dtype=np.uint8)
    else:
        pixels = decode(data, job.source.describe(index), job.reader.max_pixels)
    head = b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0])
    return np.concatenate([np.frombuffer(head, dtype=np.uint8), pixels.reshape(-1)])


def _own_arguments(policy: Policy) -> tuple[str, ...]:
    """The arguments, drawn for each view, of the operators that photometric=dali needs for the policy."""
    colours = ("brightness", "contrast", "saturation", "hue") if policy.ops & {"jitter", "grey"} else ()
    blurred = "blur" in policy.ops and policy.size >= _SMALLEST_BLURRED
    return (*colours, *(("sigma",) if blurred else ()), *(("horizontal",) if "flip" in policy.ops else ()))


def _photometric(params: ViewParams, rows: slice, policy: Policy) -> list[npt.NDArray[Any]]:
    """The values of _own_arguments as DALI takes them: each [N], the hue in degrees, sigma [N, 1]."""
    jitter = params.jitter[rows].numpy()[:, None] & ("jitter" in params.ops)
    factors = np.where(jitter, params.factors[rows].numpy(), _UNCHANGED)
    factors[params.grey[rows].numpy(), 2] = 0
    factors[:, 3] *= 360
    sigma = params.sigma[rows].numpy()[:, None]
    every = dict(zip(("brightness", "contrast", "saturation", "hue"), factors.T.copy(), strict=True))
    every["sigma"] = np.where(sigma > 0, sigma, np.float32(_IDENTITY))
    every["horizontal"] = params.flip[rows].numpy().astype(np.int32)
    return [every[name] for name in _own_arguments(policy)]


def _rest(params: ViewParams, job: DecodeJob) -> ViewParams:
    """The parameters without what DALI did itself, which is not to be done again."""
    if job.config.photometric == "kernel":
        return params
    none = torch.zeros(len(params), dtype=torch.bool)
    return replace(params, flip=none, jitter=none, grey=none, sigma=torch.zeros(len(params)), ops=params.ops - OPS)


def _pipeline(job: DecodeJob, crops: Crops, inputs: _Inputs, largest: int, on_gpu: bool) -> Any:
    """A built pipeline with V outputs, uint8 [N, S, S, 3]."""
    fn, types = import_module("nvidia.dali.fn"), import_module("nvidia.dali.types")
    size = crops.policy.size
    arguments = () if job.config.photometric == "kernel" else _own_arguments(crops.policy)
    kinds_of = {"sigma": (types.FLOAT, 1), "horizontal": (types.INT32, 0)}
    one_view = [(types.INT32, 1), (types.INT32, 1), *(kinds_of.get(name, (types.FLOAT, 0)) for name in arguments)]
    kinds = [(types.UINT8, 1), *one_view * crops.views]
    pipe: Any = import_module("nvidia.dali").Pipeline(
        batch_size=largest,
        num_threads=job.threads,
        device_id=torch.cuda.current_device() if on_gpu else None,
        prefetch_queue_depth=_DEPTH,
    )
    with pipe:
        files, *rest = fn.external_source(
            source=inputs,
            num_outputs=len(kinds),
            batch=True,
            no_copy=True,  # what is on its way is held by inputs.waiting
            dtype=[kind for kind, _ in kinds],
            ndim=[dimensions for _, dimensions in kinds],
        )
        whole = fn.decoders.image(
            files, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False
        )
        outputs, values = [], iter(rest)
        for _ in range(crops.views):
            view = fn.slice(whole, next(values), next(values), axes=[0, 1])
            view = fn.resize(view, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
            outputs.append(_own_ops(fn, view, {name: next(values) for name in arguments}, size))
        pipe.set_outputs(*outputs)
    pipe.build()
    return pipe


def _own_ops(fn: Any, view: Any, values: dict[str, Any], size: int) -> Any:
    if colours := {name: values[name] for name in ("brightness", "contrast", "saturation", "hue") if name in values}:
        view = fn.color_twist(view, **colours)
    if "sigma" in values:
        view = fn.gaussian_blur(view, sigma=values["sigma"], window_size=2 * (size // 20) + 1)  # as our kernel's
    return fn.flip(view, horizontal=values["horizontal"]) if "horizontal" in values else view


def _on_cpu(outputs: Any, buffers: Buffers, pin: bool) -> Tensor:
    views = [np.asarray(output.as_tensor()) for output in outputs]
    cuts = buffers.take(sum(view.size for view in views), pin).view(len(views), *views[0].shape)
    for view, pixels in enumerate(views):
        cuts.numpy()[view] = pixels
    return cuts


def _on_gpu(outputs: Any) -> Tensor:
    """The outputs copied out of DALI's memory, uint8 [V, N, S, S, 3], done before it is given back."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):  # of its own, or the copy would wait for the step that is being computed
        cuts = torch.stack([torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in outputs])
    side.synchronize()
    cuts.record_stream(torch.cuda.default_stream())
    return cuts
