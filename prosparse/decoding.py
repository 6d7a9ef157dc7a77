"""Sparse decoding: the FFNs of a model compute only the neurons whose gate passes, for a few tokens at a time.

In: a transformers model with relu, fatrelu or drelu. Out: the same model, whose layers leave the zeros out.
Prefill, training and layers that are not sparse enough are computed as before.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from prosparse.config import Implementation
from prosparse.ffn import FusedFFN, SeparateFFN, SparseFFN, activation_of, find_ffns, put_sparse_ffns, sparse_ffns
from prosparse.kernels.decode import MOST_TOKENS, SPARSE, choose, dense, sparse_down, sparse_up

# The share of neurons that no token needs, from which a layer is faster than dense: docs/decoding.md. cpp's is that of
# eight tokens (one and four are faster from 0 on), eager's that of one on a CPU; triton's is a guess, not measured.
BREAK_EVEN = {Implementation.cpp: 0.4, Implementation.eager: 0.75, Implementation.triton: 0.3}
TRIED = 16  # decoded steps after which a layer compares its own sparsity with the break-even, once


@dataclass
class LayerDecoding:
    """What a layer decodes with, and what it has seen.

    base: what the SparseFFN took the place of, or None. fired: 0-d, sum over `steps` of the share of neurons that fire
    for any token of the step. on: whether the sparse path is taken.
    """

    implementation: Implementation
    break_even: float
    base: nn.Module | None
    fired: Tensor
    steps: int = 0
    on: bool = True


def enable_sparse_decoding(
    model: PreTrainedModel, implementation: Implementation | str = "auto", break_even: float | None = None
) -> Implementation:
    """Let every FFN of `model` compute only the neurons whose gate passes; gives the implementation that it does it by.

    Taken for up to MOST_TOKENS tokens together, without gradients; everything else is computed as before. `auto` is
    triton on a GPU, cpp on a CPU with a compiler, else eager, which is told on stderr. A layer whose sparsity over its
    first TRIED decoded steps is below `break_even` (a share of neurons; None: BREAK_EVEN of the implementation) is
    dense from then on. The weights of the down projections are laid out in memory by neuron; their shapes and names
    stay. Calling it again starts anew. Raises ValueError, and changes nothing, for a model with another activation or
    with FFNs that are ungated, experts, quantized, or have hooks where they would be passed by.
    """
    disable_sparse_decoding(model)
    found = find_ffns(model)
    activation, param = activation_of(model)
    if activation not in SPARSE:
        raise ValueError(
            f"the activation is {activation}, which leaves no zeros: substitute one of {', '.join(SPARSE)}"
        )
    forms = [type(module) for module in found.values() if isinstance(module, SparseFFN)]
    device = next(model.parameters()).device
    chosen = choose(Implementation(implementation), device)
    least = BREAK_EVEN[chosen] if break_even is None else break_even
    if not 0 <= least <= 1:
        raise ValueError(f"break_even is {least}: give a share of neurons, 0 to 1")
    if not forms:
        put_sparse_ffns(model, activation, param)
    ffns = {name: model.get_submodule(name) for name in found}
    try:
        for name, ffn in ffns.items():
            _require_plain(name, ffn)
    except ValueError:
        if not forms:
            _put_back(model, found)
        raise
    for name, ffn in ffns.items():
        base = None if forms else found[name]
        ffn.decoding = LayerDecoding(chosen, least, base, torch.zeros((), device=device))  # type: ignore[assignment]
        down: Any = ffn.down_proj
        down.weight.data = down.weight.data.t().contiguous().t()
        ffn.forward, down.forward = partial(_forward, ffn), partial(_down, down, chosen)
    return chosen


def disable_sparse_decoding(model: PreTrainedModel) -> None:
    """Undo `enable_sparse_decoding`; of a model that does not decode sparsely: nothing."""
    bases = {}
    for name, ffn in list(model.named_modules()):
        if isinstance(ffn, SparseFFN) and (decoding := vars(ffn).pop("decoding", None)) is not None:
            if decoding.on:
                _make_dense(ffn)
            if decoding.base is not None:
                bases[name] = decoding.base
    _put_back(model, bases)


def sparse_layers(model: PreTrainedModel) -> list[bool]:
    """By layer whether it decodes sparsely: enabled, and not found below the break-even."""
    return [(decoding := vars(ffn).get("decoding")) is not None and decoding.on for ffn in sparse_ffns(model)]


def _make_dense(ffn: Any) -> None:
    del ffn.forward, ffn.down_proj.forward
    ffn.down_proj.weight.data = ffn.down_proj.weight.data.contiguous()


def _put_back(model: PreTrainedModel, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def _require_plain(name: str, ffn: nn.Module) -> None:
    """Raise ValueError unless `ffn` is of a form, and of linear layers, that the operators compute."""
    if not isinstance(ffn, SeparateFFN | FusedFFN):
        raise ValueError(
            f"{name} is a {type(ffn).__name__}: sparse decoding needs FFNs with gate and up projections (no experts)"
        )
    for projection in ffn.projections:
        linear = getattr(ffn, projection)
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"{name}.{projection} is a {type(linear).__name__}, not a plain linear layer: load the model without "
                "quantization, merge its adapters"
            )
        if linear.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name}.{projection} is in {linear.weight.dtype}: load the model in fp32, bf16 or fp16")
        hooked = linear._forward_hooks or linear._forward_pre_hooks
        if "forward" in vars(linear) or "forward" in vars(ffn) or (hooked and projection != "down_proj"):
            raise ValueError(
                f"{name}.{projection} has hooks, which sparse decoding would pass by: load the model on one device, "
                "and remove hooks first"
            )


def _forward(ffn: Any, hidden: Tensor) -> Tensor:
    """`forward` of a layer that decodes sparsely; hidden: [..., hidden]."""
    decoding: LayerDecoding = ffn.decoding
    if not _few(hidden):
        return type(ffn).forward(ffn, hidden)
    tokens = hidden.flatten(0, -2)
    gate_weight, up_weight, gate_bias, up_bias = gate_and_up(ffn)
    gate = dense(tokens, gate_weight, gate_bias, decoding.implementation)
    activation = (ffn.activation, ffn.param)
    x1 = sparse_up(gate, tokens, up_weight, *activation, bias=up_bias, implementation=decoding.implementation)
    below = decoding.steps < TRIED and decoding.break_even > 0 and _below(decoding, x1)
    x1 = x1.unflatten(0, hidden.shape[:-1])
    out = ffn.down_proj(x1 if ffn.penalty is None else ffn.penalty(x1))
    if below:
        decoding.on = False
        _make_dense(ffn)
    return out


def _down(linear: Any, implementation: Implementation, x1: Tensor) -> Tensor:
    """`forward` of a down projection whose weight lies by neuron; x1: [..., neurons]. Its hooks run around it."""
    if not _few(x1):
        slow = x1.dtype is torch.float16 and x1.device.type == "cpu"  # for torch, by 100 times, where a weight lies so
        return F.linear(x1, linear.weight.contiguous() if slow else linear.weight, linear.bias)
    out = sparse_down(x1.flatten(0, -2), linear.weight.t(), linear.bias, implementation)
    return out.unflatten(0, x1.shape[:-1])


def _few(rows: Tensor) -> bool:
    wanted = torch.is_grad_enabled() or torch.is_autocast_enabled(rows.device.type)
    return 0 < rows.shape[:-1].numel() <= MOST_TOKENS and not wanted


def gate_and_up(ffn: Any) -> tuple:
    """The weights and the biases (or None) of gate and up."""
    if isinstance(ffn, SeparateFFN):
        return ffn.gate_proj.weight, ffn.up_proj.weight, ffn.gate_proj.bias, ffn.up_proj.bias
    both = ffn.gate_up_proj
    return *both.weight.chunk(2), *((None, None) if both.bias is None else both.bias.chunk(2))


def _below(decoding: LayerDecoding, x1: Tensor) -> bool:
    """Count what fires; after TRIED steps, and then only, the host waits for the count: was it too much?"""
    decoding.fired += (x1 != 0).any(0).float().mean()
    decoding.steps += 1
    return decoding.steps == TRIED and 1 - decoding.fired.item() / TRIED < decoding.break_even
