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
if [ $# -gt 0 ]; then
    part tests python -m pytest "$@"
else # those that start groups of ranks take both cores of a small machine by themselves
    part units python -m pytest -n 2 --dist loadfile --ignore tests/distributed --ignore tests/faults
    part ranks python -m pytest tests/distributed tests/faults
fi
