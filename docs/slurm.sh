#!/usr/bin/env bash
# One run on SLURM, on any number of nodes: it saves and requeues itself before the time limit and goes on where it was.
#   sbatch --nodes 2 docs/slurm.sh pretrain --config v1-paper --data.root /data/imagenet --out /shared/runs/r50
# Everything after the script's name is a fastsimclr command; --resume auto is added where the command has it. --out must
# lie on a file system that all nodes see.
#SBATCH --job-name=fastsimclr
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -uo pipefail

ranks_per_node=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
grace=() # 30 s from SIGTERM to SIGKILL where torchrun does not know the option
torchrun --help 2>/dev/null | grep -q -- --shutdown_timeout && grace=(--shutdown_timeout 100)
again=()
case "${1:-}" in run | demo | bench | "") ;; *) again=(--resume auto) ;; esac

# srun does not take it from sbatch since SLURM 22.05
[[ -n "${SLURM_CPUS_PER_TASK:-}" ]] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

stopping=0
stop() {
  stopping=1
  scancel --signal=TERM "$SLURM_JOB_ID" # to the steps, not to this script: every rank saves at one common step
}
trap stop TERM

srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$ranks_per_node" \
  "${grace[@]}" --rdzv-backend c10d --rdzv-endpoint "$head_node:$port" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  -m fastsimclr "$@" "${again[@]}" &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # the signal interrupted the wait: the ranks are saving
  wait "$step"
  code=$?
done
if ((stopping)); then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
