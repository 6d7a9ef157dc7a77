"""All measurements of activations and perplexity.

In: a model (Hugging Face or substituted, also sharded by an engine) and token rows. Out: a `Measurement`.
Called on every rank of a process group it shares the rows among them and sums exactly.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from prosparse.data import batch as make_batch
from prosparse.ffn import find_ffns, observing
from prosparse.penalty import COUNT, mean_abs_by_layer, new_statistics, row_mask, sparsity_by_layer, tally

# The hot neurons of a layer are the fewest that make up this share of its activations (PowerInfer, section 3).
HOT = 0.8


@dataclass
class Measurement:
    """Perplexity over labeled tokens; sparsity = share of exact zeros in the intermediate, mean over layers."""

    perplexity: float
    loss: float
    tokens: int
    sparsity: float
    sparsity_by_layer: list[float]
    mean_abs_by_layer: list[float]


def language_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy, fp32 0-d: position p of `logits` [batch, context, vocabulary] predicts label p + 1.

    `labels` [batch, context]; -100 is not counted.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


def labeled(labels: Tensor) -> int:
    """How many labels of [batch, context] `language_loss` counts."""
    return int((labels[:, 1:] != -100).sum())


def spread(rows: int, wanted: int | None) -> list[int]:
    """At most `wanted` indices spread evenly over `rows`."""
    if wanted is None or wanted >= rows:
        return list(range(rows))
    return np.linspace(0, rows - 1, wanted).round().astype(int).tolist()


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    rows: Sequence[np.ndarray],
    *,
    batch: int = 4,
    indices: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
    fired: list[Tensor] | None = None,
) -> Measurement:
    """Perplexity and sparsity of `model` on `rows` (see `Rows`), or on those named by `indices`.

    An empty list `fired` is given one tensor a layer: the share of tokens at which each of its neurons was not zero,
    [neurons]; in one process only, and not of experts.
    Any model whose FFNs and activation are known can be measured, substituted or not.
    In a process group every rank has to call it; each measures its share and all return the same result.
    Raises ValueError if there are no rows, the model has no FFN that is known, or experts are asked for what `fired`.
    """
    chosen = list(range(len(rows))) if indices is None else list(indices)
    if not chosen:
        raise ValueError("there are no rows to measure: the text is shorter than one row of `context` tokens")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = model.device
    share = [chosen[i : i + batch] for i in range(0, len(chosen), batch)][rank::world]
    passes = math.ceil(math.ceil(len(chosen) / batch) / world)
    statistics = new_statistics(len(find_ffns(model)), device)
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # summed loss, labeled tokens
    mask: Tensor | None = None
    own = False

    def count(layer: int, x1: Tensor, tokens: Tensor | None = None, visits: int = 1) -> None:
        if own:
            kept = row_mask(mask, x1, tokens)
            x1 = x1.flatten(0, -2) if kept is None else x1[kept]
            tally(statistics[layer], x1, x1.sign(), torch.tensor(x1.numel(), dtype=torch.float64))
            if fired is not None:
                if tokens is not None:
                    raise ValueError("neurons=true: the neurons of experts are not told apart; set it to false")
                active = (x1 != 0).sum(0)
                if layer == len(fired):
                    fired.append(active)
                else:
                    fired[layer] += active

    was_training = model.training
    model.eval()
    for number in range(passes):
        # A rank without rows of its own goes through the forward pass too: under ZeRO-3 it holds a part of the weights.
        own = number < len(share)
        data = make_batch(rows, share[number] if own else chosen[:1]).to(device)
        mask = data.token_mask
        with observing(model, count):
            logits = model(**data.inputs(), use_cache=False).logits
        if own:
            totals += torch.stack(
                [language_loss(logits, data.labels).double(), totals.new_tensor(labeled(data.labels))]
            )
        if progress is not None:
            progress(number + 1, passes)
    model.train(was_training)
    if world > 1:
        dist.all_reduce(statistics)
        dist.all_reduce(totals)
    loss, tokens = totals[0].item() / totals[1].item(), int(totals[1].item())
    if fired is not None:
        fired[:] = [count * count.numel() / row[COUNT] for count, row in zip(fired, statistics, strict=True)]
    layers = sparsity_by_layer(statistics)
    perplexity = math.inf if loss > 700 else math.exp(loss)
    return Measurement(perplexity, loss, tokens, sum(layers) / len(layers), layers, mean_abs_by_layer(statistics))


def hot(frequency: Tensor) -> Tensor:
    """Which neurons of a layer are hot, bool [neurons]; frequency: the share of tokens at which each fires."""
    order = frequency.argsort(descending=True, stable=True)
    before = frequency[order].cumsum(0) - frequency[order]
    chosen = torch.zeros_like(frequency, dtype=torch.bool)
    chosen[order] = before < HOT * frequency.sum()
    return chosen & (frequency > 0)


def save_neurons(fired: Sequence[Tensor], text: str, folder: Path) -> dict:
    """Write `fired` of `measure` to folder/neurons.safetensors and return what it says of hot and cold neurons.

    The file has layers.N.frequency (fp32 [neurons]) and layers.N.hot (bool [neurons]), in its metadata the `text`.
    """
    frequencies = [frequency.float().cpu() for frequency in fired]
    sets = [hot(frequency) for frequency in frequencies]
    tensors: dict[str, Tensor] = {}
    for layer, (frequency, warm) in enumerate(zip(frequencies, sets, strict=True)):
        tensors |= {f"layers.{layer}.frequency": frequency, f"layers.{layer}.hot": warm}
    save_file(tensors, folder / "neurons.safetensors", metadata={"text": text})
    return {
        "file": str(folder / "neurons.safetensors"),
        "hot_makes_up": HOT,
        "hot_by_layer": [warm.float().mean().item() for warm in sets],
        "never_by_layer": [(frequency == 0).float().mean().item() for frequency in frequencies],
        "always_by_layer": [(frequency == 1).float().mean().item() for frequency in frequencies],
    }
