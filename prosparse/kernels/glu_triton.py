"""The kernels of glu.py in Triton: a program a row, so that a row's sums need no atomics and repeat bit for bit.

In: gate, up and the gradient of x1, [..., neurons], rows contiguous or halves of a fused projection. Out: as glu.py's
eager functions.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prosparse.kernels import on_device_of

BLOCK = 1024  # neurons that a program holds at a time


@triton.jit
def _kept(gate, up, param, SILU: tl.constexpr, DRELU: tl.constexpr, FAT: tl.constexpr):
    """(act(gate), its derivative, what up counts as, its derivative), fp32."""
    if SILU:
        sigmoid = tl.sigmoid(gate)
        kept = gate * sigmoid
        slope = sigmoid + kept * (1.0 - sigmoid)
    else:
        # where gate is NaN, which has to be seen, the slope is 1
        slope = (gate >= param).to(tl.float32) if FAT else 1.0 - (gate <= 0.0).to(tl.float32)
        kept = tl.where(slope > 0.0, gate, 0.0)
    if DRELU:
        up_slope = 1.0 - (up <= 0.0).to(tl.float32)
        up = tl.where(up_slope > 0.0, up, 0.0)
    else:
        up_slope = tl.full(up.shape, 1.0, tl.float32)
    return kept, slope, up, up_slope


@triton.jit
def _forward_kernel(
    gate, up, x1, param, gate_stride, up_stride, neurons,
    SILU: tl.constexpr, DRELU: tl.constexpr, FAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, neurons, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < neurons
        g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
        kept, _, u, _ = _kept(g, u, param, SILU, DRELU, FAT)
        tl.store(x1 + row * neurons + at, (kept * u).to(x1.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    gate, up, gradient, scale, counted, d_gate, d_up, sums, param, gate_stride, up_stride, gradient_stride, neurons,
    rows, MASKED: tl.constexpr, SILU: tl.constexpr, DRELU: tl.constexpr, FAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(counted + row).to(tl.float32) if MASKED else 1.0
    strength = tl.load(scale).to(tl.float32) * weight
    magnitude = tl.zeros([BLOCK], tl.float32)
    nonzero = tl.zeros([BLOCK], tl.float32)
    for start in range(0, neurons, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < neurons
        g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(gradient + row * gradient_stride + at, mask=inside, other=0.0).to(tl.float32)
        kept, slope, u, up_slope = _kept(g, u, param, SILU, DRELU, FAT)
        x1 = (kept * u).to(gate.dtype.element_ty).to(tl.float32)  # as the forward pass has rounded it
        sign = (x1 > 0.0).to(tl.float32) - (x1 < 0.0).to(tl.float32)
        d += strength * sign
        tl.store(d_gate + row * neurons + at, (d * u * slope).to(d_gate.dtype.element_ty), mask=inside)
        tl.store(d_up + row * neurons + at, (d * kept * up_slope).to(d_up.dtype.element_ty), mask=inside)
        magnitude += tl.abs(x1)
        nonzero += tl.abs(sign)
    tl.store(sums + row, tl.sum(magnitude) * weight)
    tl.store(sums + rows + row, tl.sum(nonzero) * weight)


def _switches(name: str, param: float) -> dict[str, Any]:
    drelu = name == "drelu"
    return {"SILU": name in ("silu", "swish"), "DRELU": drelu, "FAT": name == "fatrelu" or (drelu and param > 0)}


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor with contiguous rows, and the distance between them; a half of a fused projection stays as it is."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    return flat, flat.stride(0)


def forward(name: str, param: float, gate: Tensor, up: Tensor) -> Tensor:
    x1 = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not x1.numel():
        return x1
    (g, g_stride), (u, u_stride), neurons = _rows(gate), _rows(up), gate.shape[-1]
    with on_device_of(gate):
        _forward_kernel[(len(g),)](g, u, x1, param, g_stride, u_stride, neurons, **_switches(name, param), BLOCK=BLOCK)
    return x1


def backward(
    name: str, param: float, gate: Tensor, up: Tensor, gradient: Tensor, scale: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (g, g_stride), (u, u_stride), (d, d_stride) = map(_rows, (gate, up, gradient))
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    sums = torch.empty(2, len(g), dtype=torch.float32, device=gate.device)
    if not sums.numel():
        return d_gate, d_up, sums
    counted = scale if mask is None else mask.flatten().to(torch.float32)
    with on_device_of(gate):
        _backward_kernel[(len(g),)](
            g, u, d, scale, counted, d_gate, d_up, sums, param, g_stride, u_stride, d_stride, gate.shape[-1], len(g),
            MASKED=mask is not None, **_switches(name, param), BLOCK=BLOCK,
        )  # fmt: skip
    return d_gate, d_up, sums
