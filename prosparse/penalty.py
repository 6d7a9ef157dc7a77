"""The L1 penalty on the intermediate, as a gradient, and the statistics that come with it.

In: an intermediate x1 and the `PenaltyContext` of a micro-batch. Out: x1 itself; backward adds scale · sign(x1).
The penalty is λ · Σ_layers mean(|x1|), the mean over all non-padding tokens of the window and all neurons.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAGNITUDE, NONZERO, COUNT = 0, 1, 2  # columns of the statistics: Σ|x1|, non-zero elements, elements


@dataclass
class PenaltyContext:
    """What one micro-batch needs: filled by the trainer, read in backward.

    scale: 0-d tensor, λ / tokens of the window (times the rank count where an engine averages gradients over ranks).
    statistics: fp64 [layers, 3], added to; the trainer zeroes it when a window starts.
    token_mask: bool [batch, context], False on padding; None if there is none.
    """

    scale: Tensor
    statistics: Tensor
    token_mask: Tensor | None = None


class _InjectL1(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x1: Tensor, context: PenaltyContext, layer: int, tokens: Tensor | None, visits: int) -> Tensor:
        ctx.save_for_backward(x1)
        ctx.context, ctx.layer, ctx.visits = context, layer, visits
        ctx.mask = row_mask(context.token_mask, x1, tokens)
        return x1.view_as(x1)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (gradient,), (x1,), context = gradients, ctx.saved_tensors, ctx.context
        counted, elements = x1, torch.tensor(x1.numel(), dtype=torch.float64)
        if ctx.mask is not None:
            counted = x1 * ctx.mask.unsqueeze(-1)
            elements = ctx.mask.sum() * x1.shape[-1]
        sign = counted.sign()
        tally(context.statistics[ctx.layer], counted, sign, elements)
        scale = (context.scale / (x1.shape[-1] * ctx.visits)).to(gradient.dtype)
        return torch.addcmul(gradient, scale, sign.to(gradient.dtype)), None, None, None, None


def row_mask(token_mask: Tensor | None, x1: Tensor, tokens: Tensor | None = None) -> Tensor | None:
    """token_mask ([batch, context] or None) by row of x1 ([..., neurons]); tokens: of each row, else all in order."""
    if token_mask is None:
        return None
    return token_mask.reshape(x1.shape[:-1]) if tokens is None else token_mask.flatten()[tokens]


def tally(row: Tensor, x1: Tensor, sign: Tensor, elements: Tensor) -> None:
    """Add Σ|x1|, non-zeros and elements to one layer's statistics, [3]."""
    for column, values in ((MAGNITUDE, x1), (NONZERO, sign)):
        row[column] += sum_abs(values).sum(dtype=torch.float64)
    row[COUNT] += elements


def sum_abs(values: Tensor) -> Tensor:
    """Σ|values| by token, [...] of [..., neurons], at least in fp32."""
    return values.abs().sum(-1, dtype=torch.promote_types(values.dtype, torch.float32))


def tally_kept(row: Tensor, x1: Tensor, token_mask: Tensor | None, tokens: Tensor | None = None) -> None:
    """`tally` of x1 [..., neurons] without padding; arguments as of `row_mask`."""
    kept = row_mask(token_mask, x1, tokens)
    flat = x1.flatten(0, -2) if kept is None else x1[kept]
    tally(row, flat, flat.sign(), torch.tensor(flat.numel(), dtype=torch.float64))


def inject_l1(x1: Tensor, context: PenaltyContext, layer: int, tokens: Tensor | None = None, visits: int = 1) -> Tensor:
    """Return x1 ([..., neurons]; with a token mask batch x context rows, in that order) unchanged.

    In backward, and only there, add context.scale / neurons · sign(x1) to its gradient and this layer's row to
    context.statistics. Backward runs once per layer and micro-batch whatever the activation checkpointing, forward does
    not; so gradient and counts are the same with none, non-reentrant and reentrant checkpointing.

    Of experts x1 has a row for each routed (token, expert) pair, [tokens x visits, neurons]: `tokens` is the token of
    each row, `visits` the experts that a token visits. mean |x1| is then that over these pairs and their neurons.
    """
    return _InjectL1.apply(x1, context, layer, tokens, visits)


def new_statistics(layers: int, device: torch.device | str = "cpu") -> Tensor:
    """Zeroed statistics: fp64 [layers, 3]."""
    return torch.zeros(layers, 3, dtype=torch.float64, device=device)


def sparsity_by_layer(statistics: Tensor) -> list[float]:
    """Share of exact zeros by layer, from summed statistics [layers, 3]."""
    return (1 - statistics[:, NONZERO] / statistics[:, COUNT]).tolist()


def mean_abs_by_layer(statistics: Tensor) -> list[float]:
    """mean |x1| by layer, from summed statistics [layers, 3]."""
    return (statistics[:, MAGNITUDE] / statistics[:, COUNT]).tolist()
