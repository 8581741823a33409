"""The SLURM script, run by bash with stand-ins for SLURM's commands: two agents, a stop, a requeue, and the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastsimclr.runs import checkpoint

ROOT = Path(__file__).parents[2]

# srun starts the command once a node, scancel signals what srun started, scontrol knows the nodes and notes a requeue.
STAND_INS = {
    "srun": """echo "$SRUN_CPUS_PER_TASK" > "$STAND/cpus"
[[ $1 == --kill-on-bad-exit=1 ]] && shift
pids=()
for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & pids+=($!); done
echo "${pids[@]}" > "$STAND/pids"
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code""",
    "scancel": '[[ $1 == --signal=TERM && $2 == "$SLURM_JOB_ID" ]] && kill -TERM $(cat "$STAND/pids")',
    "scontrol": """case "$1" in
  show) echo localhost; echo localhost ;;
  requeue) echo "$2" >> "$STAND/requeued" ;;
esac""",
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


def start(stand: Path, run: Path, **stand_ins: str) -> subprocess.Popen[str]:
    stand.mkdir(exist_ok=True)
    for name, text in (STAND_INS | stand_ins).items():
        (stand / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (stand / name).chmod(0o755)
    words = (
        "pretrain --config digits.yaml --data.source synthetic --data.synthetic_images 1000 --data.synthetic_size 8"
        " --device cpu --trainer.precision fp32 --model.width 0.125 --pretrain.batch 64"
        " --pretrain.epochs 2 --pretrain.optim.warmup_epochs 0.2 --trainer.log_every_steps 1"
        f" --trainer.checkpoint_every_steps 1000 --out {run}"
    )
    return subprocess.Popen(
        ["bash", str(ROOT / "docs" / "slurm.sh"), *words.split()],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{stand}:{os.environ['PATH']}",
            "STAND": str(stand),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_JOB_NUM_NODES": "2",
            "RANKS_PER_NODE": "1",
            "SLURM_CPUS_PER_TASK": "2",
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # two agents on one machine
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.full
def test_a_stop_is_saved_and_requeued_and_the_next_start_ends_the_run(tmp_path: Path) -> None:
    stand, run = tmp_path / "stand", tmp_path / "run"
    first = start(stand, run)
    metrics = run / "metrics.jsonl"
    while '"step": 3,' not in (metrics.read_text() if metrics.is_file() else ""):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B:TERM@120 does
    said = first.communicate(timeout=60)[0]
    assert first.returncode == 0, said
    assert (stand / "requeued").read_text() == f"{os.getpid()}\n"
    assert (stand / "cpus").read_text() == "2\n"
    assert said.count("state saved in") == 1
    (saved,) = checkpoint.saved(run)
    second = start(stand, run)
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 0, said
    assert f"resumed from {saved}" in said
    assert (run / "result.json").is_file()
    assert (stand / "requeued").read_text() == f"{os.getpid()}\n"


# Notes its words, and runs until SIGTERM; with --help it names the options that it knows.
TORCHRUN = """if [[ $1 == --help ]]; then echo "  --shutdown_timeout SECONDS"; exit; fi
trap 'exit 143' TERM
echo "$@" >> "$STAND/words"
while :; do sleep 0.05; done"""


def test_the_script_starts_an_agent_on_each_node_and_requeues_after_sigterm(tmp_path: Path) -> None:
    """The script alone: no agent is a process of Python."""
    stand, run = tmp_path / "stand", tmp_path / "run"
    script = start(stand, run, torchrun=TORCHRUN)
    words = stand / "words"
    while not (words.is_file() and words.read_text().count("\n") == 2 and (stand / "pids").is_file()):
        assert script.poll() is None, script.communicate()[0]
        time.sleep(0.01)
    script.send_signal(signal.SIGTERM)
    said = script.communicate(timeout=60)[0]
    assert script.returncode == 0, said
    assert (stand / "requeued").read_text() == f"{os.getpid()}\n"
    assert (stand / "cpus").read_text() == "2\n"
    one, other = words.read_text().splitlines()
    port = 20000 + os.getpid() % 20000
    assert one == other and one.startswith(
        f"--nnodes 2 --nproc-per-node 1 --shutdown_timeout 100 --rdzv-backend c10d --rdzv-endpoint localhost:{port}"
        f" --rdzv-id {os.getpid()}-0 -m fastsimclr pretrain --config digits.yaml"
    )
    assert one.endswith(f"--out {run} --resume auto")


def test_the_script_hands_on_the_exit_code(tmp_path: Path) -> None:
    script = start(tmp_path / "stand", tmp_path / "run", torchrun="exit 3")
    said = script.communicate(timeout=60)[0]
    assert script.returncode == 3, said
    assert not (tmp_path / "stand" / "requeued").exists()
