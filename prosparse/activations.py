"""The activations of a gated FFN as plain functions, and their names in a config.json.

In: gate and up, [..., neurons]. Out: the intermediate x1, [..., neurons], which enters down_proj.
Only torch is imported and nothing of prosparse: an exported modelling file carries this module's text.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def silu(gate: Tensor, up: Tensor, threshold: float) -> Tensor:
    return F.silu(gate) * up


def gelu(gate: Tensor, up: Tensor, threshold: float) -> Tensor:
    return F.gelu(gate) * up


def gelu_tanh(gate: Tensor, up: Tensor, threshold: float) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def relu(gate: Tensor, up: Tensor, threshold: float) -> Tensor:
    return F.relu(gate) * up


def fatrelu(gate: Tensor, up: Tensor, threshold: float) -> Tensor:
    """Keep the gate where gate >= threshold, else 0 (arXiv 2402.13516, section 3.4)."""
    return torch.where(gate >= threshold, gate, 0.0) * up


def drelu(gate: Tensor, up: Tensor, threshold: float) -> Tensor:
    """ReLU on both branches (arXiv 2406.05955); a threshold cuts the gate only."""
    kept = torch.where(gate >= threshold, gate, 0.0) if threshold > 0 else F.relu(gate)
    return kept * F.relu(up)


def shifted_relu(gate: Tensor, up: Tensor, threshold: float) -> Tensor:
    """ReLU of the gate less an offset (arXiv 2310.04564)."""
    return F.relu(gate - threshold) * up


def relu2(gate: Tensor, up: Tensor, threshold: float) -> Tensor:
    return F.relu(gate).square() * up


# The names are those of `hidden_act` in a config.json; `hidden_act_param` there is the threshold (of shifted_relu: the
# offset). The gelu names are what some bases have before substitution.
INTERMEDIATES = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": relu,
    "fatrelu": fatrelu,
    "drelu": drelu,
    "shifted_relu": shifted_relu,
    "relu2": relu2,
}


def intermediate(name: str, param: float, gate: Tensor, up: Tensor) -> Tensor:
    """x1 of a gated FFN: [..., neurons], in the dtype of `gate`.

    `name` is a key of INTERMEDIATES, `param` the threshold of fatrelu and drelu or the offset of shifted_relu (else
    unused). Raises KeyError for another name.
    """
    return INTERMEDIATES[name](gate, up, param)
