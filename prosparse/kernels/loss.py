"""The language loss of a window's micro-batch without a tensor of the logits' size in fp32.

In: logits in the model's dtype, labels. Out: the summed cross-entropy, and its gradient in the place of the logits.
"""

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**28}  # fp32 probabilities held at a time: a CPU's share of its cache
# Nodes that do not keep the logits, their output, for backward; identities of hooks lie between. Whatever
# does keep them is told apart by torch's own version counter, which then refuses to go on.
GIVES_AWAY = (
    "UnsafeViewBackward0",
    "ViewBackward0",
    "MmBackward0",
    "AddmmBackward0",
    "LinearFunctionForZeroStage3Backward",
)
IDENTITIES = (
    "PreBackwardFunctionForModuleBackward",  # ZeRO-3's
    "PostBackwardFunctionModuleBackward",
    "BackwardHookFunctionBackward",  # of a module's full backward hooks
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, overwrite: bool) -> Tensor:
        gradient = logits if overwrite else torch.empty_like(logits)
        total = torch.zeros((), device=logits.device)
        size = max(1, CHUNK_BYTES[logits.device.type] // (4 * logits.shape[-1]))
        for part, label, out in zip(logits.split(size), labels.split(size), gradient.split(size), strict=True):
            kept = (label != -100).unsqueeze(1)
            label = label.unsqueeze(1).clamp_min(0)
            share = part.softmax(-1, dtype=torch.float32)
            largest, at = part.max(-1, keepdim=True)
            normalizer = largest.float() - share.gather(1, at).log()  # log Σ exp, which the softmax has computed
            total += torch.where(kept, normalizer - part.gather(1, label).float(), 0.0).sum()
            share.scatter_add_(1, label, torch.full_like(normalizer, -1.0))
            out.copy_(share.mul_(kept))
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        gradient, ctx.gradient = ctx.gradient, None  # which the graph would keep for as long as its output lives
        return gradient.mul_(gradients[0]), None, None


def summed_cross_entropy(logits: Tensor, labels: Tensor, keep_logits: bool = False) -> Tensor:
    """Summed cross-entropy, fp32 0-d: each position of `logits` [batch, context, vocabulary] predicts its own label.

    As `sparsity.language_loss`; -100 is not counted. Backward runs once. Where the logits come straight from a
    projection, and unless `keep_logits`, their memory holds the gradient afterwards.
    """
    node = logits.grad_fn
    while type(node).__name__ in IDENTITIES:
        node = node.next_functions[0][0]  # type: ignore[union-attr]
    overwrite = not keep_logits and type(node).__name__ in GIVES_AWAY
    return _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten(), overwrite)
