"""The sparse FFN, the FFNs of a model, and the substitution of their activation.

In: a transformers model. Out: the same model with every gated FFN replaced by a `SparseFFN` around the same weights.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from prosparse.activations import INTERMEDIATES, intermediate
from prosparse.penalty import PenaltyContext, inject_l1

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class SparseFFN(nn.Module):
    """down_proj(x1) with x1 = intermediate(gate_proj(h), up_proj(h)); h: [..., hidden], x1: [..., neurons].

    Holds the base model's own projections under their own names, so that a state dict does not change. `penalty` is an
    identity on x1 that a trainer sets before each micro-batch: it adds the L1 gradient in backward. None: no penalty.
    """

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, activation: str, param: float):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.activation, self.param = activation, param
        self.penalty: Callable[[Tensor], Tensor] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        x1 = intermediate(self.activation, self.param, self.gate_proj(hidden), self.up_proj(hidden))
        if self.penalty is not None:
            x1 = self.penalty(x1)
        return self.down_proj(x1)


@dataclass(frozen=True)
class Substitution:
    """What `substitute` did: the layers changed and the activations before and after, with their parameters."""

    layers: int
    replaced: str
    replaced_param: float
    activation: str
    param: float


def find_ffns(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The gated FFN of every decoder layer, by module name in layer order.

    Known form: a module whose children are gate_proj, up_proj, down_proj and at most one parameter-free activation.
    Raises ValueError that names the module types seen if no layer, or not every layer, has such an FFN.
    """
    found = {name: module for name, module in model.named_modules() if _is_gated(module)}
    layers = model.config.get_text_config().num_hidden_layers
    if len(found) == layers:
        return found
    stack = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers), None)
    missing = Counter(
        type(child).__name__
        for layer in (stack if stack is not None else [model])
        if not any(_is_gated(module) for module in layer.modules())
        for child in layer.children()
    )
    raise ValueError(
        f"{type(model).__name__}: {len(found)} of {layers} layers have an FFN that prosparse knows (gate_proj, "
        f"up_proj, down_proj); the others are made of {', '.join(sorted(missing))}: choose a model of the Llama, "
        "Mistral or Qwen kind"
    )


def sparse_ffns(model: nn.Module) -> list[SparseFFN]:
    """The SparseFFNs of a model in layer order."""
    return [module for module in model.modules() if isinstance(module, SparseFFN)]


def activation_of(model: PreTrainedModel) -> tuple[str, float]:
    """(activation, parameter) that the gated FFNs of `model` compute; raises ValueError if it is none that we know."""
    ffn = next(iter(find_ffns(model).values()))
    if isinstance(ffn, SparseFFN):
        return ffn.activation, ffn.param
    config = model.config.get_text_config()
    name = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if name not in INTERMEDIATES:
        raise ValueError(f"the model's hidden_act is {name}: prosparse knows {', '.join(INTERMEDIATES)}")
    return name, 0.0


def round_bf16(threshold: float) -> float:
    """The nearest bf16 number: what every runtime compares with."""
    return torch.tensor(threshold, dtype=torch.bfloat16).item()


def substitute(model: PreTrainedModel, activation: str, param: float = 0.0) -> Substitution:
    """Give every gated FFN of `model` the activation `activation` (a key of activations.INTERMEDIATES), in place.

    `param` is the threshold of fatrelu and drelu (rounded to bf16) or the offset of shifted_relu. Weights and their
    names stay. The
    model's config is told (hidden_act, hidden_act_param), so that no saved folder silently claims the old activation.
    Raises ValueError for an unknown activation or a model with unknown FFNs; the model is then unchanged.
    """
    if activation not in INTERMEDIATES:
        raise ValueError(f"activation is {activation}: choose one of {', '.join(INTERMEDIATES)}")
    if activation in ("fatrelu", "drelu"):
        param = round_bf16(param)
    ffns = find_ffns(model)
    config = model.config.get_text_config()
    replaced, replaced_param = activation_of(model)
    for name, module in ffns.items():
        if isinstance(module, SparseFFN):
            module.activation, module.param = activation, param
        else:
            parent, _, child = name.rpartition(".")
            gate_proj, up_proj, down_proj = (module.get_submodule(projection) for projection in PROJECTIONS)
            ffn = SparseFFN(gate_proj, up_proj, down_proj, activation, param)
            setattr(model.get_submodule(parent), child, ffn.train(module.training))
    for key in ("hidden_act", "hidden_activation"):
        if hasattr(config, key):
            setattr(config, key, activation)
    config.hidden_act_param = param
    return Substitution(len(ffns), replaced, replaced_param, activation, param)


def set_penalty(model: nn.Module, context: PenaltyContext | None) -> None:
    """Hand every SparseFFN the context of the micro-batches to come, as layer 0, 1, ...; None takes it away."""
    for layer, ffn in enumerate(sparse_ffns(model)):
        ffn.penalty = None if context is None else partial(inject_l1, context=context, layer=layer)


def _is_gated(module: nn.Module) -> bool:
    children = dict(module.named_children())
    projections = [children.pop(name, None) for name in PROJECTIONS]
    if any(projection is None for projection in projections) or list(module.parameters(recurse=False)):
        return False
    return len(children) <= 1 and all(not list(child.parameters()) for child in children.values())
