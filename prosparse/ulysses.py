"""Sequence parallelism (DeepSpeed Ulysses): the ranks of a group share rows, each has the same stretch of every row.

In: the ranks of a group, batches of whole rows. Out: a rank's stretch of a batch; a model whose attention sees whole
rows: its heads, not the tokens, are divided among the ranks while it runs. Everything else works token by token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prosparse.checks import require
from prosparse.data import Batch
from prosparse.group import on_any_rank, rank_and_world, shared

TAIL_SENSITIVE = ("dynamic", "longrope")  # rotary embeddings whose frequencies depend on a batch's last position


@dataclass(frozen=True)
class RowGroup:
    """The ranks that share rows with this one: group `number` of `groups`, in which this rank has the stretch `place`
    of `size`. Groups are neighbors, so that where `size` divides a host's ranks they lie on one host."""

    number: int
    groups: int
    place: int = 0
    size: int = 1
    ranks: Any = None  # their process group

    def cut(self, whole: Batch) -> Batch:
        """This rank's stretch of every row, with its positions."""
        if self.size == 1:
            return whole
        length = whole.input_ids.shape[1] // self.size
        positions = whole.position_ids
        if positions is None:
            positions = torch.arange(whole.input_ids.shape[1]).expand_as(whole.input_ids)
        parts = (whole.input_ids, whole.labels, whole.token_mask, positions)
        cut = (None if part is None else part.narrow(1, self.place * length, length).contiguous() for part in parts)
        return Batch(*cut)  # type: ignore[arg-type]

    def whole(self, part: Tensor) -> Tensor:
        """The stretches of all ranks of the group, [batch, context, ...], from each one's own (all of them call it)."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous(), group=self.ranks)
        return torch.cat(parts, dim=1)

    @contextmanager
    def attending(self, model: PreTrainedModel) -> Iterator[None]:
        """Within, models with the attention implementation of `model` take stretches of rows, with their positions.

        What activation checkpointing computes again has to lie within too.
        """
        if self.size == 1:
            yield
            return
        name = model.config._attn_implementation
        core = ALL_ATTENTION_FUNCTIONS[name]

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
            """[batch, heads, tokens, head size]; `mask` is of the stretch alone: without one `core` is causal."""
            repeats = getattr(module, "num_key_value_groups", None)
            sizes = (query.shape[0], query.shape[1], query.shape[3], key.shape[1])
            try:
                return _exchange(core, self.ranks, *sizes)(module, query, key, value, None, *args, **kwargs)
            finally:
                if repeats is not None:  # which it changes where there are fewer key heads than ranks
                    module.num_key_value_groups = repeats

        ALL_ATTENTION_FUNCTIONS[name] = attend
        try:
            yield
        finally:
            ALL_ATTENTION_FUNCTIONS[name] = core


@cache
def _exchange(core: Callable, ranks: Any, batch: int, heads: int, head_size: int, key_heads: int) -> Any:
    """DeepSpeed's attention around `core`: tokens are exchanged for heads and back."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    return UlyssesSPAttentionHF(core, batch, heads, head_size, key_heads, 1, ranks, seq_length_is_variable=True)


def no_sharing() -> RowGroup:
    """Every rank by itself."""
    return RowGroup(*rank_and_world())


def row_group(size: int) -> RowGroup:
    """Groups of `size` ranks (all ranks call it, once)."""
    if size == 1:
        return no_sharing()
    rank, world = rank_and_world()
    assert world % size == 0, "engine.deepspeed_config"
    ranks, _ = dist.new_subgroups(size)
    return RowGroup(rank // size, world // size, rank % size, size, ranks)


def check_divisible(text: PreTrainedConfig, size: int, attention: str, context: int) -> None:
    """ValueError unless the attention of a model with this text config can be divided among `size` ranks."""
    if size == 1:
        return
    key = f"sequence_parallel={size}"
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    sizes = [n for n in range(1, heads + 1) if heads % n == 0 and (key_heads % n == 0 or n % key_heads == 0)]
    require(
        size in sizes,
        f"{key} does not divide the model's {heads} attention heads and {key_heads} key heads: choose "
        f"{', '.join(map(str, sizes))}",
    )
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    require(
        window is None or window >= context or attention != "sdpa",
        f"{key}: the model attends to {window} tokens only, which sdpa does not know without a mask: set "
        f"attention=flash_attention_2, or a context of at most {window}",
    )
    rope = str(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None))
    kind = next((name for name in TAIL_SENSITIVE if f"'{name}'" in rope), None)
    require(
        kind is None,
        f"{key}: the model's rotary embeddings ({kind}) depend on the length of the row, of which a rank sees a part: "
        "set sequence_parallel=1, or choose another model",
    )


@torch.no_grad()
def check_attention(model: PreTrainedModel, group: RowGroup, context: int, batch: int) -> None:
    """ValueError unless the model gives the same logits for rows in stretches as for whole ones (all ranks call it).

    Three forward passes of `batch` short rows. Where attention does not pass through transformers' table of attention
    functions, a stretch sees nothing of the one before: the difference is compared with what that makes.
    """
    if group.size == 1:
        return
    length = min(context, 8 * group.size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (batch, length), generator=generator)
    rows = Batch(ids, ids)
    stretch = group.cut(rows).to(model.device).inputs()
    was_training = model.training
    model.eval()
    whole = model(**rows.to(model.device).inputs(), use_cache=False).logits.float()
    alone = group.whole(model(**stretch, use_cache=False).logits.float())
    with group.attending(model):
        together = group.whole(model(**stretch, use_cache=False).logits.float())
    model.train(was_training)
    close = bool((together - whole).norm() <= 0.1 * (alone - whole).norm())  # not so with NaN
    if any(on_any_rank(not close)):
        raise shared(
            ValueError(
                f"sequence_parallel={group.size}: {model.config.model_type} gives other logits for rows in parts than "
                "for whole ones: set sequence_parallel=1, or choose another model"
            )
        )
