"""The gated part of an FFN in training: x1 = act(gate) * up, its gradients, the L1 penalty and the statistics.

In: gate and up, [..., neurons], and the `PenaltyContext` of a micro-batch. Out: x1; backward does all the rest in one
pass, from gate and up alone. Eager torch, and the same in Triton for GPUs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from prosparse.activations import ACTIVATIONS, intermediate
from prosparse.penalty import COUNT, MAGNITUDE, NONZERO, PenaltyContext, row_mask, sum_abs

FUSED = ("silu", "swish", "relu", "fatrelu", "drelu")  # the activations that these kernels know

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without it
    triton = None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, name, param, kernels, context, layer, tokens, visits):
        x1 = kernels[0](name, param, gate, up)
        ctx.save_for_backward(gate, up)
        ctx.kernels, ctx.name, ctx.param = kernels, name, param
        ctx.context, ctx.layer, ctx.visits = context, layer, visits
        ctx.mask = row_mask(context.token_mask, x1, tokens)
        return x1

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (gradient,), (gate, up), context, mask = gradients, ctx.saved_tensors, ctx.context, ctx.mask
        scale = context.scale / (gate.shape[-1] * ctx.visits)
        d_gate, d_up, sums = ctx.kernels[1](ctx.name, ctx.param, gate, up, gradient, scale, mask)
        rows = gate.numel() // gate.shape[-1] if mask is None else mask.sum()
        row = context.statistics[ctx.layer]
        row[MAGNITUDE : NONZERO + 1] += sums.sum(-1, dtype=torch.float64)
        row[COUNT] += rows * gate.shape[-1]
        return d_gate, d_up, *[None] * 7


@torch.compiler.disable  # its statistics are no part of a compiled graph
def gated(
    gate: Tensor,
    up: Tensor,
    name: str,
    param: float,
    implementation: str,
    context: PenaltyContext,
    layer: int,
    tokens: Tensor | None = None,
    visits: int = 1,
) -> Tensor:
    """x1 of an FFN, [..., neurons], as `activations.intermediate` and `penalty.inject_l1` together give it.

    It keeps gate and up for backward, which adds the L1 gradient and this layer's statistics; `tokens` and `visits` as
    of `inject_l1`. implementation: a key of KERNELS. Raises KeyError for an activation that is not in FUSED.
    """
    assert name in FUSED, name
    return _Gated.apply(gate, up, name, param, KERNELS[implementation], context, layer, tokens, visits)


def recompute_x1(down: nn.Module) -> None:
    """Let `down`, the projection that x1 enters, compute x1 again in backward instead of keeping it.

    x1 has to come from `gated`. Not for layers under activation checkpointing: what backward needs would stay alive
    from one forward pass to the next. Undone by `keep_x1`.
    """
    forward = down.forward

    def without_x1(x1: Tensor) -> Tensor:
        node: Any = x1.grad_fn
        while type(node).__name__ == "PostBackwardFunctionModuleBackward":  # ZeRO-3's, an identity
            node = node.next_functions[0][0]
        if not hasattr(node, "kernels"):  # no gradient is wanted, or x1 comes from elsewhere
            return forward(x1)

        address, size = x1.data_ptr(), x1.numel()  # not x1: the graph keeps `pack`, which would keep it

        def pack(saved: Tensor) -> Any:
            is_x1 = saved.data_ptr() == address and saved.numel() == size
            return (saved.shape, node) if is_x1 else saved

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            shape, node = packed
            with torch.no_grad():
                return node.kernels[0](node.name, node.param, *node.saved_tensors).view(shape)

        with saved_tensors_hooks(pack, unpack):
            return forward(x1)

    down.forward = without_x1  # type: ignore[method-assign]


def keep_x1(down: nn.Module) -> None:
    """Undo `recompute_x1`."""
    vars(down).pop("forward", None)


# --- eager ------------------------------------------------------------------------------------------------------------


def _backward(
    name: str, param: float, gate: Tensor, up: Tensor, gradient: Tensor, scale: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of gate, of up, fp32 [2, rows]: Σ|x1| and non-zeros); `gradient` is that of x1, [..., neurons]."""
    kept = ACTIVATIONS["relu" if name == "drelu" and param == 0 else name](gate, param)
    d_kept, cut = up, torch.ops.aten.threshold_backward
    if name == "drelu":
        d_kept = F.relu(up)
    x1 = kept * d_kept
    counted = x1 if mask is None else x1 * mask.unsqueeze(-1)
    sign = counted.sign()
    sums = torch.stack([sum_abs(part).flatten() for part in (counted, sign)])
    gradient = torch.addcmul(gradient, scale.to(gradient.dtype), sign)
    d_up = gradient * kept
    if name == "drelu":
        d_up = cut(d_up, up, 0)
    d_gate = gradient.mul_(d_kept)
    if name in ("silu", "swish"):
        d_gate = torch.ops.aten.silu_backward(d_gate, gate)
    elif name == "relu" or (param == 0 and name == "drelu"):
        d_gate = cut(d_gate, gate, 0)
    else:
        d_gate = d_gate.mul_(gate >= param)
    return d_gate, d_up, sums


# --- Triton: a program a row, so that a row's sums need no atomics and are the same in every run ---------------------

if triton is not None:
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


def _forward_triton(name: str, param: float, gate: Tensor, up: Tensor) -> Tensor:
    x1 = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    (g, g_stride), (u, u_stride), neurons = _rows(gate), _rows(up), gate.shape[-1]
    if len(g):
        _forward_kernel[(len(g),)](g, u, x1, param, g_stride, u_stride, neurons, **_switches(name, param), BLOCK=BLOCK)
    return x1


def _backward_triton(
    name: str, param: float, gate: Tensor, up: Tensor, gradient: Tensor, scale: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (g, g_stride), (u, u_stride), (d, d_stride) = map(_rows, (gate, up, gradient))
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    sums = torch.empty(2, len(g), dtype=torch.float32, device=gate.device)
    counted = scale if mask is None else mask.flatten().to(torch.float32)
    if len(g):
        _backward_kernel[(len(g),)](
            g, u, d, scale, counted, d_gate, d_up, sums, param, g_stride, u_stride, d_stride, gate.shape[-1], len(g),
            MASKED=mask is not None, **_switches(name, param), BLOCK=BLOCK,
        )  # fmt: skip
    return d_gate, d_up, sums


KERNELS = {"eager": (intermediate, _backward), "triton": (_forward_triton, _backward_triton)}
