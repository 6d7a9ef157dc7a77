"""Which neurons are active: per token, never, again at the next token, in batches of tokens together, how often.

In: the intermediates of a pass of `sparsity.measure`. Out: counts, as shares; neurons.safetensors. docs/metrics.md has
the formulas.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from prosparse.data import Batch
from prosparse.group import gathered

# The hot neurons of a layer are the fewest that make up this share of its activations (PowerInfer, section 3).
HOT = 0.8
UNIONS = (1, 2, 4, 8, 16)  # tokens of a batch


class Activity:
    """Counts of active neurons (x1 != 0) in the pass of `measure`; integers, so that sums over ranks are exact.

    per_token: tokens by the number of neurons active in all layers together. By layer: fired [neurons], tokens at which
    each is active; again [2], of the neurons active at a token that has a next one in its row, how many there are and
    how many are active there too; union [5, 2], neurons that batches of 1, 2, 4, 8, 16 tokens activate together and how
    many they have. The neurons of experts are not told apart: there are no such counts of them.
    """

    def __init__(self, layers: int) -> None:
        self.per_token: Tensor | None = None
        self.fired, self.again, self.union = ([None] * layers for _ in range(3))  # type: list, list, list
        self.widths = [0] * layers
        self._now: Tensor | None = None  # active neurons of each token of the batch, so far

    def see(self, layer: int, x1: Tensor, data: Batch, tokens: Tensor | None, visits: int) -> None:
        """Count one layer of one batch."""
        self.widths[layer] = x1.shape[-1] * visits
        shape = data.input_ids.shape
        if tokens is not None:
            count = torch.zeros(shape.numel(), dtype=torch.int64, device=x1.device)
            count.index_add_(0, tokens, _trues(x1 != 0, -1).long())
        else:
            active = (x1 != 0).view(*shape, -1)
            if data.token_mask is not None:
                active &= data.token_mask[..., None]
            count = _trues(active, -1)
            followed = count[:, :-1] if data.token_mask is None else count[:, :-1] * data.token_mask[:, 1:]
            again = torch.stack([followed.sum(), _trues(active[:, 1:] & active[:, :-1], -1).sum()])
            flat = active.flatten(0, 1) if data.token_mask is None else active[data.token_mask]
            for name, seen in (("fired", _trues(flat, 0).long()), ("again", again), ("union", _unions(flat))):
                so_far = getattr(self, name)
                so_far[layer] = seen if so_far[layer] is None else so_far[layer] + seen
        self._now = count.flatten() + (0 if self._now is None else self._now)

    def ended(self, data: Batch) -> None:
        """One batch has gone through all layers."""
        assert self._now is not None
        now = self._now if data.token_mask is None else self._now[data.token_mask.flatten()]
        seen = now.bincount(minlength=sum(self.widths) + 1)
        self.per_token = seen if self.per_token is None else self.per_token + seen
        self._now = None

    def add_ranks(self) -> None:
        """Make the counts those of all ranks."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            seen = gathered((self.widths, [None if part is None else part.cpu() for part in self._parts()]))
            self.widths = max(widths for widths, _ in seen)  # a rank without rows has none
            self._put([_sum(counts) for counts in zip(*(parts for _, parts in seen), strict=True)])

    def __add__(self, other: "Activity") -> "Activity":
        both = Activity(len(self.widths))
        both.widths = self.widths
        both._put([_sum(pair) for pair in zip(self._parts(), other._parts(), strict=True)])
        return both

    def _parts(self) -> list[Tensor | None]:
        return [self.per_token, *self.fired, *self.again, *self.union]

    def _put(self, parts: list[Tensor | None]) -> None:
        layers = len(self.widths)
        self.per_token = parts[0]
        self.fired, self.again, self.union = (parts[1 + i * layers :][:layers] for i in range(3))

    def tokens(self) -> int:
        """How many tokens were seen."""
        assert self.per_token is not None
        return int(self.per_token.sum())

    def frequency(self) -> list[Tensor]:
        """By layer the share of tokens at which each neuron is active, fp64 [neurons]; ValueError for experts."""
        if any(part is None for part in self.fired):
            raise ValueError("neurons=true: the neurons of experts are not told apart; set it to false")
        return [part.double() / self.tokens() for part in self.fired]

    def to_dict(self) -> dict[str, Any]:
        """active_per_token (neurons of a layer, mean over layers), dead, reuse and union (shares); None for experts."""
        assert self.per_token is not None
        layers, tokens, seen = len(self.widths), self.tokens(), self.per_token.double()
        ends = self.per_token.cumsum(0)
        per_token: dict[str, float] = {"mean": (seen @ torch.arange(len(seen)).to(seen)).item() / tokens / layers}
        for name, share in (("p50", 0.5), ("p95", 0.95)):
            per_token[name] = int(torch.searchsorted(ends, math.ceil(share * tokens))) / layers
        per_token["neurons"] = sum(self.widths) / layers
        found: dict[str, Any] = {"active_per_token": per_token, "dead": None, "reuse": None, "union": None}
        if all(part is not None for part in self.fired):
            dead = [(part == 0).double().mean().item() for part in self.fired]
            found["dead"] = {"share": sum(dead) / layers, "by_layer": dead, "tokens": tokens}
            again = [_share(part[1], part[0]) for part in self.again]
            known = [share for share in again if share is not None]
            found["reuse"] = {"share": sum(known) / len(known) if known else None, "by_layer": again}
            shares = torch.stack([part[:, 0].double() / part[:, 1] for part in self.union]).mean(0).tolist()
            found["union"] = {
                str(size): share for size, share in zip(UNIONS, shares, strict=True) if not math.isnan(share)
            }
        return found


def _trues(active: Tensor, dim: int) -> Tensor:
    """How many are true along `dim`, int32: several times faster on bytes than on bool."""
    return active.view(torch.uint8).sum(dim, dtype=torch.int32)


def _unions(active: Tensor) -> Tensor:
    """[sizes of UNIONS, (true in the union, of)]; active: bool [tokens, neurons] of the rows measured together.

    A batch of 16 takes a token from each sixteenth of them, so from different rows if 16 are measured together; one of
    8 takes every other of those.
    """
    stride = len(active) // UNIONS[-1]
    groups = active[: UNIONS[-1] * stride].view(UNIONS[-1], stride, -1)
    found = []
    for _ in UNIONS:
        found.append(torch.stack([_trues(groups, -1).sum(), torch.tensor(groups.numel(), device=active.device)]))
        groups = groups[: len(groups) // 2] | groups[len(groups) // 2 :]
    return torch.stack(found)


def _share(part: Tensor, of: Tensor) -> float | None:
    return (part / of).item() if of > 0 else None


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return sum(known[1:], start=known[0]) if known else None


def hot(frequency: Tensor) -> Tensor:
    """Which neurons of a layer are hot, bool [neurons]; frequency: the share of tokens at which each fires."""
    order = frequency.argsort(descending=True, stable=True)
    before = frequency[order].cumsum(0) - frequency[order]
    chosen = torch.zeros_like(frequency, dtype=torch.bool)
    chosen[order] = before < HOT * frequency.sum()
    return chosen & (frequency > 0)


def save_neurons(activities: dict[str, Activity], folder: Path) -> dict:
    """Write how often neurons fire to folder/neurons.safetensors and return what it says of hot and cold neurons.

    By name of the text, NAME.layers.N.frequency (fp32 [neurons]) and NAME.layers.N.hot (bool [neurons]).
    """
    tensors: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    for text, activity in activities.items():
        frequencies = [frequency.float().cpu() for frequency in activity.frequency()]
        sets = [hot(frequency) for frequency in frequencies]
        for layer, (frequency, warm) in enumerate(zip(frequencies, sets, strict=True)):
            tensors |= {f"{text}.layers.{layer}.frequency": frequency, f"{text}.layers.{layer}.hot": warm}
        said[text] = {
            "hot_by_layer": [warm.float().mean().item() for warm in sets],
            "never_by_layer": [(frequency == 0).float().mean().item() for frequency in frequencies],
            "always_by_layer": [(frequency == 1).float().mean().item() for frequency in frequencies],
        }
    save_file(tensors, folder / "neurons.safetensors")
    return {"file": str(folder / "neurons.safetensors"), "hot_makes_up": HOT, "texts": said}
