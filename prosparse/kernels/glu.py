"""The gated part of an FFN in training: x1 = act(gate) * up, its gradients, the L1 penalty and the statistics.

In: gate and up, [..., neurons], and the `PenaltyContext` of a micro-batch. Out: x1; backward does all the rest in one
pass, from gate and up alone. Eager torch here, the same in Triton in glu_triton.py.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from prosparse.activations import ACTIVATIONS, intermediate
from prosparse.penalty import COUNT, MAGNITUDE, NONZERO, PenaltyContext, row_mask, sum_abs

FUSED = ("silu", "swish", "relu", "fatrelu", "drelu")  # the activations that these kernels know


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, name, param, kernels, context, layer, tokens, visits):
        x1 = kernels[0](name, param, gate, up)
        ctx.save_for_backward(gate, up)
        ctx.kernels, ctx.name, ctx.param = kernels, name, param
        ctx.context, ctx.layer, ctx.visits = context, layer, visits
        ctx.mask = row_mask(context.token_mask, x1, tokens)
        ctx.again = None  # x1, once it has been recomputed
        return x1

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (gradient,), (gate, up), context, mask = gradients, ctx.saved_tensors, ctx.context, ctx.mask
        scale = context.scale / (gate.shape[-1] * ctx.visits)
        again, ctx.again = ctx.again, None
        known = () if again is None else (again,)
        d_gate, d_up, sums = ctx.kernels[1](ctx.name, ctx.param, gate, up, gradient, scale, mask, *known)
        rows = gate.numel() // gate.shape[-1] if mask is None else mask.sum()
        row = context.statistics[ctx.layer]
        row[MAGNITUDE : NONZERO + 1] += sums.sum(-1, dtype=torch.float64)
        row[COUNT] += rows * gate.shape[-1]
        return d_gate, d_up, *[None] * 7


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
    of `inject_l1`. implementation: eager or triton; name: one of FUSED.
    """
    assert name in FUSED, name
    return _Gated.apply(gate, up, name, param, kernels(implementation), context, layer, tokens, visits)


def kernels(implementation: str) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """(forward, backward) of `eager` or `triton`."""
    if implementation == "eager":
        return intermediate, _backward
    from prosparse.kernels import glu_triton  # which needs the package triton

    return glu_triton.forward, glu_triton.backward


def recompute_x1(down: nn.Module) -> None:
    """Let `down`, the projection that x1 enters, compute x1 again in backward instead of keeping it.

    x1 has to come from `gated`. Not for layers under activation checkpointing: what backward needs would stay alive
    from one forward pass to the next.
    """
    down.forward = MethodType(_without_x1, down)  # type: ignore[method-assign]  # bound, as in norm.py


def _without_x1(down: nn.Module, x1: Tensor) -> Tensor:
    node: Any = x1.grad_fn
    while type(node).__name__ == "PostBackwardFunctionModuleBackward":  # ZeRO-3's, an identity
        node = node.next_functions[0][0]
    if not hasattr(node, "kernels"):  # no gradient is wanted, or x1 comes from elsewhere
        return type(down).forward(down, x1)
    address, size = x1.data_ptr(), x1.numel()  # not x1: the graph keeps `pack`, which would keep it

    def pack(saved: Tensor) -> Any:
        is_x1 = saved.data_ptr() == address and saved.numel() == size
        return (saved.shape, node) if is_x1 else saved

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        shape, node = packed
        with torch.no_grad():
            x1 = node.kernels[0](node.name, node.param, *node.saved_tensors)
        if node.kernels[1] is _backward:  # which comes next and needs it too
            node.again = x1
        return x1.view(shape)

    with saved_tensors_hooks(pack, unpack):
        return type(down).forward(down, x1)


# --- eager ------------------------------------------------------------------------------------------------------------


def _backward(
    name: str,
    param: float,
    gate: Tensor,
    up: Tensor,
    gradient: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    x1: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of gate, of up, fp32 [2, rows]: Σ|x1| and non-zeros); `gradient` is that of x1, [..., neurons]."""
    kept = ACTIVATIONS["relu" if name == "drelu" and param == 0 else name](gate, param)
    d_kept, cut = up, torch.ops.aten.threshold_backward
    if name == "drelu":
        d_kept = F.relu(up)
    x1 = kept * d_kept if x1 is None else x1
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
