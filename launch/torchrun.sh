#!/usr/bin/env bash
# A run by torchrun. On one host as it is, from the repository root; arguments are overrides:
#     bash launch/torchrun.sh experiment=demo
# On several hosts the same command on each, from the same folder, where only NODE_RANK differs:
#     NODES=2 NODE_RANK=0 MASTER_ADDR=node-0 bash launch/torchrun.sh experiment=llama2_7b run_dir=runs/7b ...
# A rank that is gone ends the run (no restarts): the same commands started again go on from the last checkpoint.
set -euo pipefail

export PATH="$PWD/.venv/bin:$PATH" # edit: where the environment lies, under the same path on every host
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=eth0 # edit: the networks between the hosts, where others are chosen
nodes=${NODES:-1} node_rank=${NODE_RANK:-0}
port=${MASTER_PORT:-29500}         # edit: another one where two runs share a host
logs=${LOGS:-logs}/node-$node_rank # edit: a subfolder for each start, in it one for each rank

gpus=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)
[ "${DS_ACCELERATOR:-}" != cpu ] || gpus=0
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))} # of this host: one for each GPU, two on CPUs
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

if [ "$nodes" -eq 1 ]; then
    where=(--standalone) # a free port
else
    where=(--node-rank "$node_rank" --master-port "$port"
        --master-addr "${MASTER_ADDR:?is the address of the host with NODE_RANK=0}")
fi
echo "a log for each of $ranks ranks in $logs" >&2
exec torchrun --nnodes "$nodes" --nproc-per-node "$ranks" "${where[@]}" --max-restarts 0 \
    --log-dir "$logs" --tee 3 launch/train.py "$@"
