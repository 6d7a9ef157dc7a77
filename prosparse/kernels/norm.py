"""RMSNorm that keeps its input in the model's dtype for backward, and nothing in fp32.

In: hidden states, [..., hidden], the module's weight and ε. Out: what the module gives, bit for bit, and its gradients.
"""

from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return weight * wide.mul_(scale).to(x.dtype) if x.dtype != torch.float32 else weight * (wide * scale)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (gradient,), (x, weight, scale) = gradients, ctx.saved_tensors
        normal = x.float() * scale
        d_weight = (gradient * normal.to(x.dtype)).flatten(0, -2).sum(0)
        wide = (gradient * weight).float()
        inner = torch.linalg.vecdot(wide, normal).unsqueeze(-1).div_(-x.shape[-1])
        return normal.mul_(inner).add_(wide).mul_(scale).to(x.dtype), d_weight, None


def fuse(module: nn.Module) -> bool:
    """Let `module` compute so, if it is an RMSNorm as Llama's: weight · (x / rms(x)), rounded before the weight."""
    if not _is_llamas(type(module)):
        return False
    module.forward = MethodType(_forward, module)  # bound, so that a copy of the module has its own
    return True


def is_fused(module: nn.Module) -> bool:
    """Whether `fuse` has changed it."""
    return getattr(vars(module).get("forward"), "__func__", None) is _forward


def _forward(norm: Any, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)


def _is_llamas(kind: type[nn.Module], known: dict[type, bool] = {}) -> bool:  # noqa: B006 - remembers
    """Whether modules of this class give, on random numbers, bit for bit the same."""
    if kind not in known:
        known[kind] = False
        if kind.__name__.endswith("RMSNorm") and len(signature(kind.forward).parameters) == 2:
            generator = torch.Generator().manual_seed(0)
            try:
                module: Any = kind(16, eps=1e-3)  # type: ignore[call-arg]
                module.weight.data = torch.randn(16, generator=generator).bfloat16()
                x = torch.randn(4, 16, generator=generator).bfloat16()
                known[kind] = torch.equal(module(x), _RMSNorm.apply(x, module.weight, module.variance_epsilon))
            except (TypeError, AttributeError):  # made otherwise
                pass
    return known[kind]
