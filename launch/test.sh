#!/usr/bin/env bash
# Lint, types and the tests, with the time of each part. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

part() {
    local name=$1 began=$SECONDS
    shift
    "$@" || { echo "$name failed" >&2; exit 1; }
    echo "--- $name: $((SECONDS - began)) s"
}
export DS_ACCELERATOR=cpu # the ranks of these tests share one machine, GPUs or not
part format ruff format --check .
part lint ruff check .
part types mypy
# Once a machine, and here rather than within a test: the compilation of what steps in host memory.
part "cpu adam" python -c 'from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load(verbose=False)'
if [ $# -gt 0 ]; then
    part tests python -m pytest "$@"
else # ranks wait for one another much of their time: two groups of them share two cores well
    part units python -m pytest -n 2 --dist loadfile --ignore tests/distributed --ignore tests/faults
    part ranks python -m pytest -n 2 --dist loadfile tests/distributed tests/faults
fi
