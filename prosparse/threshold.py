"""Activation threshold shifting: the last step of a recipe (FATReLU, arXiv 2402.13516, section 3.4).

In: a trained model with ReLU, FATReLU or dReLU and calibration rows. Out: the same model with one global threshold,
which is rounded to bf16, so that every runtime compares with the same number; or thresholds by layer or neuron to fold.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from prosparse.allocation import cut_apart, fisher_costs, thresholds_at
from prosparse.config import Granularity, Shift
from prosparse.ffn import (
    round_bf16,
    sparse_ffns,
    substitute,
)
from prosparse.sparsity import measure
from prosparse.ulysses import RowGroup


@dataclass
class Point:
    """One threshold of a sweep, measured on the calibration rows."""

    threshold: float
    sparsity: float
    perplexity: float

    def __str__(self) -> str:
        return f"threshold {self.threshold:<10.5g} sparsity {self.sparsity:6.1%}  perplexity {self.perplexity:10.3f}"


@dataclass
class Allocation:
    """Thresholds by layer or neuron at one price, measured on the calibration rows."""

    price: float  # the most that a removed element costs: (∂L/∂x1 · x1)², nats²
    sparsity: float
    perplexity: float

    def __str__(self) -> str:
        return f"price {self.price:<14.4g} sparsity {self.sparsity:6.1%}  perplexity {self.perplexity:10.3f}"


@dataclass
class Shifted:
    """The threshold chosen, the perplexity budget it was chosen under (None: it was given), and all that was tried.

    With thresholds by layer or neuron, `threshold` is what one for the whole model would have been, and `thresholds`
    are those to fold: fp32 [neurons] by layer.
    """

    threshold: float
    budget: float | None
    tokens: int
    sweep: list[Point]
    granularity: Granularity = Granularity.model
    allocations: list[Allocation] = field(default_factory=list)
    thresholds: list[Tensor] | None = None

    def to_dict(self) -> dict:
        """All but the thresholds."""
        return {key: value for key, value in asdict(self).items() if key != "thresholds"}


def shift(
    model: PreTrainedModel,
    rows: Sequence[np.ndarray],
    how: Shift,
    *,
    batch: int = 4,
    report: Callable[[Point | Allocation], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    group: RowGroup | None = None,
) -> Shifted:
    """Shift the threshold of every SparseFFN of `model`, in place; ReLU becomes FATReLU, dReLU is cut on its gate.

    `how.threshold`: that threshold. `how.budget`: the largest one, found by doubling from how.start and how.refinements
    bisections, whose perplexity on `rows` is at most (1 + budget) times that of the model as it came; the model stays
    as it came if none is. `how.granularity` layer or neuron: the model stays as it came, and the thresholds that take
    the most zeros within the same budget, if any do, are returned, to be tried (`allocation.cut_apart`) and folded.
    `report` is called with each point, `progress` and `group` are as of `measure`. Every rank of a process group has to
    call it. Raises ValueError if the model's activation has no threshold, or one above how.threshold.
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
            result = measure(model, rows, batch=batch, progress=progress, group=group)
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
    shifted = Shifted(chosen, how.budget, tokens, [points[key] for key in sorted(points)], how.granularity)
    if how.granularity is Granularity.model:
        set_threshold(chosen)
        return shifted
    set_threshold(start)
    return _allocate(model, rows, how, batch, report, progress, group, limit, shifted)


def _allocate(
    model: PreTrainedModel,
    rows: Sequence[np.ndarray],
    how: Shift,
    batch: int,
    report: Callable[[Point | Allocation], None] | None,
    progress: Callable[[int, int], None] | None,
    group: RowGroup | None,
    limit: float,
    shifted: Shifted,
) -> Shifted:
    """The largest price, to a sixteenth, whose thresholds keep the perplexity within `limit`."""
    costs = fisher_costs(model, rows, batch=batch, progress=progress, group=group)
    start = sparse_ffns(model)[0].param
    tried: dict[float, Allocation] = {}

    def thresholds(exponent: float) -> list[Tensor]:
        return thresholds_at(costs, 2.0**exponent, how.granularity)

    def fits(exponent: float) -> bool:
        with cut_apart(model, thresholds(exponent)):
            result = measure(model, rows, batch=batch, progress=progress, group=group)
        tried[exponent] = Allocation(2.0**exponent, result.sparsity, result.perplexity)
        if report is not None:
            report(tried[exponent])
        return result.perplexity <= limit

    spent, removed = (sum(part.sum().item() for part in parts) for parts in (costs.costs, costs.counts))
    if removed == 0 or not 0 < spent < math.inf:
        raise ValueError(
            f"what zeros cost cannot be told: {removed:,.0f} active elements on the calibration rows cost {spent} "
            "together: give other text, or a model whose loss is finite"
        )
    low = high = round(math.log2(spent / removed)) - 8.0  # the mean is of elements that are far too dear to cut
    dearest, cheapest = (
        high + 40,
        low - 40,
    )  # whoever bears 2^40 times as much bears any price; whoever not as little, none
    while high < dearest and fits(high):
        low, high = high, high + 2
    while high == low and low > cheapest and not fits(low := low - 2):
        high = low
    shifted.allocations = [tried[key] for key in sorted(tried)]
    if high == low:
        shifted.threshold = start
        return shifted
    while high - low > 1 / 16:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    shifted.thresholds = thresholds(low)
    shifted.allocations = [tried[key] for key in sorted(tried)]
    return shifted


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
