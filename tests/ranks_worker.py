"""Imports torch once, forks gloo ranks when the pool in conftest.py asks for them, and runs test functions in them."""

from __future__ import annotations

import gc
import importlib.util
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

# Imported here, once, because every test module or optimizer wants it and the ranks are forked: seconds for each.
import pytest  # noqa: F401
import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.parallel

import fastsimclr.stages  # noqa: F401
from fastsimclr.ranks import Ranks

WAIT = timedelta(seconds=60)


def main() -> None:
    """argv: a folder, then file descriptors: the pool's control, and for each number of ranks one for each rank.

    Reads the number of ranks to start from the control, until the pool closes it.
    """
    gc.collect()
    gc.freeze()  # in the ranks no collection goes through what they share
    folder, control = sys.argv[1], Connection(int(sys.argv[2]))
    pipes: dict[int, list[Connection]] = {}
    for item in sys.argv[3:]:
        world, descriptor = item.split(":")
        pipes.setdefault(int(world), []).append(Connection(int(descriptor)))
    while True:
        try:
            world = pickle.loads(control.recv_bytes())
        except EOFError:
            return
        for rank in range(world):
            if os.fork() == 0:
                mine = pipes[world][rank]
                for pipe in (control, *(pipe for others in pipes.values() for pipe in others)):
                    if pipe is not mine:
                        pipe.close()
                status = 1
                try:
                    serve(connect(rank, world, f"{folder}/{world}"), mine)
                    status = 0
                finally:
                    os._exit(status)
        for pipe in pipes.pop(world):
            pipe.close()  # so that the pool sees the end of a rank


def connect(rank: int, world: int, meeting: str) -> Ranks:
    """The ranks as `Launch.connect` makes them; one alone has no groups."""
    torch.set_num_threads(1)
    if world == 1:
        return Ranks()
    store = dist.FileStore(meeting, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=WAIT)
    control = dist.new_group(backend="gloo", timeout=WAIT)
    return Ranks(rank=rank, world=world, local_rank=rank, local_world=world, group=dist.group.WORLD, control=control)


def serve(ranks: Ranks, pipe: Connection) -> None:
    """Run what the pool sends, and answer with ("result", value) or ("error", traceback), until it closes the pipe."""
    while True:
        try:
            path, module, name, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            function = load(path, module, name)
            answer = pickle.dumps(("result", function(ranks, *pickle.loads(arguments))))
        except BaseException:
            answer = pickle.dumps(("error", traceback.format_exc()))
        pipe.send_bytes(answer)


def load(path: str, module: str, name: str) -> Callable[..., Any]:
    """The function `name` of the test file at `path`, under the module name that pytest gave it."""
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None and spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    value: Any = sys.modules[module]
    for part in name.split("."):
        value = getattr(value, part)
    return value  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
