#!/usr/bin/env bash
# The whole road in one go: a real Swish model in, a measured sparse Hugging Face model out. Arguments are overrides.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# Two ranks on a CPU; otherwise as many GPUs as divide the demo's batch of 4 rows in micro-batches of at least 1.
if command -v nvidia-smi >/dev/null && gpus=$(nvidia-smi -L 2>/dev/null | grep -c .) && [ "$gpus" -gt 0 ]; then
    ranks=1
    for n in 2 4; do [ "$gpus" -ge "$n" ] && ranks=$n; done
    exec deepspeed --num_gpus "$ranks" launch/train.py experiment=demo micro_batch=1 "$@"
fi
export DS_ACCELERATOR=cpu
exec deepspeed --num_gpus 2 launch/train.py experiment=demo "$@"
