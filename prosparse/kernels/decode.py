"""The operators of a sparse FFN that decodes: the up projection of the neurons whose gate passes, the rows they add.

In: the gate's scores, hidden states of at most MOST_TOKENS tokens, weights with one contiguous row a neuron.
Out: the intermediate x1 and the FFN's output. The weights of neurons that are cut are never read.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prosparse.activations import intermediate
from prosparse.config import Implementation

MOST_TOKENS = 8
SPARSE = ("relu", "fatrelu", "drelu")  # activations with exact zeros where the gate is cut
_SOURCE = Path(__file__).with_suffix(".cpp")
_VECTORS = {
    "AVX512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mavx2 -mfma -mf16c",
    "AVX2": "-mavx2 -mfma -mf16c",
}  # by torch's name of the CPU's capability


@cache
def choose(implementation: Implementation | str, device: torch.device) -> Implementation:
    """The implementation itself; for `auto` triton on a GPU, on a CPU cpp, and eager with a line on stderr.

    eager gathers the rows through torch. cpp is compiled at its first use, in some 15 seconds, and kept in
    ~/.cache/prosparse. Raises ValueError if what is asked for cannot run here.
    """
    wanted = Implementation(implementation)
    if wanted is Implementation.auto:
        best = Implementation.triton if device.type == "cuda" else Implementation.cpp
        try:
            return choose(best, device)
        except ValueError as error:
            slower = "sparse decoding: implementation is eager, which gathers rows through torch and is slower"
            print(f"{slower}: {error}", file=sys.stderr)
            return Implementation.eager
    if wanted is Implementation.triton:
        if find_spec("triton") is None:
            raise ValueError("implementation is triton, which is not installed: pip install triton")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"implementation is triton, but the weights are on {device}: choose cpp or eager")
    if wanted is Implementation.cpp:
        if device.type != "cpu":
            raise ValueError(f"implementation is cpp, but the weights are on {device}: choose triton or eager")
        try:
            _compiled()
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            reason = next((line for line in str(error).splitlines() if "error:" in line), str(error).splitlines()[0])
            raise ValueError(f"implementation cpp needs a C++ compiler and ninja ({reason})") from error
    return wanted


@cache
def _compiled() -> Any:
    """The operators of decode.cpp, compiled for this CPU and this torch unless a former process did."""
    from torch.utils import cpp_extension

    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-fopenmp"]
    if capability in _VECTORS:
        flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}", *_VECTORS[capability].split()]
    key = hashlib.sha256(repr((_SOURCE.read_text(), torch.__version__, flags)).encode()).hexdigest()[:16]
    library = Path("~/.cache/prosparse").expanduser() / f"decode-{key}.so"
    if library.exists():
        torch.ops.load_library(library)
        return torch.ops.prosparse_decode
    print("compiling the sparse operators for this CPU, once, in some 15 seconds", file=sys.stderr)
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # torch's own would wait for a killed build forever
        how: dict = {"extra_cflags": flags, "extra_ldflags": ["-fopenmp"], "is_python_module": False}
        cpp_extension.load("decode", [str(_SOURCE)], build_directory=folder, **how)
        os.replace(Path(folder) / "decode.so", library)
    return torch.ops.prosparse_decode


def passes(gate: Tensor, activation: str, threshold: float) -> Tensor:
    """Where the activation does not cut the gate: bool, in the shape of `gate`. NaN passes ReLU, as in torch."""
    return gate >= threshold if _cuts(activation, threshold) else ~(gate <= 0)


def _cuts(activation: str, threshold: float) -> bool:
    return activation == "fatrelu" or (activation == "drelu" and threshold > 0)


def dense(hidden: Tensor, weight: Tensor, bias: Tensor | None, implementation: Implementation) -> Tensor:
    """hidden @ weight.T + bias, [batch, neurons]: F.linear, or for one or two tokens on a CPU what is faster there.

    hidden: [batch, hidden]; weight: [neurons, hidden]; bias: [neurons] or None.
    """
    if implementation is Implementation.cpp and len(hidden) <= 2 and weight.is_contiguous():
        return _compiled().dense(hidden.contiguous(), weight, _checked(bias, hidden, weight, 1))
    return F.linear(hidden, weight, bias)


def sparse_up(
    gate: Tensor,
    hidden: Tensor,
    up_weight: Tensor,
    activation: str,
    threshold: float = 0.0,
    bias: Tensor | None = None,
    implementation: Implementation | str = Implementation.auto,
) -> Tensor:
    """x1 = act(gate) * up(hidden), [batch, neurons]; rows of `up_weight` that no token's gate passes are not read.

    gate: [batch, neurons]; hidden: [batch, hidden], batch <= MOST_TOKENS; up_weight: [neurons, hidden], contiguous;
    bias: of the up projection, [neurons]. All of one dtype, fp32, bf16 or fp16; sums are in fp32.
    The values are those of `activations.intermediate`, but exact 0 where the gate is cut, even if up is not finite.
    The operator is step 2 of arXiv 2402.13516.
    Raises ValueError for another activation, shape or dtype, or for several devices.
    """
    if activation not in SPARSE:
        raise ValueError(f"activation is {activation}: only {', '.join(SPARSE)} leave neurons out")
    bias = _checked(bias, hidden, up_weight, 1, gate)
    if gate.shape != (len(hidden), len(up_weight)):
        raise ValueError(f"gate has the shape {list(gate.shape)}, not {[len(hidden), len(up_weight)]}")
    chosen = choose(implementation, hidden.device)
    threshold = torch.tensor(threshold, dtype=gate.dtype).item()  # as torch compares
    gate, hidden = gate.contiguous(), hidden.contiguous()
    cut, relu_up = _cuts(activation, threshold), activation == "drelu"
    if chosen is Implementation.cpp:
        return _compiled().sparse_up(gate, hidden, up_weight, bias, threshold, cut, relu_up)
    if chosen is Implementation.triton:
        from prosparse.kernels import decode_triton

        return decode_triton.sparse_up(gate, hidden, up_weight, bias, threshold, cut, relu_up)
    kept = passes(gate, activation, threshold)
    active = kept.any(0).nonzero()[:, 0]
    up = F.linear(hidden, up_weight.index_select(0, active), None if bias is None else bias[active])
    x1 = gate.new_zeros(gate.shape)
    x1[:, active] = intermediate(activation, threshold, gate[:, active], up).where(kept[:, active], 0.0)
    return x1


def sparse_down(
    x1: Tensor,
    down_rows: Tensor,
    bias: Tensor | None = None,
    implementation: Implementation | str = Implementation.auto,
) -> Tensor:
    """x1 @ down_rows + bias, [batch, hidden]; rows whose x1 is 0 for every token are not read.

    x1: [batch, neurons], batch <= MOST_TOKENS; down_rows: [neurons, hidden], contiguous, the down projection's weight
    transposed; bias: [hidden]. All of one dtype, fp32, bf16 or fp16; sums are in fp32, in the same order every time.
    The operator is step 3 of arXiv 2402.13516. Raises ValueError for another shape or dtype, or for several
    devices.
    """
    bias = _checked(bias, x1, down_rows, 0)
    chosen = choose(implementation, x1.device)
    x1 = x1.contiguous()
    if chosen is Implementation.cpp:
        return _compiled().sparse_down(x1, down_rows, bias)
    if chosen is Implementation.triton:
        from prosparse.kernels import decode_triton

        return decode_triton.sparse_down(x1, down_rows, bias)
    active = (x1 != 0).any(0).nonzero()[:, 0]
    out = x1[:, active] @ down_rows.index_select(0, active)
    return out if bias is None else out + bias


def _checked(bias: Tensor | None, tokens: Tensor, weight: Tensor, axis: int, *others: Tensor) -> Tensor | None:
    """`bias`, contiguous; `axis` of `weight` is the one that each token's numbers meet, the other the bias's.

    Raises ValueError for what the operators would read wrongly: shapes, gaps in a weight, dtypes, devices.
    """
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"a weight has the shape {list(weight.shape)}: give [neurons, hidden], each at least 1")
    width, out = weight.shape[axis], weight.shape[1 - axis]
    if tokens.dim() != 2 or not 1 <= len(tokens) <= MOST_TOKENS or tokens.shape[1] != width:
        raise ValueError(f"a {list(tokens.shape)} tensor: give 1 to {MOST_TOKENS} tokens of {width} numbers")
    if not weight.is_contiguous():
        raise ValueError("a weight is not contiguous: it needs one row a neuron, without gaps")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"the bias has the shape {list(bias.shape)}, not {[out]}")
    given = [tokens, weight, *others, *([] if bias is None else [bias])]
    if len(devices := dict.fromkeys(str(t.device) for t in given)) > 1:
        raise ValueError(f"the tensors are on {', '.join(devices)}: give all on one device")
    dtypes = {t.dtype for t in given}
    if len(dtypes) > 1 or dtypes.isdisjoint((torch.float32, torch.bfloat16, torch.float16)):
        raise ValueError(f"dtypes are {', '.join(map(str, dtypes))}: give one of fp32, bf16, fp16 for all")
    return None if bias is None else bias.contiguous()
