"""The sparse FFN, the FFNs of a model, and the substitution of their activation.

In: a transformers model. Out: the same model with every gated FFN replaced by a `SparseFFN` around the same weights.
"""

from dataclasses import dataclass

import torch.nn as nn
from torch import Tensor

from prosparse.activations import INTERMEDIATES, intermediate
from prosparse.penalty import PenaltyContext, inject_l1


class SparseFFN(nn.Module):
    """down_proj(x1) with x1 = intermediate(gate_proj(h), up_proj(h)); h: [..., hidden], x1: [..., neurons].

    Holds the base model's own projections under their own names, so that a state dict does not change.
    `context` is what the trainer hands over before a micro-batch: None (no penalty, no statistics) or a PenaltyContext.
    """

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, activation: str, param: float):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.activation, self.param = activation, param
        self.layer = 0
        self.context: PenaltyContext | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        x1 = intermediate(self.activation, self.param, self.gate_proj(hidden), self.up_proj(hidden))
        if self.context is not None:
            x1 = inject_l1(x1, self.context, self.layer)
        return self.down_proj(x1)
