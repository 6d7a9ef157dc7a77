"""Activation threshold shifting: the last step of a recipe (FATReLU, arXiv 2402.13516, section 3.4).

In: a trained model with ReLU, FATReLU or dReLU and calibration rows, or thresholds by layer or neuron. Out: the same
model with one global threshold, which is rounded to bf16, so that every runtime compares with the same number.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from prosparse.config import Shift
from prosparse.ffn import (
    ExpertsFFN,
    FusedFFN,
    SeparateFFN,
    SparseFFN,
    UngatedFFN,
    activation_of,
    ffn_forms,
    round_bf16,
    sparse_ffns,
    substitute,
)
from prosparse.models.formats import stock_config
from prosparse.models.load import build_model
from prosparse.sparsity import measure

SMALLEST = 1e-4  # of the thresholds that fold: below it the factors of the rows grow without bound


@dataclass
class Point:
    """One threshold of a sweep, measured on the calibration rows."""

    threshold: float
    sparsity: float
    perplexity: float

    def __str__(self) -> str:
        return f"threshold {self.threshold:<10.5g} sparsity {self.sparsity:6.1%}  perplexity {self.perplexity:10.3f}"


@dataclass
class Shifted:
    """The threshold chosen, the perplexity budget it was chosen under (None: it was given), and all that was tried."""

    threshold: float
    budget: float | None
    tokens: int
    sweep: list[Point]

    def to_dict(self) -> dict:
        return asdict(self)


def shift(
    model: PreTrainedModel,
    rows: Sequence[np.ndarray],
    how: Shift,
    *,
    batch: int = 4,
    report: Callable[[Point], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Shifted:
    """Shift the threshold of every SparseFFN of `model`, in place; ReLU becomes FATReLU, dReLU is cut on its gate.

    `how.threshold`: that threshold. `how.budget`: the largest one, found by doubling from how.start and how.refinements
    bisections, whose perplexity on `rows` is at most (1 + budget) times that of the model as it came; the model stays
    as it came if none is. `report` is called with each point, `progress` as by `measure`. Every
    rank of a process group has to call it.
    Raises ValueError if the model's activation has no threshold, or one above how.threshold.
    """
    first = sparse_ffns(model)[0]
    name, start = first.activation, first.param
    if name not in ("relu", "fatrelu", "drelu"):
        raise ValueError(f"the model's activation is {name}: only relu, fatrelu and drelu have a threshold to shift")
    if how.threshold is not None and round_bf16(how.threshold) < start:
        raise ValueError(f"threshold {how.threshold} is below {start}, which the model has already: raise it")
    shifted_name = "drelu" if name == "drelu" else "fatrelu"
    points: dict[float, Point] = {}
    tokens = 0

    def set_threshold(threshold: float) -> None:
        if threshold == start:
            substitute(model, name, start)
        else:
            substitute(model, shifted_name, threshold)

    def try_threshold(threshold: float) -> Point:
        nonlocal tokens
        if threshold not in points:
            set_threshold(threshold)
            result = measure(model, rows, batch=batch, progress=progress)
            tokens = result.tokens
            points[threshold] = Point(threshold, result.sparsity, result.perplexity)
            if report is not None:
                report(points[threshold])
        return points[threshold]

    limit = try_threshold(start).perplexity * (1 + (how.budget or 0))

    def fits(threshold: float) -> bool:
        return try_threshold(threshold).perplexity <= limit

    if how.threshold is not None:
        chosen = round_bf16(how.threshold)
        try_threshold(chosen)
    else:
        chosen = _largest(fits, start, max(round_bf16(how.start), 2 * start), how.refinements)
    set_threshold(chosen)
    return Shifted(chosen, how.budget, tokens, [points[key] for key in sorted(points)])


def _largest(fits: Callable[[float], bool], low: float, high: float, refinements: int) -> float:
    """The largest threshold that fits, at least `low`: doubling from `high` while that fits, then bisecting in bf16."""
    while high < 2.0**20 and fits(high):
        low, high = high, round_bf16(2 * high)
    for _ in range(refinements):
        middle = round_bf16((low + high) / 2)
        if middle in (low, high):
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# --- thresholds by layer or neuron ------------------------------------------------------------------------------------


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
    Raises ValueError, with the model unchanged, if it is not fp32, not relu, fatrelu or drelu, or ungated (no up
    projection could take the factor back), or if a t_j is below 1e-4.
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
    substitute(model, name, param)
    ffns = sparse_ffns(model)
    apart = [_spread(layer, ffn, at) for layer, (ffn, at) in enumerate(zip(ffns, thresholds, strict=True))]
    finite = torch.cat([at[at.isfinite()] for at in apart])
    if threshold is None and len(finite) == 0:
        raise ValueError("every neuron's threshold is infinite: a model in which none fires has nothing to fold")
    chosen = round_bf16(finite.median().item() if threshold is None else threshold)
    if not 0 < chosen < float("inf"):
        raise ValueError(f"threshold is {chosen}: thresholds fold into a finite one above 0")
    with _cut_apart(ffns, apart, name):
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
    if not bool((given >= SMALLEST).all()):
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


@contextmanager
def _cut_apart(ffns: list[SparseFFN], thresholds: list[Tensor], activation: str) -> Iterator[None]:
    """While the block runs every neuron has its own threshold; the FFNs' activation is of no use afterwards."""
    visited: dict[nn.Module, Tensor] = {}  # of experts: whose neurons each row of x1 has

    def visit(ffn: nn.Module, given: tuple) -> None:
        visited[ffn] = given[1].flatten().sort().values

    def cut(gate: Tensor, up: Tensor, *, ffn: SparseFFN, at: Tensor, **routing) -> Tensor:
        at = at[visited[ffn]] if ffn in visited else at
        return type(ffn).intermediate(ffn, torch.where(gate >= at, gate, 0.0), up, **routing)

    hooks = [ffn.register_forward_pre_hook(visit) for ffn in ffns if isinstance(ffn, ExpertsFFN)]
    for ffn, at in zip(ffns, thresholds, strict=True):
        ffn.activation, ffn.param = ("drelu" if activation == "drelu" else "relu"), 0.0
        ffn.__dict__["intermediate"] = partial(cut, ffn=ffn, at=at.float())
    try:
        yield
    finally:
        for ffn in ffns:
            del ffn.__dict__["intermediate"]
        for hook in hooks:
            hook.remove()


def _logits(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(token_ids.to(model.device)).logits.float().cpu()


def _difference(seen: Tensor, expected: Tensor) -> float:
    return ((seen - expected).abs().max() / expected.abs().max()).item()
