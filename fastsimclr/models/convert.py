"""Weights from elsewhere, checked whole before the first number is copied."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastsimclr.models.resnet import ResNet

KEYS_SHOWN = 3


def load_weights(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Copies `state` into `module`, all keys or none.

    origin: what an error calls the weights, normally the file. Raises ValueError with origin, the first missing,
    unexpected and mis-shaped keys (both shapes), and the remedy; the module is then untouched.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {list(state[key].shape)}, the model has {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    faults = [
        f"{len(keys)} {what} ({'; '.join(keys[:KEYS_SHOWN])}{'; ...' if len(keys) > KEYS_SHOWN else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if faults:
        raise ValueError(
            f"{origin} does not fit the model: {', '.join(faults)}. Every key must be there with its shape; "
            "set model.arch, width, stem, selective_kernels and head_* to those the weights were made with"
        )
    module.load_state_dict(state)


def load_torchvision(encoder: ResNet, source: str | Path | Mapping[str, Tensor]) -> None:
    """Copies the weights of a torchvision ResNet (18, 34, 50, 101, 152).

    source: a state-dict file, read with weights_only, or the state itself. Its classifier `fc` is left out.
    Raises ValueError where the file cannot be read or does not fit (see load_weights).
    """
    state = read_state(source) if isinstance(source, str | Path) else source
    origin = str(source) if isinstance(source, str | Path) else "the given state"
    kept = {key: value for key, value in state.items() if not key.startswith("fc.")}
    # Files older than torch 0.4.1 have no such counters.
    counters = {key: value for key, value in encoder.state_dict().items() if key.endswith("num_batches_tracked")}
    load_weights(encoder, counters | kept, origin)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a state-dict file, on the CPU. Raises ValueError naming a file that is missing, cut or foreign."""
    remedy = "give a file written by torch.save(model.state_dict(), path)"
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; {remedy}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as weights ({reason}); {remedy}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds {type(state).__name__}, not a flat mapping of names to tensors; {remedy}")
    return state
