"""What every test may use: the shared real data, a pool of ranks, and which tests are left out on this machine."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import docstring_parser
import hypothesis
import pytest
import torch

from fastsimclr.runtime.versions import version_problems

# Of triton 3.6's own interpreter, with numpy from 1.25 on; pyproject.toml has the same for this process.
TRITON_3_6 = "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning:triton.runtime.interpreter"
VARIABLE = "FASTSIMCLR_TEST_DATA"
REQUIRE = "FASTSIMCLR_REQUIRE_LOADERS"
FILES = ("cifar10-jpeg.tar.xz", "google-simclr-oracle.npz", "imagenet-samples.tar", "tf-checkpoints.tar.xz")
WAITING = ("test_nodes.py", "test_torchrun.py", "test_slurm.py", "test_resume.py")
"""They start processes and wait for them: first, so that they do not stand alone at the end."""
ONE_PROCESS = ("test_distillation.py", "test_google.py", "test_protocols.py", "test_stages.py", "test_studies.py")
"""Their fixtures take seconds: one process of pytest-xdist runs the file, or each would make them."""
pytest_plugins = ["tests.processor_time", "tests.smoke", "tests.made_runs"]
LEFT_OUT = pytest.StashKey[dict[str, int]]()

# Where there is no GPU the fused kernels run in Triton's interpreter, which must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Every parser of a recipe reads the docstrings of its sections from their source files, half a second each time.
docstring_parser.parse_from_object = functools.cache(docstring_parser.parse_from_object)

# No deadline: no timing is asserted in a test. Derandomised: a red run can be repeated. `make test` takes few examples,
# `make test-slow` runs the same tests with --hypothesis-profile thorough.
for profile, examples in (("quick", 30), ("thorough", 300)):
    hypothesis.settings.register_profile(profile, max_examples=examples, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("quick")
# The first use of a device as a context keeps the factories of that moment, among them a torch.empty that some test has
# patched: it would then leave the true one alone for the rest of the process.
with torch.device("meta"):
    torch.empty(1)
# Two threads at most, so that sums have one order on machines of any size; OMP_NUM_THREADS=1 is kept.
THREADS = min(2, torch.get_num_threads())
torch.set_num_threads(THREADS)


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a data folder that lacks a file: such a run would look complete and would not be."""
    if problems := version_problems():
        raise pytest.UsageError("\n".join(problems))
    config.stash[LEFT_OUT] = {}
    if folder := os.environ.get(VARIABLE):
        missing = [name for name in FILES if not (Path(folder) / name).is_file()]
        if missing:
            raise pytest.UsageError(f"{VARIABLE}={folder} lacks {', '.join(missing)}; unset it or complete the folder")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark hypothesis tests, and the tests that one process of pytest-xdist runs: it starts the ranks once."""
    if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
        item.add_marker("examples")
    if "ranks_pool" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.xdist_group("ranks"))
    elif "cifar_samples" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.xdist_group("cifar"))
    elif item.path.name in ONE_PROCESS:
        item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that need a GPU or the shared data where there is none; the summary says how many."""
    reasons: dict[str, Callable[[pytest.Item], bool]] = {}
    if not torch.cuda.is_available():
        reasons["no CUDA device: tests marked gpu"] = lambda item: item.get_closest_marker("gpu") is not None
    if not os.environ.get(VARIABLE):
        reasons[f"{VARIABLE} is not set: tests on the shared real data"] = lambda item: (
            "data_dir" in getattr(item, "fixturenames", ())
        )
    if os.environ.get(REQUIRE) != "1":
        for package in ("nvidia.dali", "ffcv", "matplotlib"):
            if not _installed(package):
                reasons[f"no {package} here: tests that need it ({REQUIRE}=1 has them fail)"] = functools.partial(
                    _needs, package
                )
    if not _installed("transformers"):
        reasons["no transformers here: tests that need it"] = functools.partial(_needs, "transformers")
    for reason, applies in reasons.items():
        left_out = [item for item in items if applies(item)]
        if left_out:
            config.stash[LEFT_OUT][reason] = len(left_out)
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: (item.get_closest_marker("xdist_group") is None, item.path.name not in WAITING))
    if hasattr(config, "workeroutput"):  # a process of pytest-xdist
        config.workeroutput["left out"] = config.stash[LEFT_OUT]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave all modules out of every later collection of garbage, of which each checkpoint makes a full one."""
    if getattr(session.config.option, "loadgroup", False):  # a process of pytest-xdist under --dist loadgroup
        single = [
            item.nodeid for item in session.items if item.get_closest_marker("xdist_group") and "@" not in item.nodeid
        ]
        if single:
            raise pytest.UsageError(f"this pytest-xdist does not group {single[0]}; use another version of pytest")
    import torch._dynamo  # noqa: F401  # the first optimizer would

    gc.collect()
    gc.freeze()
    gc.get_freeze_count = functools.cache(gc.get_freeze_count)  # it counts a million, and each training asks


def pytest_sessionfinish() -> None:
    """Let go of them, which else some extensions tell of at the end of the process."""
    gc.unfreeze()


def pytest_sessionstart() -> None:
    """Pass over what numba's finalizer raises when FFCV's functions are collected, in whatever test that happens."""
    told = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        frames = traceback.extract_tb(unraisable.exc_traceback)
        if not (frames and frames[-1].filename.endswith("numba/core/dispatcher.py")):
            told(unraisable)

    sys.unraisablehook = hook


def pytest_runtest_teardown() -> None:
    """Give each test the same threads: FFCV sets torch's to its own, at its first batch."""
    torch.set_num_threads(THREADS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take from a process of pytest-xdist what it left out: each collects all tests, the summary is written here."""
    node.config.stash[LEFT_OUT] |= getattr(node, "workeroutput", {}).get("left out", {})


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _needs(package: str, item: pytest.Item) -> bool:
    marked = [mark.args[0] for mark in item.iter_markers("needs")]
    return package in marked or package in getattr(item, "fixturenames", ())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line for each reason why tests were left out."""
    for reason, count in config.stash[LEFT_OUT].items():
        terminalreporter.write_line(f"left out {count}: {reason}")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of shared real data; a test that asks for it is left out where FASTSIMCLR_TEST_DATA is not set."""
    return Path(os.environ[VARIABLE])


@pytest.fixture(scope="session")
def imagenet_samples(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of 400 ImageNet JPEGs of original size, SYNSET_name.JPEG, 6 of them grey."""
    root = tmp_path_factory.mktemp("imagenet")
    with tarfile.open(data_dir / "imagenet-samples.tar") as archive:
        archive.extractall(root, filter="data")
    return root / "imagenet-samples"


@pytest.fixture(scope="session")
def cifar_samples(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 as JPEG files, the first 40 a class of train and 20 of test: {train,test}/CLASS/NNNN.jpg."""
    root = tmp_path_factory.mktemp("cifar10")
    limits, taken = {"train": 40, "test": 20}, dict[str, int]()
    with tarfile.open(data_dir / "cifar10-jpeg.tar.xz", "r|xz") as archive:
        for member in archive:
            parts = Path(member.name).parts
            folder = "/".join(parts[:-1])
            if member.isfile() and taken.get(folder, 0) < limits[parts[-3]]:
                taken[folder] = taken.get(folder, 0) + 1
                archive.extract(member, root, filter="data")
    return root


class RanksPool:
    """Gloo ranks that live as long as the session: `pool(world, function, *args)` -> every rank's result, in order.

    `function(ranks, *args)`, with `ranks` a distributed.ranks.Ranks, runs in `world` (1 to 4) processes of one thread
    each, in which every warning is an error. It stands at the top level of a test file, which each rank loads;
    arguments and results are pickled. The processes are forked at the first call with that `world`, from one that has
    imported all, and keep their groups. Where a rank raises, RuntimeError with its traceback; where one does not answer
    in `timeout_s`, TimeoutError naming it. Both end the ranks of that `world`; the next call starts new ones.
    """

    def __init__(self, timeout_s: float = 180.0) -> None:
        self.timeout_s = timeout_s
        self._pipes: dict[int, list[Any]] = {}
        self._folder = tempfile.TemporaryDirectory()
        self._control, control = socket.socketpair()
        self._control.settimeout(600.0)  # it imports torch and more
        worker = Path(__file__).with_name("ranks_worker.py")
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        on_cpu = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        with control:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-W",
                    "error",
                    "-W",
                    TRITON_3_6,
                    str(worker),
                    self._folder.name,
                    str(control.fileno()),
                ],
                # Ranks are CPU processes everywhere, whose fused kernels are interpreted.
                env={**os.environ, **one, **on_cpu, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(worker.parents[1])},
                pass_fds=[control.fileno()],
                start_new_session=True,
            )
        self._answer()

    def __call__(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        if world not in self._pipes:
            pairs = [multiprocessing.Pipe() for _ in range(world)]
            self._request(b"s", world, [theirs.fileno() for _, theirs in pairs])
            self._pipes[world] = [mine for mine, _ in pairs]
            for _, theirs in pairs:
                theirs.close()
        code = function.__code__
        task = pickle.dumps((code.co_filename, function.__module__, function.__qualname__, pickle.dumps(args)))
        for pipe in self._pipes[world]:
            pipe.send_bytes(task)
        results, errors = self._collect(self._pipes[world])
        if errors or len(results) < world:
            self._request(b"e", world)
            for pipe in self._pipes.pop(world):
                pipe.close()
        if errors:
            raise RuntimeError("\n".join(f"rank {rank} of {world}: {text}" for rank, text in errors.items()))
        if len(results) < world:
            silent = ", ".join(str(rank) for rank in range(world) if rank not in results)
            raise TimeoutError(f"no answer of rank {silent} of {world} in {self.timeout_s} s")
        return [results[rank] for rank in range(world)]

    def _request(self, kind: bytes, world: int, descriptors: Sequence[int] = ()) -> None:
        socket.send_fds(self._control, [kind + bytes([world])], list(descriptors))
        self._answer()

    def _answer(self) -> None:
        if self._control.recv(1) != b".":
            raise RuntimeError(f"the process that starts the ranks ended, exit code {self._process.wait()}")

    def _collect(self, pipes: list[Any]) -> tuple[dict[int, Any], dict[int, str]]:
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        until, waiting = time.monotonic() + self.timeout_s, list(pipes)
        while waiting:
            # The others may wait for the rank that failed: what they have to say comes soon or never.
            left = min(until - time.monotonic(), 1.0 if errors else self.timeout_s)
            ready = multiprocessing.connection.wait(waiting, max(0.0, left))
            if not ready:
                break
            for pipe in ready:
                waiting.remove(pipe)
                rank = pipes.index(pipe)
                try:
                    kind, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    kind, value = "error", "its process ended"
                (results if kind == "result" else errors)[rank] = value
        return results, errors

    def close(self) -> None:
        """End all ranks."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._control.close()
        for pipe in (pipe for pipes in self._pipes.values() for pipe in pipes):
            pipe.close()
        self._folder.cleanup()


@pytest.fixture(scope="session")
def ranks_pool() -> Iterator[RanksPool]:
    """Runs a function of a test file in 1 to 4 gloo ranks: `ranks_pool(world, function, *args)`."""
    pool = RanksPool()
    yield pool
    pool.close()
