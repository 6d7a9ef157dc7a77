"""The operators of decode.py on a GPU, in Triton; with TRITON_INTERPRET=1 on a CPU, to try them.

In: what decode.py has checked: contiguous tensors of one dtype, at most MOST_TOKENS tokens. Out: as there.
Sums are in fp32 and in the same order every time: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prosparse.kernels import on_device_of

NEURONS = 4  # that one program looks at in step 2; most of them are cut
COLUMNS = 4096  # of a row, times tokens, that a program of step 2 holds at once
BLOCK = 128  # columns of the output that a program of step 3 adds up
ROWS = 32  # times tokens: neurons that it loads together
SPLITS = 32  # of the neurons, so that step 3 fills the GPU; their sums are added afterwards


def sparse_up(
    gate: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, threshold: float, cut: bool, relu_up: bool
) -> Tensor:
    (batch, width), neurons = hidden.shape, len(weight)
    tokens = triton.next_power_of_2(batch)
    x1 = torch.empty_like(gate)
    sizes = {"TOKENS": tokens, "NEURONS": NEURONS, "BLOCK": min(triton.next_power_of_2(width), COLUMNS // tokens)}
    flags = {"CUT": cut, "RELU_UP": relu_up, "BIAS": bias is not None}
    given = (gate, hidden, weight, bias if bias is not None else gate, x1, threshold, batch, neurons, width)
    with on_device_of(x1):
        _up[(triton.cdiv(neurons, NEURONS),)](*given, **sizes, **flags)
    return x1


def sparse_down(x1: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    (batch, neurons), width = x1.shape, rows.shape[1]
    tokens = triton.next_power_of_2(batch)
    parts = torch.empty(SPLITS, batch, width, dtype=torch.float32, device=x1.device)
    out = torch.empty(batch, width, dtype=x1.dtype, device=x1.device)
    blocks = triton.cdiv(width, BLOCK)
    share = triton.cdiv(neurons, SPLITS)
    sizes = {"TOKENS": tokens, "ROWS": ROWS // tokens, "BLOCK": BLOCK}
    given = (parts, bias if bias is not None else out, out, batch, width)
    with on_device_of(x1):
        _down[(blocks, SPLITS)](x1, rows, parts, batch, neurons, width, share, **sizes)
        _add_parts[(blocks, batch)](*given, SPLITS=SPLITS, BLOCK=BLOCK, BIAS=bias is not None)
    return out


@triton.jit
def _up(
    gate, hidden, weight, bias, x1, threshold, batch, neurons, width,
    TOKENS: tl.constexpr, NEURONS: tl.constexpr, BLOCK: tl.constexpr,
    CUT: tl.constexpr, RELU_UP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """A program looks at NEURONS gates and reads the up rows of those that pass."""
    token = tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)
    for i in range(NEURONS):
        neuron = tl.program_id(0) * NEURONS + i
        if neuron < neurons:
            real = token < batch
            score = tl.load(gate + token * neurons + neuron, mask=real, other=0.0).to(tl.float32)
            kept = score >= threshold if CUT else (score <= 0) == 0  # ReLU lets NaN through
            kept = kept & real
            if tl.max(kept.to(tl.int32), axis=0) > 0:
                row = weight + neuron.to(tl.int64) * width
                total = tl.zeros((TOKENS, BLOCK), dtype=tl.float32)
                for start in range(0, width, BLOCK):
                    inside = start + column < width
                    w = tl.load(row + start + column, mask=inside, other=0.0).to(tl.float32)
                    at = token[:, None] * width + start + column[None, :]
                    h = tl.load(hidden + at, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
                    total += h * w[None, :]
                up = tl.sum(total, axis=1)
                if BIAS:
                    up += tl.load(bias + neuron).to(tl.float32)
                if RELU_UP:
                    up = tl.where(up <= 0, 0.0, up)
                tl.store(x1 + token * neurons + neuron, tl.where(kept, score * up, 0.0), mask=real)
            else:
                tl.store(x1 + token * neurons + neuron, tl.zeros((TOKENS,), dtype=tl.float32), mask=real)


@triton.jit
def _down(x1, rows, parts, batch, neurons, width, share, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program adds up BLOCK columns of the rows of one share of the neurons; rows of zeros are masked, not read."""
    token = tl.arange(0, TOKENS)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, neurons)
    total = tl.zeros((TOKENS, BLOCK), dtype=tl.float32)
    for start in range(first, end, ROWS):
        neuron = start + tl.arange(0, ROWS)
        real = (token < batch)[:, None] & (neuron < end)[None, :]
        x = tl.load(x1 + token[:, None] * neurons + neuron[None, :], mask=real, other=0.0).to(tl.float32)
        active = tl.max((x != 0).to(tl.int32), axis=0) > 0
        at = neuron.to(tl.int64)[:, None] * width + column[None, :]
        w = tl.load(rows + at, mask=active[:, None] & (column < width)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(x[:, :, None] * w[None, :, :], axis=1)
    at = (tl.program_id(1) * batch + token[:, None]) * width + column[None, :]
    tl.store(parts + at, total, mask=(token < batch)[:, None] & (column < width)[None, :])


@triton.jit
def _add_parts(parts, bias, out, batch, width, SPLITS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    """A program adds up BLOCK columns of one token over the shares."""
    token = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    share = tl.arange(0, SPLITS)
    at = (share[:, None] * batch + token) * width + column[None, :]
    total = tl.sum(tl.load(parts + at, mask=(column < width)[None, :], other=0.0), axis=0)
    if BIAS:
        total += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total, mask=column < width)
