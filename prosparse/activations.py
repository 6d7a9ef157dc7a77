"""The activations of an FFN as plain functions, and their names in a config.json.

In: gate and, where the FFN is gated, up: [..., neurons]. Out: the intermediate x1, [..., neurons], which enters the
down projection. Only torch is imported and nothing of prosparse: an exported modeling file carries this module's text.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def silu(gate: Tensor, threshold: float) -> Tensor:
    return F.silu(gate)


def gelu(gate: Tensor, threshold: float) -> Tensor:
    return F.gelu(gate)


def gelu_tanh(gate: Tensor, threshold: float) -> Tensor:
    return F.gelu(gate, approximate="tanh")


def relu(gate: Tensor, threshold: float) -> Tensor:
    return F.relu(gate)


def fatrelu(gate: Tensor, threshold: float) -> Tensor:
    """Keep the gate where gate >= threshold, else 0 (arXiv 2402.13516, section 3.4)."""
    return torch.where(gate >= threshold, gate, 0.0)


def drelu(gate: Tensor, threshold: float) -> Tensor:
    """The gate's part of ReLU on both branches (arXiv 2406.05955); a threshold cuts the gate only."""
    return torch.where(gate >= threshold, gate, 0.0) if threshold > 0 else F.relu(gate)


def shifted_relu(gate: Tensor, threshold: float) -> Tensor:
    """ReLU of the gate less an offset (arXiv 2310.04564)."""
    return F.relu(gate - threshold)


def relu2(gate: Tensor, threshold: float) -> Tensor:
    return F.relu(gate).square()


# The names are those of `hidden_act` in a config.json; `hidden_act_param` there is the threshold (of shifted_relu: the
# offset). The gelu names are what some bases have before substitution.
ACTIVATIONS = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": relu,
    "fatrelu": fatrelu,
    "drelu": drelu,
    "shifted_relu": shifted_relu,
    "relu2": relu2,
}


def intermediate(name: str, param: float, gate: Tensor, up: Tensor | None = None) -> Tensor:
    """x1 of an FFN: act(gate) * up, or act(gate) where there is no up; [..., neurons], in the dtype of `gate`.

    `name` is a key of ACTIVATIONS, `param` the threshold of fatrelu and drelu or the offset of shifted_relu (else
    unused). Raises KeyError for another name.
    """
    kept = ACTIVATIONS[name](gate, param)
    if up is None:
        return kept
    return kept * (F.relu(up) if name == "drelu" else up)
