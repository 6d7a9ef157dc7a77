"""The sparse FFN in its forms, the FFNs of a model, and the substitution of their activation.

In: a transformers model. Out: the same model with a `SparseFFN` around the weights of every FFN.
An exported modeling file carries the text of what stands above `Substitution`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from prosparse.activations import ACTIVATIONS, intermediate
from prosparse.kernels import glu
from prosparse.penalty import PenaltyContext, inject_l1

ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation")  # in a config, by family
DOWN_NAMES = ("down_proj", "fc2", "dense_4h_to_h")
NEURON_KEYS = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "ffn_hidden_size")


class SparseFFN(nn.Module):
    """The intermediate x1 of one layer, [..., neurons], and around it, by form, the base model's own projections.

    They keep their names, so that a state dict does not change. `penalty` is an identity on x1 that a trainer sets
    before each micro-batch: it adds the L1 gradient in backward. None: no penalty. `fused`, from a trainer too, gives
    x1 and its penalty in one from gate and up.
    """

    projections: tuple[str, ...] = ()

    def __init__(self, base: nn.Module, activation: str, param: float):
        super().__init__()
        for name in self.projections:
            setattr(self, name, getattr(base, name))
        self.activation, self.param = activation, param
        self.penalty: Callable[..., Tensor] | None = None
        self.fused: Callable[..., Tensor] | None = None

    @classmethod
    def place(cls, module: nn.Module) -> str | None:
        """Which child of `module` this form takes the place of: "" is the module itself, None that it is none."""
        children = dict(module.named_children())
        if any(children.pop(name, None) is None for name in cls.projections) or list(module.parameters(recurse=False)):
            return None
        return "" if len(children) <= 1 and not any(list(child.parameters()) for child in children.values()) else None

    def intermediate(self, gate: Tensor, up: Tensor | None = None, **routing) -> Tensor:
        if self.fused is not None and up is not None:
            return self.fused(gate, up, self.activation, self.param, **routing)
        x1 = intermediate(self.activation, self.param, gate, up)
        return x1 if self.penalty is None else self.penalty(x1, **routing)


class SeparateFFN(SparseFFN):
    """down_proj(x1) with gate_proj(h) and up_proj(h); h: [..., hidden]."""

    projections = ("gate_proj", "up_proj", "down_proj")
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.intermediate(self.gate_proj(hidden), self.up_proj(hidden)))


class FusedFFN(SparseFFN):
    """down_proj(x1) with gate and up as the halves of gate_up_proj(h); h: [..., hidden]."""

    projections = ("gate_up_proj", "down_proj")
    gate_up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.intermediate(*self.gate_up_proj(hidden).chunk(2, dim=-1)))


class UngatedFFN(SparseFFN):
    """x1 = act(z), in the place of the activation between an FFN's two projections; z: [..., neurons]."""

    @classmethod
    def place(cls, module: nn.Module) -> str | None:
        children = dict(module.named_children())
        for into, activation, out_of in (("fc1", "activation_fn", "fc2"), ("dense_h_to_4h", "act", "dense_4h_to_h")):
            if {into, activation, out_of} <= set(children) and not list(children[activation].parameters()):
                return activation
        return None

    def forward(self, z: Tensor) -> Tensor:
        return self.intermediate(z)


class ExpertsFFN(SparseFFN):
    """The routed experts of a layer: gate_up_proj [experts, 2 x neurons, hidden], down_proj [experts, hidden, neurons].

    x1 has a row for each (token, expert) pair of the routing, [tokens x visits, neurons], sorted by expert.
    """

    projections = ("gate_up_proj", "down_proj")
    gate_up_proj: Tensor
    down_proj: Tensor

    @classmethod
    def place(cls, module: nn.Module) -> str | None:
        dimensions = {name: len(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
        plain = getattr(module, "is_transposed", True) is False and getattr(module, "is_concatenated", False)
        return "" if plain and dimensions == dict.fromkeys(cls.projections, 3) else None

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden: [tokens, hidden]; top_k_index, the experts of each token, and top_k_weights: [tokens, visits]."""
        order = (experts := top_k_index.flatten()).argsort(stable=True)
        numbers = torch.arange(len(self.down_proj), device=experts.device)  # bincount would wait for a GPU
        ends = torch.searchsorted(experts[order], numbers, right=True, out_int32=True)
        tokens, visits = order // top_k_index.shape[-1], top_k_index.shape[-1]
        gate, up = by_expert(hidden[tokens], self.gate_up_proj, ends).chunk(2, dim=-1)
        x1 = self.intermediate(gate, up, tokens=tokens, visits=visits)
        weighted = by_expert(x1, self.down_proj, ends) * top_k_weights.flatten()[order, None]
        return weighted[order.argsort()].unflatten(0, (-1, visits)).sum(1).to(hidden.dtype)


def by_expert(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """rows @ weights[expert].T, [rows, out]; rows: [rows, in] sorted by expert, ends: where each expert's rows end."""
    if rows.is_cuda and hasattr(F, "grouped_mm") and torch.cuda.get_device_capability(rows.device) >= (8, 0):
        return F.grouped_mm(rows, weights.transpose(-2, -1), offs=ends)
    parts = rows.tensor_split(ends[:-1].tolist())
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weights, strict=True)])


FORMS: tuple[type[SparseFFN], ...] = (SeparateFFN, FusedFFN, UngatedFFN, ExpertsFFN)


def ffn_forms(model: nn.Module) -> dict[str, type[SparseFFN]]:
    """The form of every known FFN, by the name of the module that a SparseFFN is or replaces, in layer order."""
    found: dict[str, type[SparseFFN]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SparseFFN):
            found[name] = type(module)
            continue
        for form in FORMS:
            place = form.place(module)
            if place is not None:
                found[f"{name}.{place}".strip(".")] = form
    return found


def put_sparse_ffns(model: nn.Module, activation: str, param: float) -> None:
    """Put a SparseFFN into the place of every FFN that is known; the weights and their names stay."""
    for name, form in ffn_forms(model).items():
        module = model.get_submodule(name)
        if isinstance(module, SparseFFN):
            module.activation, module.param = activation, param
        else:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, form(module, activation, param).train(module.training))


def activation_key(config: PreTrainedConfig) -> str:
    """The name under which a config of this family keeps its activation; hidden_act if it has none of them."""
    return next((key for key in ACTIVATION_KEYS if getattr(config, key, None) is not None), "hidden_act")


@dataclass(frozen=True)
class Substitution:
    """What `substitute` did: the layers changed and the activations before and after, with their parameters."""

    layers: int
    replaced: str
    replaced_param: float
    activation: str
    param: float


def find_ffns(model: PreTrainedModel) -> dict[str, nn.Module]:
    """What a SparseFFN is or replaces in every decoder layer, by module name in layer order.

    Known forms: separate (gate_proj, up_proj, down_proj) and fused (gate_up_proj, down_proj), each with at most one
    parameter-free activation beside them, ungated (fc1, activation_fn, fc2 or dense_h_to_4h, act, dense_4h_to_h), and
    experts (3-D gate_up_proj and down_proj, gate before up, without biases).
    Raises ValueError that names the module types seen if no layer, or not every layer, has such an FFN.
    """
    found = {name: model.get_submodule(name) for name in ffn_forms(model)}
    layers = model.config.get_text_config().num_hidden_layers
    if len(found) == layers:
        return found
    stack = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers), None)
    missing = Counter(
        type(child).__name__
        for layer in (stack if stack is not None else [model])
        if not ffn_forms(layer)
        for child in layer.children()
    )
    raise ValueError(
        f"{type(model).__name__}: {len(found)} of {layers} layers have an FFN that prosparse knows "
        "(gate_proj, up_proj, down_proj; gate_up_proj, down_proj, also of experts; fc1, fc2; dense_h_to_4h, "
        f"dense_4h_to_h); the others are made of {', '.join(sorted(missing))}: choose a model of a family in "
        "docs/models.md"
    )


def sparse_ffns(model: nn.Module) -> list[SparseFFN]:
    """The SparseFFNs of a model in layer order."""
    return [module for module in model.modules() if isinstance(module, SparseFFN)]


def down_weights(model: PreTrainedModel) -> list[Tensor]:
    """By layer the weight that the intermediate enters, [hidden, neurons]; ValueError for experts."""
    weights = []
    for name, module in find_ffns(model).items():
        if ffn_forms(model)[name] is ExpertsFFN:
            raise ValueError(f"{type(model).__name__}: the neurons of experts are not told apart")
        owner = model.get_submodule(name.rpartition(".")[0]) if ffn_forms(model)[name] is UngatedFFN else module
        down = next(child for key in DOWN_NAMES if (child := getattr(owner, key, None)) is not None)
        weights.append(down.weight)
    return weights


def neurons(config: PreTrainedConfig) -> int:
    """The neurons that a token visits in one layer: those of the FFN, or of its experts together.

    Of a model with dense layers among its experts: in a layer with experts.
    """
    text = config.get_text_config()
    visits = getattr(text, "num_experts_per_tok", None) or 1
    return visits * next(size for key in NEURON_KEYS if (size := getattr(text, key, None)) is not None)


def activation_of(model: PreTrainedModel) -> tuple[str, float]:
    """(activation, parameter) that the FFNs of `model` compute; raises ValueError if it is none that we know."""
    ffn = next(iter(find_ffns(model).values()))
    if isinstance(ffn, SparseFFN):
        return ffn.activation, ffn.param
    config = model.config.get_text_config()
    key = activation_key(config)
    name = getattr(config, key, None)
    if name not in ACTIVATIONS:
        raise ValueError(f"the model's {key} is {name}: prosparse knows {', '.join(ACTIVATIONS)}")
    return name, 0.0


def round_bf16(threshold: float) -> float:
    """The nearest bf16 number: what every runtime compares with."""
    return torch.tensor(threshold, dtype=torch.bfloat16).item()


def substitute(model: PreTrainedModel, activation: str, param: float = 0.0) -> Substitution:
    """Give every FFN of `model` the activation `activation` (a key of activations.ACTIVATIONS), in place.

    `param` is the threshold of fatrelu and drelu (rounded to bf16) or the offset of shifted_relu. Weights and their
    names stay. The model's config is told (hidden_act or what its family calls it, hidden_act_param), so that no saved
    folder silently claims the old activation.
    Raises ValueError for an unknown activation, one that the FFNs cannot have, or a model with unknown FFNs; the model
    is then unchanged.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation}: choose one of {', '.join(ACTIVATIONS)}")
    if activation in ("fatrelu", "drelu"):
        param = round_bf16(param)
    layers = len(find_ffns(model))
    if activation == "drelu" and UngatedFFN in ffn_forms(model).values():
        raise ValueError(f"drelu needs an up projection, and {type(model).__name__} has none: choose relu or fatrelu")
    config = model.config.get_text_config()
    replaced, replaced_param = activation_of(model)
    put_sparse_ffns(model, activation, param)
    for key in ACTIVATION_KEYS:
        if hasattr(config, key):
            setattr(config, key, activation)
    config.hidden_act_param = param
    return Substitution(layers, replaced, replaced_param, activation, param)


def set_penalty(model: nn.Module, context: PenaltyContext | None, kernel: str | None = None) -> None:
    """Hand every SparseFFN the context of the micro-batches to come, as layer 0, 1, ...; None takes it away.

    kernel: eager or triton of kernels/glu.py, which computes x1 and its penalty in one where it knows the activation.
    """
    for layer, ffn in enumerate(sparse_ffns(model)):
        ffn.penalty = ffn.fused = None
        if context is not None:
            ffn.penalty = partial(inject_l1, context=context, layer=layer)
            if kernel is not None and ffn.activation in glu.FUSED:
                ffn.fused = partial(glu.gated, implementation=kernel, context=context, layer=layer)


@contextmanager
def observing(model: PreTrainedModel, see: Callable[..., Tensor | None]) -> Iterator[int]:
    """While the block runs, every forward pass calls see(layer, x1, **routing) with each FFN's intermediate.

    What `see` returns, unless it is None, goes on in the place of x1. Gives the number of FFNs. A model that is not
    substituted has, meanwhile, SparseFFNs with its own activation.
    Raises ValueError if it has FFNs or an activation that are not known.
    """
    found = find_ffns(model)

    def pass_on(x1: Tensor, layer: int, **routing) -> Tensor:
        put = see(layer, x1, **routing)
        return x1 if put is None else put

    if not all(isinstance(module, SparseFFN) for module in found.values()):
        put_sparse_ffns(model, *activation_of(model))
    ffns = sparse_ffns(model)
    before = [ffn.penalty for ffn in ffns]
    try:
        for layer, ffn in enumerate(ffns):
            ffn.penalty = partial(pass_on, layer=layer)
        yield len(ffns)
    finally:
        for ffn, penalty in zip(ffns, before, strict=True):
            ffn.penalty = penalty
        for name, module in found.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
