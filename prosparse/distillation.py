"""Distillation: the KL divergence to a frozen teacher, without the teacher's logits in memory.

In: a student's logits, the teacher's hidden states (what its output head takes) and that head's weights.
Out: the summed divergence, its gradient written in the same pass; for a teacher that does not fit, ValueError.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prosparse.preparation import tokenizer_digest

CHUNK = 256  # positions whose whole vocabulary is held in fp32 at a time


@dataclass
class Teacher:
    """A frozen model (or DeepSpeed's engine around it) whose output head is taken off, and that head."""

    model: Any
    head: nn.Linear

    @torch.no_grad()
    def hidden(self, **inputs: Tensor) -> Tensor:
        """What the head takes: [batch, context, hidden]."""
        return self.model(**inputs, use_cache=False).logits


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, t: float):
        total = torch.zeros((), device=logits.device)
        ctx.gradient = torch.zeros_like(logits)
        for chunk in kept.split(CHUNK):
            student = logits[chunk].float().div_(t).log_softmax(-1)
            teacher = F.linear(hidden[chunk], weight, bias).float().div_(t).log_softmax(-1)
            share = teacher.exp()
            total += teacher.sub_(student).mul_(share).sum()
            ctx.gradient[chunk] = student.exp_().sub_(share).div_(t).to(logits.dtype)
        return total

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        gradient, ctx.gradient = ctx.gradient, None  # which the graph would keep for as long as its output lives
        return gradient.mul_(gradients[0]), None, None, None, None, None


def divergence(
    logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperature: float
) -> Tensor:
    """Summed KL(teacher ‖ student) at `temperature` over the positions that `language_loss` counts, fp32 0-d.

    logits [batch, context, vocabulary] are the student's, hidden [batch, context, hidden] goes into the teacher's head
    (weight, bias). Chunks of positions with the whole vocabulary need one pass for value and gradient, where chunks of
    the vocabulary would need a first one for the normalizers. Beside a few [CHUNK, vocabulary] tensors in fp32 it holds
    one of the logits' size and dtype, the gradient; so backward runs once.
    """
    kept = (labels.flatten() != -100).nonzero().squeeze(1)
    return _Divergence.apply(logits.flatten(0, 1), hidden.flatten(0, 1), weight, bias, kept, temperature)


def freeze(model: PreTrainedModel) -> nn.Linear:
    """The output head of a model that will only teach."""
    model.eval().requires_grad_(False)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"teacher: {type(model).__name__} has no linear output head: choose another teacher")
    return head


def take_head(model: PreTrainedModel) -> None:
    """Let the model return as logits what its output head took."""
    model.set_output_embeddings(nn.Identity())


def check_head(teacher: Teacher, logits: Tensor, input_ids: Tensor) -> None:
    """ValueError unless the teacher's head, which has to be whole, gives `logits`, those of the whole teacher."""
    again = F.linear(teacher.hidden(input_ids=input_ids), teacher.head.weight, teacher.head.bias).float()
    if not (again - logits.float()).norm() <= 1e-2 * logits.float().norm():
        raise ValueError(
            "teacher: its logits are not what its output head gives (a scale or a soft cap comes after it), which "
            "distillation does not know: choose another teacher or set recipe.stages.*.distillation.weight=0"
        )


def check_vocabulary(
    names: tuple[str, str],
    configs: tuple[PreTrainedConfig, PreTrainedConfig],
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
) -> None:
    """ValueError unless both models, the teacher first, name the same tokens by the same numbers."""
    sizes = [config.get_text_config().vocab_size for config in configs]
    remedy = "choose a teacher with the model's vocabulary and tokenizer, or null for the model itself"
    if sizes[0] != sizes[1]:
        raise ValueError(f"teacher={names[0]} has {sizes[0]} tokens, but {names[1]} has {sizes[1]}: {remedy}")
    if tokenizer_digest(tokenizers[0]) != tokenizer_digest(tokenizers[1]):
        raise ValueError(f"teacher={names[0]} has another tokenizer than {names[1]}: {remedy}")
