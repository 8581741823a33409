"""Measures the processor time of each test, child processes included, and holds the limit for tests not marked slow.

A pytest plugin, loaded by conftest.py:
    --processor-times FILE   write one row per test, slowest first: processor seconds, wall seconds, name
    --processor-limit S      fail a test above S seconds, unless it is marked slow or stands in EXCEPTIONS

Time spent setting up fixtures that several tests share (scope module, package or session) is charged to none of them;
the table has it under the fixture's name. Write --processor-times=FILE as one word: pytest takes a second one, where
that file exists, for the folder of the tests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EXCEPTIONS: dict[str, str] = {
    "tests/loaders/test_resident_ranks.py::test_all_ranks_choose_alike_by_the_one_with_the_least_memory": (
        "each of its ranks opens the digits of scikit-learn, once"
    ),
}
"""Node id of a test, without its parameters -> why it may exceed the limit without being marked slow."""

KEY = "processor_s"
SHARED = "shared fixture"
_TICKS = os.sysconf("SC_CLK_TCK")
_started = pytest.StashKey[float]()
_shared = pytest.StashKey[float]()


def processor_seconds() -> float:
    """Processor time in s of this process and all its descendants, those that ended and were waited for included."""
    if not Path("/proc/self/stat").exists():
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system
    used, parents = dict[int, int](), dict[int, int]()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry.path, "stat").read_text()
        except OSError:  # it has ended
            continue
        fields = stat.rpartition(")")[2].split()  # the name before it may hold blanks
        parents[int(entry.name)] = int(fields[1])
        used[int(entry.name)] = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    total = 0
    for pid in used:
        ancestor = pid
        while ancestor not in (0, os.getpid()):
            ancestor = parents.get(ancestor, 0)
        total += used[pid] if ancestor else 0
    return total / _TICKS


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the two options."""
    parser.addoption("--processor-times", metavar="FILE", help="write the processor time of each test to FILE")
    parser.addoption("--processor-limit", type=float, metavar="S", help="fail tests, unless slow, above S seconds")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Note where the processor time stands before the test."""
    item.stash[_started], item.stash[_shared] = processor_seconds(), 0.0
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> Iterator[None]:
    """Take the set-up of shared fixtures out of the test that happens to come first; the outermost one counts."""
    item = request._pyfuncitem
    if fixturedef.scope == "function" or _started not in item.stash:
        yield
        return
    before, inner, began = processor_seconds(), item.stash[_shared], time.monotonic()
    yield
    used = processor_seconds() - before
    own = used - (item.stash[_shared] - inner)
    item.stash[_shared] = inner + used
    name = f"fixture {fixturedef.baseid}::{fixturedef.argname}"
    item.user_properties.append((SHARED, (own, time.monotonic() - began, name)))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Attach the time to the report of the call, and fail the test where it is above the limit."""
    outcome: Any = yield
    report = outcome.get_result()
    if call.when != "call":
        return
    seconds = processor_seconds() - item.stash[_started] - item.stash[_shared]
    report.user_properties.append((KEY, seconds))
    limit = item.config.getoption("--processor-limit")
    exempt = (
        item.get_closest_marker("slow") is not None or item.nodeid.partition("@")[0].partition("[")[0] in EXCEPTIONS
    )
    if limit is not None and seconds > limit and not exempt and report.passed:
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} used {seconds:.1f} s of processor time, above the limit of {limit:g} s for tests that"
            " are not slow; make it faster, mark it slow, or add it with a reason to EXCEPTIONS in this plugin"
        )


class Table:
    """Collects the times, on the process that collects the reports."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.began = path, list[tuple[float, float, str]](), time.monotonic()
        self.path.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One row per test that was called, written at once: of a run that is stopped the table is not sorted."""
        if report.when != "call":
            return
        new = [tuple(value) for key, value in report.user_properties if key == SHARED and value[0] > 0.1]
        new.append((dict(report.user_properties)[KEY], report.duration, report.nodeid))
        self.rows += new
        with self.path.open("a") as file:
            file.writelines(self._line(*row) for row in new)

    @staticmethod
    def _line(used: float, wall: float, name: str) -> str:
        return f"{used:9.2f} {wall:9.2f}  {name}\n"

    def pytest_sessionfinish(self) -> None:
        """Write the table, slowest first."""
        lines = [self._line(*row) for row in sorted(self.rows, reverse=True)]
        total = sum(used for used, _, _ in self.rows)
        tests = sum("::test_" in name for _, _, name in self.rows)
        head = f"# {tests} tests, {total:.0f} s of processor time, {time.monotonic() - self.began:.0f} s in all\n"
        self.path.write_text(f"{head}# processor s, wall s, test\n" + "".join(lines))


def pytest_configure(config: pytest.Config) -> None:
    """Collect the table where it is asked for: not in the worker processes of pytest-xdist."""
    path = config.getoption("--processor-times")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(Path(path)))
