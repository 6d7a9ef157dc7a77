"""A model in memory as lm-evaluation-harness sees it: log-likelihoods, generated text, the sparsity of both.

In: requests of lm-eval, the same on every rank. Out: their answers, on every rank; only `evaluation.py` imports this.
The ranks share out the batches, whose rows do not depend on how many ranks there are; so neither do the answers.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import ceil
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from prosparse.ffn import find_ffns, observing
from prosparse.group import gathered, rank_and_world
from prosparse.penalty import new_statistics, sparsity_by_layer, tally_kept
from prosparse.sparsity import add_ranks

SEED = 1234  # of sampled generations, with the number of the batch
T = TypeVar("T")
R = TypeVar("R")


class Harness(TemplateLM):
    """`model` with its tokenizer: every text that it computes begins with BOS once if `bos`, however it was rendered.

    batch: rows computed together. context: the most tokens of a text; one that is longer loses its beginning, not BOS.
    poll: called before each batch, on all ranks equally often. together: all ranks have to go through every forward
    pass, as under ZeRO-3.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        bos: bool,
        batch: int,
        context: int,
        poll: Callable[..., None],
        together: bool,
    ):
        super().__init__()
        self.model: Any = model
        self.tokenizer, self.bos, self.batch, self.max_length = tokenizer, bos, batch, context
        self.poll, self.together, self._device = poll, together, model.device
        self.statistics = new_statistics(len(find_ffns(model)), model.device)
        self.tokens = 0  # computed, on this rank
        self.mask: Tensor | None = None  # bool [batch, tokens]: what the next forward pass computes for a request
        self.counting = True

    # --- tokens -------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows."""
        return self.tokenizer.bos_token_id if self.bos else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        return self._begun(ids) if add_special_tokens is not False else ids

    def _begun(self, ids: list[int]) -> list[int]:
        """`ids` with BOS before them, unless it is there."""
        bos = self.tokenizer.bos_token_id
        return [bos, *ids] if self.bos and ids[:1] != [bos] else ids

    def _last(self, ids: list[int], room: int) -> list[int]:
        """The last `room` tokens of a text, its first being BOS where it has one."""
        if len(ids) <= room:
            return ids
        return self._begun(ids[len(ids) - room + int(self.bos) :])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **how)

    # --- what lm-eval asks for ----------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        return self._scores([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Of whole texts: each token once, in windows of `context` tokens that all begin with BOS if `bos`."""
        pairs, owner = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            if self.bos and ids[:1] == [self.tokenizer.bos_token_id]:
                ids = ids[1:]
            how = (ids, self.prefix_token_id, self.max_length - int(self.bos), 1)
            for window in map(make_disjoint_window, get_rolling_token_windows(*how)):
                pairs.append((self._begun(window[0]), window[1]))
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, (score, _) in zip(owner, self._scores(pairs), strict=True):
            sums[number] += score
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """The text after each context, up to a stop text of its task, EOS, or its number of new tokens."""
        answers = [""] * len(requests)
        by_kwargs: dict[str, list[tuple[int, list[int]]]] = {}
        for number, request in enumerate(requests):
            context, kwargs = request.args
            key = json.dumps(kwargs, sort_keys=True)
            by_kwargs.setdefault(key, []).append((number, self.tok_encode(context) or [self.prefix_token_id]))
        for key, texts in by_kwargs.items():
            how: Any = normalize_gen_kwargs(json.loads(key))
            how.pop("max_length", None)
            until, new = how.pop("until"), how.pop("max_gen_toks")
            if new >= self.max_length:
                raise ValueError(
                    f"a task wants up to {new} new tokens and the model has {self.max_length} positions: lower "
                    "generation_kwargs.max_gen_toks in the task's file"
                )
            kept = [(number, self._last(ids, self.max_length - new)) for number, ids in texts]
            groups = self._groups(kept, lambda text: text[1])
            made = self._shared(groups, partial(self._generate, new=new, until=until, how=how))
            for group, part in zip(groups, made, strict=True):
                for (number, _), answer in zip(group, part, strict=True):
                    answers[number] = answer
        return answers

    # --- computing ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each continuation after its context; equal inputs are computed once."""
        by_inputs: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for number, (context, continuation) in enumerate(pairs):
            if len(continuation) > self.max_length - 1:
                raise ValueError(
                    f"a task scores {len(continuation)} tokens after a text and the model has {self.max_length} "
                    "positions: leave the task out"
                )
            inputs = self._last([*(context or [self.prefix_token_id]), *continuation][:-1], self.max_length)
            by_inputs.setdefault(tuple(inputs), []).append((number, continuation))

        def compute(place: int, group: list[tuple[int, ...]]) -> list[tuple[int, float, bool]]:
            ids = torch.zeros(len(group), max(map(len, group)), dtype=torch.long)
            self.mask = torch.zeros(ids.shape, dtype=torch.bool)
            for row, inputs in enumerate(group):
                ids[row, : len(inputs)], self.mask[row, : len(inputs)] = torch.tensor(inputs), True
            self.mask = self.mask.to(self._device)
            logits = self.model(ids.to(self._device), attention_mask=self.mask.long(), use_cache=False).logits
            found = []
            for row, inputs in enumerate(group):
                for number, continuation in by_inputs[inputs]:
                    wanted = torch.tensor(continuation, device=self._device)
                    log_shares = F.log_softmax(logits[row, len(inputs) - len(wanted) : len(inputs)].float(), dim=-1)
                    score = log_shares.gather(-1, wanted[:, None]).sum().item()
                    found.append((number, score, bool((log_shares.argmax(-1) == wanted).all())))
            return found

        made = self._shared(self._groups(by_inputs, lambda inputs: inputs), compute)
        scores = {number: (score, greedy) for part in made for number, score, greedy in part}
        return [scores[number] for number in range(len(pairs))]

    @torch.no_grad()
    def _generate(
        self, place: int, group: list[tuple[int, list[int]]], new: int, until: list[str], how: dict
    ) -> list[str]:
        texts = [ids for _, ids in group]
        length = max(map(len, texts))
        own = self.model.generation_config
        listed = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        ends = sorted({self.eot_token_id, *listed} - {None})
        ids = torch.full((len(texts), length), ends[0])
        self.mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, text in enumerate(texts):
            ids[row, length - len(text) :], self.mask[row, length - len(text) :] = torch.tensor(text), True
        attention_mask, self.mask = self.mask.long().to(self._device), self.mask.to(self._device)
        stops = [stop for stop in until if stop]
        tail = max((len(stop.encode()) for stop in stops), default=0) + 1  # tokens enough for a stop text
        ended = [0] * len(texts)  # new tokens with which each row ended; 0: not yet

        def done(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            count = ids.shape[1] - length
            for row, made in enumerate(ids[:, length:].tolist()):
                said = self.tokenizer.decode(made[-tail:]) if stops and not ended[row] else ""
                if not ended[row] and (made[-1] in ends or any(stop in said for stop in stops)):
                    ended[row] = count
            over = torch.tensor([end > 0 for end in ended], device=ids.device)
            self.mask = ~over[:, None]  # what a row computes after its end is for nobody
            return over

        if how.get("do_sample"):
            torch.manual_seed(SEED + place)
        else:  # which transformers would warn of
            how = {key: value for key, value in how.items() if key not in ("temperature", "top_p", "top_k")}
        self.model.generation_config = GenerationConfig()  # a task's settings are all there is
        try:
            whole = self.model.generate(
                ids.to(self._device),
                attention_mask=attention_mask,
                max_new_tokens=new,
                eos_token_id=ends,
                pad_token_id=ends[0],
                stopping_criteria=[done],
                use_cache=True,
                synced_gpus=self.together,
                **how,
            )
        finally:
            self.model.generation_config = own
        answers = []
        for row, made in enumerate(whole[:, length:].tolist()):
            kept = made[: ended[row] or new]
            said = self.tokenizer.decode(kept[:-1] if kept[-1] in ends else kept, skip_special_tokens=True)
            answers.append(postprocess_generated_text(said, stops, None))
        return answers

    def _groups(self, items: Iterable[T], ids: Callable[[T], Sequence[int]]) -> list[list[T]]:
        """`items` in batches, those with the most ids first, so that rows of a batch are of similar length."""
        ordered = sorted(items, key=lambda item: (-len(ids(item)), tuple(ids(item))))
        return [ordered[i : i + self.batch] for i in range(0, len(ordered), self.batch)]

    def _shared(self, groups: Sequence[T], compute: Callable[[int, T], R]) -> list[R]:
        """compute(place, group) for every group, each on one rank; every rank has all results."""
        rank, world = rank_and_world()
        results: dict[int, R] = {}
        for first in range(0, ceil(len(groups) / world) * world, world):
            self.poll()
            place = first + rank
            self.counting = place < len(groups)
            if self.counting:
                results[place] = compute(place, groups[place])
            elif self.together:
                compute(0, groups[0])
        everything = {place: result for part in gathered(results) for place, result in part.items()}
        return [everything[place] for place in range(len(groups))]

    # --- sparsity -----------------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, count what is computed for requests, not their padding; the states of random numbers survive it."""

        def count(layer: int, x1: Tensor, tokens: Tensor | None = None, visits: int = 1) -> None:
            if not self.counting:
                return
            assert self.mask is not None
            self.tokens += int(self.mask.sum()) if layer == 0 else 0
            tally_kept(self.statistics[layer], x1, self.mask, tokens)

        states = random.getstate(), np.random.get_state()
        devices = [self._device] if self._device.type == "cuda" else []
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.random.fork_rng(devices), observing(self.model, count):
                yield
        finally:
            self.model.train(was_training)
            random.setstate(states[0])
            np.random.set_state(states[1])

    def sparsity(self) -> dict[str, Any]:
        """Of all that was computed since `forget`, on all ranks (which all call it)."""
        total, tokens = self.statistics.clone(), sum(gathered(self.tokens))
        add_ranks(total)
        layers = sparsity_by_layer(total)
        return {"sparsity": sum(layers) / len(layers), "sparsity_by_layer": layers, "tokens": tokens}

    def forget(self) -> None:
        self.statistics.zero_()
        self.tokens = 0
