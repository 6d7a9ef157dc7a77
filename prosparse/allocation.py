"""Thresholds by layer or neuron: where to cut so that each zero costs the least, and one threshold that says the same.

In: a model with ReLU, FATReLU or dReLU and calibration rows. Out: thresholds t_j, tried on the model; folded into its
weights, so that it has one threshold again. What a zero costs is the diagonal Fisher information: the square of
∂L/∂x1 · x1, the change of the loss to first order.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from prosparse.config import Granularity
from prosparse.data import batch as make_batch
from prosparse.ffn import (
    ExpertsFFN,
    FusedFFN,
    SeparateFFN,
    SparseFFN,
    UngatedFFN,
    activation_of,
    ffn_forms,
    put_sparse_ffns,
    round_bf16,
    sparse_ffns,
    substitute,
)
from prosparse.models.formats import stock_config
from prosparse.models.load import build_model
from prosparse.penalty import row_mask
from prosparse.sparsity import add_ranks, language_loss
from prosparse.ulysses import RowGroup, no_sharing

SMALLEST = 1e-4  # of the thresholds that fold: below it the factors of the rows grow without bound
START, OCTAVES = 2.0**-13, 17  # the threshold of what is not cut in a model without one; thresholds considered above it
FILE = "thresholds.safetensors"
TRUST = 16.0  # removed elements that a neuron's own costs have to rest on to count as much as its layer's

# --- where to cut -----------------------------------------------------------------------------------------------------


@dataclass
class Costs:
    """What cutting costs, by layer: of the elements x1 != 0 whose gate lies between two neighbors of the `edges`.

    The edges are an octave apart, so that the factors of folding are powers of two and it rounds nothing. Element b of
    the last dimension is below edges[b] and not below edges[b - 1], the first is all below edges[0].
    """

    edges: Tensor  # [edges], rising
    counts: list[Tensor]  # fp64 [neurons, edges], of experts [experts x neurons, edges]
    costs: list[Tensor]  # the same shape: Σ (∂L/∂x1 · x1)²


def fisher_costs(
    model: PreTrainedModel,
    rows: Sequence[np.ndarray],
    *,
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
    group: RowGroup | None = None,
) -> Costs:
    """Run `model` (its FFNs substituted) forward and backward over `rows`; its weights get no gradients.

    Every rank of a process group has to call it, each with whole weights; `group` as of `measure`. Raises ValueError if
    an FFN is ungated: no up projection could take back what folding does.
    """
    ffns = _gated(model)
    start = max(ffns[0].param, START)
    edges = torch.tensor([start * 2.0**octave for octave in range(1, OCTAVES + 1)], device=model.device)
    sizes = [_rows(ffn)[0][0].shape[: 2 if isinstance(ffn, ExpertsFFN) else 1].numel() for ffn in ffns]
    sums = [torch.zeros(2, size, len(edges) + 1, dtype=torch.float64, device=model.device) for size in sizes]

    mask: Tensor | None = None

    def see(layer: int, gate: Tensor, up: Tensor, experts: Tensor | None, **routing) -> Tensor:
        x1 = type(ffns[layer]).intermediate(ffns[layer], gate, up, **routing)
        return _Seen.apply(x1, gate.detach(), experts, row_mask(mask, x1, routing.get("tokens")), edges, sums[layer])

    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hook = model.get_input_embeddings().register_forward_hook(lambda module, given, out: out.detach().requires_grad_())
    was_training = model.training
    group = group or no_sharing()
    model.eval().requires_grad_(False)
    try:
        with intermediates(model, see):
            for number in range(passes := math.ceil(math.ceil(len(rows) / batch) / group.groups)):
                start = batch * (group.number + number * group.groups)
                if start < len(rows):
                    data = group.cut(make_batch(rows, range(start, min(start + batch, len(rows))))).to(model.device)
                    mask = data.token_mask
                    with torch.enable_grad(), group.attending(model):
                        language_loss(model(**data.inputs(), use_cache=False).logits, data.labels).backward()
                if progress is not None:  # on every rank as often: what it calls may wait for the others
                    progress(number + 1, passes)
    finally:
        hook.remove()
        model.train(was_training)
        for parameter in asked:
            parameter.requires_grad_()
    add_ranks(*sums)
    return Costs(edges, [part[0, :, :-1] for part in sums], [part[1, :, :-1] for part in sums])


class _Seen(torch.autograd.Function):
    """x1 itself; backward sorts (gradient · x1)² by neuron and gate."""

    @staticmethod
    def forward(
        ctx, x1: Tensor, gate: Tensor, experts: Tensor | None, kept: Tensor | None, edges: Tensor, sums: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x1, gate)
        ctx.experts, ctx.kept, ctx.edges, ctx.sums = experts, kept, edges, sums
        return x1.view_as(x1)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (gradient,), (x1, gate), sums = gradients, ctx.saved_tensors, ctx.sums
        flat, neurons = x1.flatten(0, -2), x1.shape[-1]
        counted = flat != 0 if ctx.kept is None else (flat != 0) & ctx.kept.flatten()[:, None]
        token, neuron = counted.nonzero(as_tuple=True)
        place = torch.bucketize(gate.flatten(0, -2)[token, neuron].float(), ctx.edges, right=True)
        if ctx.experts is not None:
            neuron = neuron + ctx.experts[token] * neurons
        change = gradient.flatten(0, -2)[token, neuron % neurons].double() * flat[token, neuron % neurons].double()
        at = neuron * sums.shape[-1] + place
        sums[0].view(-1).index_add_(0, at, torch.ones_like(change))
        sums[1].view(-1).index_add_(0, at, change.square())
        return gradient, None, None, None, None, None


def thresholds_at(costs: Costs, price: float, granularity: Granularity) -> list[Tensor]:
    """By layer the thresholds, fp32 [neurons], at which no cut costs more than `price` an element and none is missed.

    What is not cut has half the first edge: the model's own threshold, or a very small one. By neuron: its own costs,
    drawn towards those of its layer at the same gate as if TRUST of its elements had these.
    """
    candidates = torch.cat([costs.edges[:1] / 2, costs.edges])
    found = []
    for counts, cost in zip(costs.counts, costs.costs, strict=True):
        of_layer = cost.sum(0) / counts.sum(0).clamp(min=1)
        if granularity is Granularity.layer:
            gain = (price * counts - cost).sum(0, keepdim=True).expand_as(cost)
        else:
            gain = price * counts - counts * (cost + TRUST * of_layer) / (counts + TRUST)
        best = torch.cat([torch.zeros_like(gain[:, :1]), gain.cumsum(1)], dim=1).argmax(dim=1)
        found.append(candidates[best])
    return found


# --- the model as it would be -----------------------------------------------------------------------------------------


def _gated(model: PreTrainedModel) -> list[SparseFFN]:
    if UngatedFFN in ffn_forms(model).values():
        raise ValueError(
            f"{type(model).__name__} has no up projection that could take back the factor of a folded gate: "
            "it can only have one threshold (granularity=model)"
        )
    return sparse_ffns(model)


@contextmanager
def intermediates(model: PreTrainedModel, make: Callable[..., Tensor]) -> Iterator[None]:
    """While the block runs every FFN's x1 is make(layer, gate, up, experts, **routing).

    experts: of a layer with experts whose neurons each row has, int64 [rows], else None.
    """
    ffns = sparse_ffns(model)
    visited: dict[nn.Module, Tensor] = {}

    def visit(ffn: nn.Module, given: tuple) -> None:
        visited[ffn] = given[1].flatten().sort().values

    def put(gate: Tensor, up: Tensor, *, layer: int, **routing) -> Tensor:
        return make(layer, gate, up, visited.get(ffns[layer]), **routing)

    hooks = [ffn.register_forward_pre_hook(visit) for ffn in ffns if isinstance(ffn, ExpertsFFN)]
    for layer, ffn in enumerate(ffns):
        ffn.__dict__["intermediate"] = partial(put, layer=layer)
    try:
        yield
    finally:
        for ffn in ffns:
            del ffn.__dict__["intermediate"]
        for hook in hooks:
            hook.remove()


@contextmanager
def cut_apart(model: PreTrainedModel, thresholds: Sequence[Tensor]) -> Iterator[None]:
    """While the block runs every neuron has its own threshold: [neurons] a layer, of experts [experts, neurons]."""
    ffns, at = sparse_ffns(model), [part.float() for part in thresholds]
    kept = [(ffn.activation, ffn.param) for ffn in ffns]

    def cut(layer: int, gate: Tensor, up: Tensor, experts: Tensor | None, **routing) -> Tensor:
        own = at[layer] if experts is None else at[layer].view(-1, gate.shape[-1])[experts]
        return type(ffns[layer]).intermediate(ffns[layer], torch.where(gate >= own, gate, 0.0), up, **routing)

    for ffn in ffns:
        ffn.activation, ffn.param = ("drelu" if ffn.activation == "drelu" else "relu"), 0.0
    try:
        with intermediates(model, cut):
            yield
    finally:
        for ffn, (activation, param) in zip(ffns, kept, strict=True):
            ffn.activation, ffn.param = activation, param


def save_thresholds(thresholds: Sequence[Tensor], folder: Path) -> None:
    """Write them to a file of `folder`, layer by layer."""
    save_file({f"layers.{layer}": part.contiguous().cpu() for layer, part in enumerate(thresholds)}, folder / FILE)


def load_thresholds(checkpoint: Path) -> list[Tensor] | None:
    """Those that a checkpoint has, saved in its skeleton; None if its model has one threshold or none."""
    path = checkpoint / "skeleton" / FILE
    if not path.exists():
        return None
    found = load_file(path)
    return [found[f"layers.{layer}"] for layer in range(len(found))]


# --- one threshold ----------------------------------------------------------------------------------------------------


@dataclass
class Folded:
    """The one threshold, and how far the logits moved: the largest difference as a share of the largest logit."""

    threshold: float
    silenced: int  # neurons that never fire
    smallest_factor: float  # of a row of gate_proj; the row of up_proj has the inverse
    largest_factor: float
    difference_fp32: float
    difference: float  # after the cast to `dtype`
    dtype: str

    def to_dict(self) -> dict:
        return asdict(self)


def fold(
    model: PreTrainedModel,
    thresholds: Sequence[Tensor | float],
    threshold: float | None = None,
    *,
    token_ids: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Folded:
    """Give `model` one threshold t that computes what `thresholds` would, in place, by scaling its weights.

    thresholds: an entry t_j for each layer, a number or [neurons] (of experts also [experts, neurons]); inf: the neuron
    never fires. Row j of gate_proj is multiplied by t / t_j and row j of up_proj by t_j / t, biases too, so that x1 is
    the same; rows of neurons that never fire become 0. dReLU is cut on its gate only, and up keeps its sign.
    threshold: t, rounded to bf16; None: the median of the finite t_j. token_ids, [rows, tokens]: where logits are
    compared with those of the model with its thresholds apart, before and after a cast to `dtype`.
    Raises ValueError, with weights, threshold and config of `model` unchanged, if it is not fp32, not relu, fatrelu or
    drelu, or ungated (no up projection could take the factor back), or if a t_j is below 1e-4.
    """
    name, param = activation_of(model)
    if name not in ("relu", "fatrelu", "drelu"):
        raise ValueError(f"the model's activation is {name}: only relu, fatrelu and drelu have a threshold to fold")
    forms = list(ffn_forms(model).values())
    if UngatedFFN in forms:
        raise ValueError(
            f"{type(model).__name__} has no up projection that could take back the factor of a folded gate"
        )
    if {tensor.dtype for tensor in model.parameters()} != {torch.float32}:
        raise ValueError("thresholds fold into fp32 weights, before the one cast: load the model with dtype float32")
    if len(thresholds) != len(forms):
        raise ValueError(f"{len(thresholds)} thresholds for {len(forms)} layers: give one entry a layer")
    stock = stock_config(model.config)
    put_sparse_ffns(model, name, param)  # `substitute` would round a release's threshold, refused or not
    ffns = sparse_ffns(model)
    apart = [_spread(layer, ffn, at) for layer, (ffn, at) in enumerate(zip(ffns, thresholds, strict=True))]
    finite = torch.cat([at[at.isfinite()] for at in apart])
    if threshold is None and len(finite) == 0:
        raise ValueError("every neuron's threshold is infinite: a model in which none fires has nothing to fold")
    chosen = round_bf16(finite.median().item() if threshold is None else threshold)
    if not 0 < chosen < float("inf"):
        raise ValueError(f"threshold is {chosen}: thresholds fold into a finite one above 0")
    with cut_apart(model, apart):
        expected = _logits(model, token_ids)
    with torch.no_grad():
        for ffn, at in zip(ffns, apart, strict=True):
            for rows, factor in zip(_rows(ffn), (chosen / at, at / chosen), strict=True):
                factor = torch.where(at.isfinite(), factor, 0.0)
                for tensor in rows:
                    tensor.copy_(tensor * factor.reshape(*factor.shape, *[1] * (tensor.dim() - factor.dim())))
    folded_name = "drelu" if name == "drelu" else "fatrelu"
    substitute(model, folded_name, chosen)
    cast = build_model(stock, {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}, dtype)
    substitute(cast, folded_name, chosen)
    difference_fp32, difference = (_difference(_logits(made, token_ids), expected) for made in (model, cast))
    return Folded(
        threshold=chosen,
        silenced=sum(int(at.isinf().sum()) for at in apart),
        smallest_factor=(chosen / finite).min().item() if len(finite) else 1.0,
        largest_factor=(chosen / finite).max().item() if len(finite) else 1.0,
        difference_fp32=difference_fp32,
        difference=difference,
        dtype=str(dtype).removeprefix("torch."),
    )


def _spread(layer: int, ffn: SparseFFN, at: Tensor | float) -> Tensor:
    """The thresholds of one layer in fp64, [neurons] or [experts, neurons]."""
    gate = _rows(ffn)[0][0]
    shape = gate.shape[: 2 if isinstance(ffn, ExpertsFFN) else 1]
    given = torch.as_tensor(at, dtype=torch.float64, device=gate.device)
    if not bool((given.float() >= SMALLEST).all()):
        raise ValueError(f"layer {layer} has a threshold of {given.min():g}: thresholds fold from {SMALLEST:g} on")
    try:
        return given.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"layer {layer}: thresholds of shape {[*given.shape]} for neurons {[*shape]}") from error


def _rows(ffn: SparseFFN) -> tuple[list[Tensor], list[Tensor]]:
    """What makes gate and what makes up, as views: weights [experts?, neurons, hidden] and biases [neurons]."""
    if isinstance(ffn, SeparateFFN):
        return list(ffn.gate_proj.parameters()), list(ffn.up_proj.parameters())
    assert isinstance(ffn, FusedFFN | ExpertsFFN)
    dim = 1 if isinstance(ffn, ExpertsFFN) else 0
    fused = [ffn.gate_up_proj] if isinstance(ffn, ExpertsFFN) else list(ffn.gate_up_proj.parameters())
    halves = [tensor.detach().chunk(2, dim) for tensor in fused]
    return [gate for gate, _ in halves], [up for _, up in halves]


def _logits(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(token_ids.to(model.device)).logits.float().cpu()


def _difference(seen: Tensor, expected: Tensor) -> float:
    return ((seen - expected).abs().max() / expected.abs().max()).item()
