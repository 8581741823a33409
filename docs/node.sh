#!/usr/bin/env bash
# One machine of a run on several, where no scheduler starts what has ended: torchrun, started again when it gives up.
#   ENDPOINT=node0:29500 NODES=2 bash docs/node.sh pretrain --config v1-paper --data.root /data/imagenet --out /shared/r50
# The same command on every machine; ENDPOINT is one of them. NODES=1:2 goes on with the machines that are left.
# Everything after the script's name is a fastsimclr command; --resume auto is added where the command has it. --out must
# lie on a file system that all machines see. SIGTERM ends it for good: to stop a run, send it to every machine.
set -uo pipefail

endpoint=${ENDPOINT:?give the first machine and a free port of it, as in ENDPOINT=node0:29500}
# Without it the ranks of a restart meet in the store that the last ones left.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
again=()
case "${1:-}" in run | demo | bench | "") ;; *) again=(--resume auto) ;; esac

stopping=0 child=
stop() {
  stopping=1
  [[ -n "$child" ]] && kill -TERM "$child"
}
trap stop TERM
trap 'stopping=1' INT # Ctrl-C, which torchrun hears itself

code=1
for ((start = 1; start <= ${STARTS:-10} && !stopping; start++)); do
  torchrun --nnodes "${NODES:-2}" --nproc-per-node "${RANKS_PER_NODE:-8}" --max-restarts "${RESTARTS:-10}" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "${ID:-fastsimclr}" \
    -m fastsimclr "$@" "${again[@]}" &
  child=$!
  ((stopping)) && kill -TERM "$child"
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal interrupted the wait: the ranks are saving
    wait "$child"
    code=$?
  done
  ((code == 0)) && exit 0
  ((stopping)) || sleep "${PAUSE:-5}"
done
exit "$code"
