"""What every test may use: the shared real data, and which tests are left out on this machine."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

VARIABLE = "FASTSIMCLR_TEST_DATA"
FILES = ("cifar10-jpeg.tar.xz", "google-simclr-oracle.npz", "imagenet-samples.tar", "tf-checkpoints.tar.xz")
LEFT_OUT = pytest.StashKey[dict[str, int]]()

# No deadline: no timing is asserted in a test. Derandomised: a red run can be repeated.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("house")
# Two threads at most, so that sums have one order on machines of any size; OMP_NUM_THREADS=1 is kept.
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a data folder that lacks a file: such a run would look complete and would not be."""
    config.stash[LEFT_OUT] = {}
    if folder := os.environ.get(VARIABLE):
        missing = [name for name in FILES if not (Path(folder) / name).is_file()]
        if missing:
            raise pytest.UsageError(f"{VARIABLE}={folder} lacks {', '.join(missing)}; unset it or complete the folder")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that need a GPU or the shared data where there is none; the summary says how many."""
    reasons: dict[str, Callable[[pytest.Item], bool]] = {}
    if not torch.cuda.is_available():
        reasons["no CUDA device: tests marked gpu"] = lambda item: item.get_closest_marker("gpu") is not None
    if not os.environ.get(VARIABLE):
        reasons[f"{VARIABLE} is not set: tests on the shared real data"] = lambda item: (
            "data_dir" in getattr(item, "fixturenames", ())
        )
    for reason, applies in reasons.items():
        left_out = [item for item in items if applies(item)]
        if left_out:
            config.stash[LEFT_OUT][reason] = len(left_out)
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]


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
