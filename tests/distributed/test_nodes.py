"""Two torchrun agents as on two machines: one run, killed machines that come back or do not, and what is said then."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastsimclr.cli.main import main
from fastsimclr.runs import checkpoint
from fastsimclr.runs.log import read_records
from tests.distributed.test_torchrun import PRETRAIN, ROOT, TOTAL, Run, distance, errors

APART = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
# A machine counts as gone after 5 s without a beat, not 15, and is not waited for long at the start.
QUICK = "keep_alive_interval=1,keep_alive_max_attempt=5"


class Machines:
    """Two network namespaces joined by a cable, or loopback alone where this machine allows no namespaces.

    names: of the namespaces, none on loopback. addresses: of the two machines.
    """

    def __init__(self) -> None:
        self.names = [f"simclr{os.getpid()}{end}" for end in "ab"]
        self.addresses = ["10.87.0.1", "10.87.0.2"]
        try:
            self._lay()
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            self.names, self.addresses = [], ["127.0.0.1", "127.0.0.1"]
            print(f"two agents on loopback: no network namespaces here ({error})")
        else:
            print("two agents in two network namespaces")

    def _lay(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
        one, other = self.names
        _ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", other)
        for name, address in zip(self.names, self.addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                _ip("-n", name, "link", "set", link, "up")
            _ip("netns", "exec", name, "true")

    def close(self) -> None:
        for name in self.names:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _ip("netns", "del", name)

    def start(self, machine: int, command: list[str], **environment: str) -> Process:
        """Run `command` on one of them."""
        inside = ["ip", "netns", "exec", self.names[machine]] if self.names else []
        interface = "cable" if self.names else "lo"
        return Process([*inside, *command], {"GLOO_SOCKET_IFNAME": interface, **environment})


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Process:
    """A command, what it says and when, and how it is killed."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    @property
    def said(self) -> str:
        return "\n".join(line for _, line in list(self.lines))

    def heard(self, text: str) -> list[float]:
        """When it said `text`."""
        return [moment for moment, line in list(self.lines) if text in line]

    def torchrun(self) -> int | None:
        """The process id of its torchrun, which starts anew when docs/node.sh does so."""
        for pid in (self.process.pid, *_children(self.process.pid)):
            with contextlib.suppress(OSError):
                if b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None

    def crash(self) -> float:
        """SIGKILL its torchrun, first, and the ranks of that; when."""
        torchrun = self.torchrun()
        assert torchrun is not None, self.said
        ranks = _children(torchrun)
        assert len(ranks) >= 2
        moment = time.monotonic()
        for pid in (torchrun, *ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return moment

    def end(self, timeout_s: float = 300) -> str:
        """What it said; it must succeed."""
        try:
            code = self.process.wait(timeout_s)
        finally:
            self.kill()
        assert code == 0, self.said
        return self.said

    def kill(self) -> None:
        """End it and all that it started."""
        pids = [self.process.pid]
        for pid in pids:
            pids += _children(pid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _rank(pid: int) -> int:
    (rank,) = re.findall(r"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_text())
    return int(rank)


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(happened: Callable[[], object], *processes: Process, timeout_s: float = 300) -> None:
    """Wait for it; every process must go on meanwhile."""
    until = time.monotonic() + timeout_s
    while not happened():
        ended = [process for process in processes if process.process.poll() is not None]
        assert not ended, ended[0].said
        assert time.monotonic() < until, "\n\n".join(process.said for process in processes)
        time.sleep(0.005)


def at_step(run: Path, step: int) -> Callable[[], bool]:
    file = run / "metrics.jsonl"
    return lambda: f'"step": {step},' in (file.read_text() if file.is_file() else "")


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    pair = Machines()
    yield pair
    pair.close()


@pytest.fixture
def cleanup() -> Iterator[list[Process]]:
    """Processes that must not outlive the test."""
    started: list[Process] = []
    yield started
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run of one process, with that many parts of the batch for BN."""
    runs: dict[int, Path] = {}

    def run(groups: int) -> Path:
        if groups not in runs:
            runs[groups] = tmp_path_factory.mktemp("alone") / "run"
            words = [*PRETRAIN, "--trainer.bn_groups", str(groups), "--out", str(runs[groups])]
            assert main(words) == 0
        return runs[groups]

    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def same(run: Path, expected: Path) -> None:
    """Every step once, and the same weights, momentum and statistics as those of one process."""
    assert [r["step"] for r in read_records(run / "metrics.jsonl") if r["kind"] == "train"] == list(range(1, TOTAL + 1))
    print(f"distance: {distance(run, expected):.1e}")
    assert distance(run, expected) < 1e-8  # float64


@pytest.mark.full
def test_two_machines_are_one_process(
    machines: Machines, alone: Callable[[int], Path], tmp_path: Path, cleanup: list[Process]
) -> None:
    port, apart = free_port(), {} if machines.names else {APART: "1"}
    for machine, address in enumerate(machines.addresses):
        words = (
            f"-m torch.distributed.run --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-id one --rdzv-endpoint"
            f" {machines.addresses[0]}:{port} --rdzv-conf is_host={1 - machine} --local-addr {address} -m fastsimclr"
        )
        command = [sys.executable, *words.split(), *PRETRAIN, "--trainer.bn_groups", "global", "--out", str(tmp_path)]
        cleanup.append(machines.start(machine, command, **apart))
    for process in cleanup:
        process.end()
    same(tmp_path, alone(1))


def supervised(machines: Machines, machine: int, port: int, run: Path, conf: str, **environment: str) -> Process:
    """docs/node.sh on one machine, with BN over the images of a machine."""
    stand = run.parent / "stand"
    stand.mkdir(exist_ok=True)
    torchrun = stand / "torchrun"
    torchrun.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    return machines.start(
        machine,
        ["bash", str(ROOT / "docs" / "node.sh"), *PRETRAIN, "--trainer.bn_groups", "node", "--out", str(run)],
        PATH=f"{stand}:{os.environ['PATH']}",
        ENDPOINT=f"{machines.addresses[0]}:{port}",
        RANKS_PER_NODE="2",
        PAUSE="1",
        PET_RDZV_CONF=f"{QUICK},{conf}",
        PET_LOCAL_ADDR=machines.addresses[machine],
        **environment,
    )


@pytest.mark.full
def test_killed_machines_come_back_and_the_run_goes_on(
    machines: Machines, alone: Callable[[int], Path], tmp_path: Path, cleanup: list[Process]
) -> None:
    run, port = tmp_path / "run", free_port()
    cleanup += [supervised(machines, machine, port, run, f"is_host={1 - machine}") for machine in range(2)]
    zero, one = cleanup
    wait_until(at_step(run, 7), *cleanup)
    survivor = zero.torchrun()
    killed = one.crash()
    wait_until(lambda: zero.heard("resumed from"), *cleanup)
    print(f"a machine killed: going on {zero.heard('resumed from')[0] - killed:.1f} s later")
    assert zero.torchrun() == survivor, "its torchrun waits for the other machine"
    (line,) = errors(zero.said)
    assert re.match(r"error: rank 2 on \S+, rank 3 on \S+ shows no sign of life: killed", line), zero.said
    wait_until(at_step(run, 12), *cleanup)
    other = one.torchrun()
    killed = zero.crash()  # with rank 0, and with what the agents meet in
    wait_until(lambda: len(zero.heard("resumed from")) == 2, *cleanup)
    print(f"the first machine killed: going on {zero.heard('resumed from')[1] - killed:.1f} s later")
    assert one.torchrun() != other, "it gave up, and was started again"
    (line,) = errors(one.said)
    assert re.match(r"error: rank 0 at \S+, which keeps the store of the run, does not answer: killed", line), one.said
    for process in cleanup:
        process.end()
    same(run, alone(2))


@pytest.mark.full
def test_the_run_goes_on_without_a_machine_that_is_gone(
    machines: Machines, alone: Callable[[int], Path], tmp_path: Path, cleanup: list[Process]
) -> None:
    run, port = tmp_path / "run", free_port()
    # Agents meet in a store of no torchrun, so that either machine may go; the first one waits long for the second.
    store = (
        "import signal, torch.distributed as d; s = d.TCPStore('0.0.0.0', {}, is_master=True, wait_for_workers=False);"
        " print('listening', flush=True); signal.pause()"
    )
    meeting = machines.start(0, [sys.executable, "-c", store.format(port)])
    cleanup.append(meeting)
    wait_until(lambda: meeting.heard("listening"), meeting)
    elastic = {"NODES": "1:2"}
    gone = supervised(machines, 0, port, run, "is_host=0,last_call_timeout=100", LOGLEVEL="INFO", STARTS="1", **elastic)
    cleanup.append(gone)
    wait_until(lambda: gone.heard("Rendezvous'ing worker group"), gone)
    left = supervised(machines, 1, port, run, "is_host=0,last_call_timeout=3", **elastic)
    cleanup.append(left)
    wait_until(at_step(run, 12), gone, left)
    killed = gone.crash()
    wait_until(lambda: left.heard("resumed from"), left)
    print(f"a machine gone: the other goes on {left.heard('resumed from')[0] - killed:.1f} s later")
    assert "BN keeps the 2 parts of the batch that the run began with" in left.end()
    assert checkpoint.newest(run).name == f"step-{TOTAL:08d}.pt"
    same(run, alone(2))


@pytest.mark.full
def test_torchrun_starts_ranks_again_on_one_machine(
    alone: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PET_MAX_RESTARTS", "1")
    run = tmp_path / "run"
    two = Run(2, *PRETRAIN, "--trainer.bn_groups", "2", "--out", str(run), "--resume", "auto")
    two.wait_for(run, 12)
    os.kill(two.rank(1), signal.SIGKILL)
    code, said = two.end()
    assert code == 0, said
    assert said.count("resumed from") == 1
    same(run, alone(2))


@pytest.mark.full
def test_a_store_that_hangs_is_named(tmp_path: Path, cleanup: list[Process]) -> None:
    """As where the machine of rank 0 is cut off: nothing answers, and nothing is closed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*PRETRAIN, "--trainer.timeout_s", "5", "--out", str(tmp_path / "run")]
    two = Process([*launcher, "-m", "fastsimclr", *words], {APART: "1"})
    cleanup.append(two)
    wait_until(at_step(tmp_path / "run", 3), two)
    zero, one = sorted(_children(two.process.pid), key=_rank)
    stopped = time.monotonic()
    os.kill(zero, signal.SIGSTOP)
    wait_until(lambda: two.heard("error: "), two, timeout_s=60)
    print(f"rank 0 stopped: rank 1 says so {two.heard('error: ')[0] - stopped:.1f} s later")
    (line,) = errors(two.said)
    assert re.match(r"error: rank 0 at \S+, which keeps the store of the run, does not answer", line), two.said
    wait_until(lambda: _ended(one), two, timeout_s=30)


def node_script(stand: Path, torchrun: str, **environment: str) -> tuple[int, list[str]]:
    """(exit code of docs/node.sh, the words of each start of a stand-in for torchrun that then does `torchrun`)."""
    stand.mkdir()
    (stand / "torchrun").write_text(f'#!/usr/bin/env bash\necho "$@" >> {stand}/starts\n{torchrun}\n')
    (stand / "torchrun").chmod(0o755)
    environment |= {"PATH": f"{stand}:{os.environ['PATH']}", "ENDPOINT": "node0:29500", "PAUSE": "0"}
    command = ["bash", str(ROOT / "docs" / "node.sh"), "pretrain", "--out", "x"]
    code = subprocess.run(command, env={**os.environ, **environment}, timeout=60).returncode
    return code, (stand / "starts").read_text().splitlines()


def test_the_script_of_a_machine_starts_again_what_gave_up(tmp_path: Path) -> None:
    once = f"[[ $(wc -l < {tmp_path}/a/starts) -ge 3 ]]"
    code, starts = node_script(tmp_path / "a", once, NODES="1:2", RANKS_PER_NODE="3", ID="seven")
    words = "--nnodes 1:2 --nproc-per-node 3 --max-restarts 10 --rdzv-backend c10d --rdzv-endpoint node0:29500"
    assert (code, starts) == (0, [f"{words} --rdzv-id seven -m fastsimclr pretrain --out x --resume auto"] * 3)
    code, starts = node_script(tmp_path / "b", "exit 5", STARTS="2")
    assert (code, len(starts)) == (5, 2)
    code, starts = node_script(tmp_path / "c", "kill -TERM $PPID; exit 143")
    assert (code, len(starts)) == (143, 1), "SIGTERM ends it for good"
    code, starts = node_script(tmp_path / "d", '[[ "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" == 1 ]]', STARTS="1")
    assert (code, len(starts)) == (0, 1)
