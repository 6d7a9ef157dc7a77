"""All measurements of activations and perplexity.

In: a model (Hugging Face or substituted, also sharded by an engine) and token rows. Out: a `Measurement`, the curves of
CETT and of top-k. Called on every rank of a process group they share the rows among them and sum exactly.
docs/metrics.md has the formulas.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from prosparse.activity import Activity
from prosparse.data import Batch
from prosparse.data import batch as make_batch
from prosparse.ffn import down_weights, find_ffns, observing
from prosparse.kernels.loss import CHUNK_BYTES
from prosparse.penalty import mean_abs_by_layer, new_statistics, row_mask, sparsity_by_layer, tally_kept
from prosparse.ulysses import RowGroup, no_sharing

CANDIDATES, REFINEMENTS = 33, 10  # of the thresholds of a layer at a CETT; bisections of the CETT


@dataclass
class Measurement:
    """Perplexity over labeled tokens; sparsity = share of exact zeros in the intermediate, mean over layers."""

    perplexity: float
    loss: float
    tokens: int
    sparsity: float
    sparsity_by_layer: list[float]
    mean_abs_by_layer: list[float]
    sums: list[Tensor] = field(repr=False, compare=False)  # what the above was computed from: `pooled` adds it up

    def to_dict(self) -> dict[str, Any]:
        """All but the sums."""
        return {key: value for key, value in vars(self).items() if key != "sums"}


def language_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy, fp32 0-d: each position of `logits` [batch, context, vocabulary] predicts its own label.

    `labels` [batch, context], as a `Batch` has them; -100 is not counted.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def labeled(labels: Tensor) -> int:
    """How many labels of [batch, context] `language_loss` counts."""
    return int((labels != -100).sum())


def spread(rows: int, wanted: int | None) -> list[int]:
    """At most `wanted` indices spread evenly over `rows`."""
    if wanted is None or wanted >= rows:
        return list(range(rows))
    return np.linspace(0, rows - 1, wanted).round().astype(int).tolist()


def run_passes(
    model: PreTrainedModel,
    rows: Sequence[np.ndarray],
    chosen: Sequence[int],
    batch: int,
    see: Callable[..., Tensor | None],
    *,
    ended: Callable[[Batch], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    group: RowGroup | None = None,
) -> Tensor:
    """(summed loss, labeled tokens), fp64 [2] over all ranks, of the rows at `chosen`, `batch` at a time.

    see(layer, x1, data, **routing) is called for every FFN of every batch, as by `observing`; data is None where a rank
    without rows of its own goes through the forward pass for the others, which under ZeRO-3 need its weights. `ended`
    is called after each batch of this rank. The ranks of a `group` share their rows, each with its stretch of them.
    """
    if not chosen:
        raise ValueError("there are no rows to measure: the text is shorter than one row of `context` tokens")
    group = group or no_sharing()
    share = [chosen[i : i + batch] for i in range(0, len(chosen), batch)][group.number :: group.groups]
    passes = math.ceil(math.ceil(len(chosen) / batch) / group.groups)
    totals = torch.zeros(2, dtype=torch.float64, device=model.device)
    was_training = model.training
    model.eval()
    for number in range(passes):
        own = number < len(share)
        data = group.cut(make_batch(rows, share[number] if own else chosen[:1])).to(model.device)
        with group.attending(model), observing(model, partial(see, data=data if own else None)):
            logits = model(**data.inputs(), use_cache=False).logits
        if own:
            size = max(1, CHUNK_BYTES[logits.device.type] // (4 * logits[:, 0].numel()))  # positions in fp32 at a time
            parts = zip(logits.split(size, 1), data.labels.split(size, 1), strict=True)
            loss = torch.stack([language_loss(*part) for part in parts]).sum(dtype=torch.float64)
            totals += torch.stack([loss, totals.new_tensor(labeled(data.labels))])
            if ended is not None:
                ended(data)
        if progress is not None:
            progress(number + 1, passes)
    model.train(was_training)
    add_ranks(totals)
    return totals


def add_ranks(*sums: Tensor) -> None:
    """Make each tensor the sum of those of all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for part in sums:
            dist.all_reduce(part)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    rows: Sequence[np.ndarray],
    *,
    batch: int = 4,
    indices: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
    activity: Activity | None = None,
    group: RowGroup | None = None,
) -> Measurement:
    """Perplexity and sparsity of `model` on `rows` (see `Rows`), or on those named by `indices`.

    `activity` sees the same pass. Any model whose FFNs and activation are known can be measured, substituted or not.
    In a process group every rank has to call it; each measures its share (as a `group` says, without `activity`) and
    all return the same result.
    Raises ValueError if there are no rows or the model has no FFN that is known.
    """
    statistics = new_statistics(len(find_ffns(model)), model.device)

    def see(layer: int, x1: Tensor, data: Batch | None, tokens: Tensor | None = None, visits: int = 1) -> None:
        if data is not None:
            tally_kept(statistics[layer], x1, data.token_mask, tokens)
            if activity is not None:
                activity.see(layer, x1, data, tokens, visits)

    chosen = list(range(len(rows))) if indices is None else list(indices)
    ended = None if activity is None else activity.ended
    totals = run_passes(model, rows, chosen, batch, see, ended=ended, progress=progress, group=group)
    add_ranks(statistics)
    if activity is not None:
        activity.add_ranks()
    return _measurement(statistics, totals)


def pooled(parts: Sequence[Measurement]) -> Measurement:
    """What one measurement of all the texts together would say."""
    return _measurement(*(sum(both[1:], start=both[0]) for both in zip(*(part.sums for part in parts), strict=True)))


def _measurement(statistics: Tensor, totals: Tensor) -> Measurement:
    loss, tokens = totals[0].item() / totals[1].item(), int(totals[1].item())
    layers = sparsity_by_layer(statistics)
    mean_abs = mean_abs_by_layer(statistics)
    return Measurement(
        _perplexity(totals), loss, tokens, sum(layers) / len(layers), layers, mean_abs, [statistics, totals]
    )


# --- curves: what the model would bear --------------------------------------------------------------------------------


@torch.no_grad()
def top_k_curve(
    model: PreTrainedModel,
    rows: Sequence[np.ndarray],
    percents: Sequence[float],
    *,
    batch: int = 4,
    indices: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """{percent, perplexity, tokens} where each layer keeps of every token the largest percent % of |x1|, at least one.

    All that equal the smallest of them are kept too. Of experts: of every token's visit to an expert. A pass for each
    percent; ranks as in `measure`.
    """
    chosen = list(range(len(rows))) if indices is None else list(indices)
    curve = []
    for percent in percents:

        def keep(layer: int, x1: Tensor, percent: float = percent, **_: Any) -> Tensor | None:
            wanted = max(1, round(x1.shape[-1] * percent / 100))
            if wanted == x1.shape[-1]:
                return None
            size = x1.abs().float()
            smallest = size.topk(wanted, dim=-1, sorted=False).values.amin(-1, keepdim=True)
            return torch.where(size >= smallest, x1, 0.0)

        totals = run_passes(model, rows, chosen, batch, keep, progress=progress)
        curve.append({"percent": percent, "perplexity": _perplexity(totals), "tokens": int(totals[1].item())})
    return curve


@torch.no_grad()
def cett_curve(
    model: PreTrainedModel,
    rows: Sequence[np.ndarray],
    percent: float = 1.0,
    *,
    batch: int = 4,
    indices: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """CETT-PPL-p % (arXiv 2411.02335): the sparsity at the largest CETT that costs at most p % of perplexity.

    Neuron i of a token is left out where |x1_i| · ‖column i of down_proj‖ < a threshold, one a layer. CETT is the norm
    of what is left out as a share of the norm of the whole output, mean over tokens; all layers have the same. The
    threshold of a layer at a CETT is interpolated between CANDIDATES thresholds, quantiles of the magnitudes in the
    first batch, whose CETT is measured there; the CETT is bisected to 2^-REFINEMENTS, a pass each. `cett_by_layer` is
    what the thresholds chosen give on all rows, in the dense model. Ranks as in `measure`. ValueError for experts.
    """
    chosen = list(range(len(rows))) if indices is None else list(indices)
    weights = [weight.detach().float() for weight in down_weights(model)]
    norms = [weight.norm(dim=0) for weight in weights]
    layers = len(norms)
    candidates = torch.zeros(layers, CANDIDATES, device=model.device)
    lost = torch.zeros(layers, CANDIDATES, dtype=torch.float64, device=model.device)  # CETT summed over tokens
    seen = torch.zeros(layers, dtype=torch.float64, device=model.device)

    def add_lost(layer: int, x1: Tensor, data: Batch, thresholds: Tensor, sums: Tensor) -> None:
        kept = row_mask(data.token_mask, x1)
        x1 = (x1.flatten(0, -2) if kept is None else x1[kept]).float()
        size = x1.abs() * norms[layer]
        whole = (x1 @ weights[layer].T).norm(dim=-1)
        seen[layer] += len(x1)
        for number, threshold in enumerate(thresholds):
            part = ((x1 * (size < threshold)) @ weights[layer].T).norm(dim=-1)
            sums[layer, number] += torch.where(whole > 0, part / whole, 0.0).sum(dtype=torch.float64)

    def sample(layer: int, x1: Tensor, data: Batch | None) -> None:
        if data is not None:  # one batch: on one rank
            size = (x1.float().abs() * norms[layer]).flatten()
            size = size[size > 0].sort().values
            places = torch.linspace(0, len(size) - 1, CANDIDATES - 1, dtype=torch.float64).round().long()
            if len(size) > 0:
                candidates[layer, 1:] = size[places.to(size.device)]
            add_lost(layer, x1, data, candidates[layer], lost)

    run_passes(model, rows, chosen[:batch], batch, sample)
    add_ranks(candidates, lost, seen)
    # Vectors may cancel, so that more of them left out is less: a threshold belongs to the largest CETT up to it.
    curves = (lost / seen[:, None]).cummax(dim=1).values.cpu().numpy()

    def thresholds_at(cett: float) -> Tensor:
        found = [np.interp(cett, curve, line) for curve, line in zip(curves, candidates.cpu().numpy(), strict=True)]
        return torch.tensor(found, dtype=torch.float32)

    def dense(layer: int, x1: Tensor, data: Batch | None) -> None:
        if data is not None:
            add_lost(layer, x1, data, chosen_thresholds[layer][None], lost)

    def tried(cett: float) -> tuple[float, Tensor]:
        thresholds, statistics = thresholds_at(cett).to(model.device), new_statistics(layers, model.device)

        def cut(layer: int, x1: Tensor, data: Batch | None) -> Tensor:
            x1 = torch.where(x1.float().abs() * norms[layer] >= thresholds[layer], x1, 0.0)
            if data is not None:
                tally_kept(statistics[layer], x1, data.token_mask)
            return x1

        totals = run_passes(model, rows, chosen, batch, cut, progress=progress)
        add_ranks(statistics)
        return _perplexity(totals), statistics

    before, statistics = tried(0.0)
    low, high, perplexity = 0.0, 1.0, before
    for _ in range(REFINEMENTS):
        middle = (low + high) / 2
        there, counted = tried(middle)
        if there <= before * (1 + percent / 100):
            low, perplexity, statistics = middle, there, counted
        else:
            high = middle
    chosen_thresholds = thresholds_at(low).to(model.device)
    lost, seen = lost[:, :1].zero_(), seen.zero_()
    totals = run_passes(model, rows, chosen, batch, dense)
    add_ranks(lost, seen)
    by_layer = sparsity_by_layer(statistics)
    return {
        "percent": percent,
        "cett": low,
        "cett_by_layer": (lost[:, 0] / seen).tolist(),
        "thresholds": chosen_thresholds.tolist(),
        "sparsity": sum(by_layer) / layers,
        "sparsity_by_layer": by_layer,
        "perplexity": perplexity,
        "dense_perplexity": before,
        "tokens": int(totals[1].item()),
    }


def _perplexity(totals: Tensor) -> float:
    loss = totals[0].item() / totals[1].item()
    return math.inf if loss > 700 else math.exp(loss)
