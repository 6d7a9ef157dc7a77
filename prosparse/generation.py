"""Text from a model, and the sparsity of what was computed for it.

In: a model, its tokenizer, messages. Out: a `Generation`; the text goes piece by piece to `tell` as it comes.
Every forward pass is counted: the prompt's tokens, and those generated tokens that went through the model again.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from prosparse.checks import require
from prosparse.config import Auto
from prosparse.ffn import find_ffns, observing
from prosparse.penalty import COUNT, new_statistics, sparsity_by_layer, tally
from prosparse.verb_configs import Generate


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
    ended: str  # eos, turn (the template's end of one), max_new_tokens, or positions: the model has no more of them
    sparsity_prefill: float
    sparsity_generated: float | None
    sparsity_by_layer: list[float] | None
    prefill_seconds: float
    tokens_per_second: float | None


class TooLong(ValueError):
    """The prompt has more tokens than the model has positions."""


class _Stream(TextStreamer):
    """Tells the text as it comes, up to the template's end of a turn, and when each token came."""

    def __init__(self, tokenizer: Any, turn_end: str, tell: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tell, self.turn_end = tell, turn_end
        self.held = ""  # may be the beginning of the end
        self.seconds: list[float] = []  # of the prompt and then of each token

    def put(self, value: Tensor) -> None:
        self.seconds.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.held += text
        sure = _until(self.held, self.turn_end)
        if sure == self.held and not stream_end:
            sure = sure[: max(0, len(sure) - len(self.turn_end))]
        self.held = self.held[len(sure) :]
        if sure or stream_end:
            self.tell(sure + "\n" * stream_end)


def converse(config: Generate, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """The turns of a conversation, as `Generation` dicts: one with config.prompt, else those typed at the terminal.

    Text goes to stderr as it comes. A conversation that outgrows the model's positions ends, a first prompt raises.
    """
    messages = [] if config.system is None else [{"role": "system", "content": config.system}]
    turns: list[dict] = []
    for line in _typed() if config.prompt is None else [config.prompt]:
        messages.append({"role": "user", "content": line})
        try:
            turn = generate(
                model,
                tokenizer,
                messages,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                chat=config.chat,
                tell=lambda text: print(text, end="", file=sys.stderr, flush=True),
            )
        except TooLong as error:
            if not turns:
                raise
            print(f"the conversation ends here: {error}", file=sys.stderr)
            break
        messages.append({"role": "assistant", "content": turn.answer})
        turns.append(asdict(turn))
        spoken = f"prompt {turn.prompt_tokens} tokens, sparsity {turn.sparsity_prefill:.2%}"
        if turn.sparsity_generated is not None:
            spoken += f"  answer {turn.generated_tokens} tokens, sparsity {turn.sparsity_generated:.2%}"
            spoken += f", {turn.tokens_per_second:.1f} tokens/s"
        print(f"[{spoken}  ended by {turn.ended}]", file=sys.stderr)
    return turns


def _typed() -> Iterator[str]:
    """The lines typed at the terminal, up to an empty one or Ctrl-D."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    chat: Auto = Auto.auto,
    tell: Callable[[str], None] = lambda text: None,
) -> Generation:
    """What `model` says after `messages`: {"role": system | user | assistant, "content": text}, the last the prompt.

    Temperature 0 takes the likeliest token, any other samples with torch's global random state. With Auto.none, or
    without a template, the contents are one text, a line each, after BOS if the tokenizer has one.
    The answer ends at EOS (of the model's generation config or the tokenizer), nothing else of that config is used,
    and before what the template renders at the end of an answer.
    Raises ValueError if the template refuses the messages, or the model has an unknown FFN; TooLong.
    """
    ids = _encode(tokenizer, messages, chat)
    opened: Any = model  # whose methods transformers mixes in
    vocabulary, positions = opened.get_input_embeddings().num_embeddings, _positions(model)
    highest, length = max(ids), len(ids)
    require(highest < vocabulary, f"the tokenizer gives token {highest}, but the model has {vocabulary}: not its own")
    if length > positions:
        raise TooLong(f"the prompt has {length} tokens, the model {positions} positions: shorten it")
    room = int(min(max_new_tokens, positions - length + 1))  # the last token needs no position
    ends = {*_as_list(opened.generation_config.eos_token_id), *_as_list(tokenizer.eos_token_id)}
    turn_end = _turn_end(tokenizer, messages, chat)
    stream = _Stream(tokenizer, turn_end, tell)
    statistics = [new_statistics(len(find_ffns(model)), model.device) for _ in ("prefill", "generated")]

    def count(layer: int, x1: Tensor, **routing: Any) -> None:
        counted = statistics[len(stream.seconds) > 1][layer]
        tally(counted, x1, x1.sign(), torch.tensor(x1.numel(), dtype=torch.float64))

    def turn_ended(ids: Tensor, scores: Any) -> Tensor:
        newest = ids[0, length:][-len(turn_end.encode()) :]  # tokens enough for the end's characters
        return torch.tensor([bool(turn_end) and turn_end in tokenizer.decode(newest)], device=ids.device)

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
                stopping_criteria=[turn_ended],
                streamer=stream,
            )
    finally:
        opened.generation_config = own
    new = whole[0, length:].tolist()
    ended = "max_new_tokens" if room == max_new_tokens else "positions"
    if new[-1] in ends or turn_ended(whole, None):
        ended = "eos" if new[-1] in ends else "turn"
    prefill, generated = statistics
    layers = sparsity_by_layer(generated) if generated[:, COUNT].all() else None
    start, first, *_, last = [*stream.seconds, stream.seconds[-1]]
    return Generation(
        prompt=messages[-1]["content"],
        answer=_until(str(tokenizer.decode(new, skip_special_tokens=True)), turn_end),
        prompt_tokens=length,
        generated_tokens=len(new),
        ended=ended,
        sparsity_prefill=_mean(sparsity_by_layer(prefill)),
        sparsity_generated=None if layers is None else _mean(layers),
        sparsity_by_layer=layers,
        prefill_seconds=first - start,
        tokens_per_second=None if layers is None else (len(new) - 1) / (last - first),
    )


def _encode(tokenizer: Any, messages: Sequence[dict[str, str]], chat: Auto) -> list[int]:
    if chat is Auto.auto and tokenizer.chat_template is not None:
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


def _turn_end(tokenizer: Any, messages: Sequence[dict[str, str]], chat: Auto) -> str:
    """What the chat template renders after an answer to `messages`, without white space around it; may be empty."""
    if chat is Auto.none or tokenizer.chat_template is None:
        return ""
    answer = {"role": "assistant", "content": "ANSWER"}
    try:
        return tokenizer.apply_chat_template([*messages, answer], tokenize=False).rpartition("ANSWER")[2].strip()
    except TemplateError:
        return ""


def _until(text: str, end: str) -> str:
    return text.partition(end)[0] if end else text


def _positions(model: PreTrainedModel) -> float:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def _mean(layers: list[float]) -> float:
    return sum(layers) / len(layers)
