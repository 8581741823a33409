"""Imports torch once, forks gloo ranks when the pool in conftest.py asks for them, and runs test functions in them."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import os
import pickle
import signal
import socket
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
from fastsimclr.distributed.ranks import Ranks

WAIT = timedelta(seconds=60)
MOST = 4  # ranks of one group


def main() -> None:
    """argv: a folder, and the file descriptor of the socket to the pool.

    Sends a byte when all is imported. Then reads requests of two bytes, until the pool closes the socket, and answers
    each with one byte: "s" and a number of ranks, with the file descriptor of a pipe for each rank, starts these
    ranks; "e" and that number ends them.
    """
    gc.collect()
    gc.freeze()  # in the ranks no collection goes through what they share
    folder, control = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
    running: dict[int, list[int]] = {}
    meetings = itertools.count()
    control.sendall(b".")
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, 2, MOST)
        if not request:
            return
        world = request[1]
        if request[:1] == b"s":
            meeting = f"{folder}/{next(meetings)}"
            pipes = [Connection(descriptor) for descriptor in descriptors]
            running[world] = [fork(rank, world, meeting, control, pipes) for rank in range(world)]
            for pipe in pipes:
                pipe.close()  # so that the pool sees the end of a rank
        else:
            for pid in running.pop(world):
                os.kill(pid, signal.SIGKILL)  # one that has ended is there until it is waited for
                os.waitpid(pid, 0)
        control.sendall(b".")


def fork(rank: int, world: int, meeting: str, control: socket.socket, pipes: list[Connection]) -> int:
    """Start a rank, which serves until the pool closes its pipe; its process id."""
    pid = os.fork()
    if pid:
        return pid
    control.close()
    for pipe in pipes:
        if pipe is not pipes[rank]:
            pipe.close()
    status = 1
    try:
        serve(connect(rank, world, meeting), pipes[rank])
        status = 0
    finally:
        os._exit(status)


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
