"""Text from a model, and the sparsity of what was computed for it.

In: a model, its tokenizer, messages. Out: a `Generation`; the text goes piece by piece to `tell` as it comes.
Every forward pass is counted: the prompt's tokens, and those generated tokens that went through the model again.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from prosparse.checks import require
from prosparse.config import Chat
from prosparse.ffn import find_ffns, observing
from prosparse.penalty import COUNT, new_statistics, sparsity_by_layer, tally


@dataclass
class Generation:
    """Sparsity = share of exact zeros in the intermediate, mean over layers; null where no token was computed.

    The last generated token is not computed any more: `sparsity_generated` and `sparsity_by_layer` are those of the
    others, `tokens_per_second` is their speed, counting included, after the prompt's.
    """

    prompt: str
    answer: str
    prompt_tokens: int
    generated_tokens: int
    ended: str  # eos, max_new_tokens, or positions: the model has no more of them
    sparsity_prefill: float
    sparsity_generated: float | None
    sparsity_by_layer: list[float] | None
    prefill_seconds: float
    tokens_per_second: float | None


class _Stream(TextStreamer):
    """Tells the text as it comes, and when each token did."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tell = tell
        self.seconds: list[float] = []  # of the prompt and then of each token

    def put(self, value: Tensor) -> None:
        self.seconds.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.tell(text + "\n" * stream_end)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    chat: Chat = Chat.auto,
    tell: Callable[[str], None] = lambda text: None,
) -> Generation:
    """What `model` says after `messages`: {"role": system | user | assistant, "content": text}, the last the prompt.

    Temperature 0 takes the likeliest token, any other samples with torch's global random state. With Chat.none, or
    without a template, the contents are one text, a line each, after BOS if the tokenizer has one.
    The answer ends at EOS (of the model's generation config or the tokenizer), nothing else of that config is used.
    Raises ValueError if the template refuses the messages, the model has too few positions, or an unknown FFN.
    """
    ids = _encode(tokenizer, messages, chat)
    opened: Any = model  # whose methods transformers mixes in
    vocabulary, positions = opened.get_input_embeddings().num_embeddings, _positions(model)
    highest, length = max(ids), len(ids)
    require(highest < vocabulary, f"the tokenizer gives token {highest}, but the model has {vocabulary}: not its own")
    require(length <= positions, f"the prompt has {length} tokens, the model {positions} positions: shorten it")
    room = int(min(max_new_tokens, positions - length + 1))  # the last token needs no position
    ends = {*_as_list(opened.generation_config.eos_token_id), *_as_list(tokenizer.eos_token_id)}
    stream = _Stream(tokenizer, tell)
    statistics = [new_statistics(len(find_ffns(model)), model.device) for _ in ("prefill", "generated")]

    def count(layer: int, x1: Tensor, **routing: Any) -> None:
        counted = statistics[len(stream.seconds) > 1][layer]
        tally(counted, x1, x1.sign(), torch.tensor(x1.numel(), dtype=torch.float64))

    prompt = torch.tensor([ids], device=model.device)
    own, opened.generation_config = opened.generation_config, GenerationConfig()
    try:
        with observing(model, count):
            whole = opened.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=room,
                do_sample=temperature > 0,
                **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
                eos_token_id=sorted(ends) or None,
                pad_token_id=min(ends, default=0),  # not used: a batch of one has no padding
                streamer=stream,
            )
    finally:
        opened.generation_config = own
    new = whole[0, length:].tolist()
    prefill, generated = statistics
    layers = sparsity_by_layer(generated) if generated[:, COUNT].all() else None
    start, first, *_, last = [*stream.seconds, stream.seconds[-1]]
    return Generation(
        prompt=messages[-1]["content"],
        answer=str(tokenizer.decode(new, skip_special_tokens=True)),
        prompt_tokens=length,
        generated_tokens=len(new),
        ended="eos" if new[-1] in ends else "max_new_tokens" if room == max_new_tokens else "positions",
        sparsity_prefill=_mean(sparsity_by_layer(prefill)),
        sparsity_generated=None if layers is None else _mean(layers),
        sparsity_by_layer=layers,
        prefill_seconds=first - start,
        tokens_per_second=None if layers is None else (len(new) - 1) / (last - first),
    )


def _encode(tokenizer: Any, messages: Sequence[dict[str, str]], chat: Chat) -> list[int]:
    if chat is Chat.auto and tokenizer.chat_template is not None:
        try:  # the template's own text says where BOS stands
            return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True).input_ids
        except TemplateError as error:
            raise ValueError(f"the tokenizer's chat template refuses the messages: {error}") from error
    system = any(message["role"] == "system" for message in messages)
    require(not system, "system is given, but no chat template is used: leave it out, or put it into the prompt")
    text = "\n".join(message["content"] for message in messages)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [*bos, *tokenizer(text, add_special_tokens=False, verbose=False).input_ids]
    require(len(ids) > 0, "the prompt has no token: give text")
    return ids


def _positions(model: PreTrainedModel) -> float:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def _mean(layers: list[float]) -> float:
    return sum(layers) / len(layers)
