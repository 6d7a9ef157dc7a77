"""From documents to token ids: units of text that processes tokenize side by side, in order.

In: documents, a tokenizer. Out: the tokens of a few documents at a time, each few of one side (training or held out).
Documents go into units by their order alone, so how many processes there are changes nothing but the time.
"""

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from prosparse import chat, signals
from prosparse.sources import Document, Long, pieces

UNIT_CHARACTERS = 2**20  # the document that reaches this length ends a unit
Control = tuple[list[int], int]  # token ids: what goes before a document ([BOS] or nothing), and EOS


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out `share` (0 to 1): decided by its own text, so alike everywhere."""
    return xxhash.xxh3_64_intdigest(text.encode()) < share * 2**64


@dataclass
class Item:
    """Text of one side that is tokenized together."""

    held_out: bool
    texts: list[tuple[str, bool, bool]]  # each with whether it begins and whether it ends a document
    ends: bool  # the unit
    template: str | None


def units(documents: Iterable[Document], share: float, template: str | None) -> Iterator[Item]:
    """Gather the documents that are not empty into units of one side each; long ones come in several items."""
    waiting: dict[bool, list[tuple[str, bool, bool]]] = {False: [], True: []}
    characters = {False: 0, True: 0}
    for document in documents:
        if isinstance(document, Long):
            side, parts = document.digest < share * 2**64, document.pieces()
        else:
            side = is_held_out(document, share)
            parts = pieces([document]) if template is None else iter([document])
        text, begins = next(parts, ""), True
        while text:
            following = next(parts, "")
            waiting[side].append((text, begins, not following))
            characters[side] += len(text)
            ends = not following and characters[side] >= UNIT_CHARACTERS
            if ends or following:
                yield Item(side, waiting[side], ends, template)
                waiting[side] = []
            if ends:
                characters[side] = 0
            text, begins = following, False
    yield from (Item(side, texts, True, template) for side, texts in waiting.items() if texts)


@dataclass
class Tokens:
    """An item's tokens, one text after the other."""

    held_out: bool
    ends: bool  # the unit
    documents: int  # that begin here
    characters: int
    ids: np.ndarray  # int32
    labels: np.ndarray  # int32, of conversations; else empty
    lengths: list[int]  # of each conversation
    seconds: float  # of the CPU


def _tokenize(tokenizer: Any, control: Control, item: Item) -> Tokens:
    began, (before, eos) = time.process_time(), control
    texts = [text for text, _, _ in item.texts]
    labels, lengths = np.empty(0, np.int32), []
    if item.template is not None:
        made = [chat.tokenize(tokenizer, item.template, text, eos) for text in texts]
        ids, labels = (np.concatenate([np.array(document[part], np.int32) for document in made]) for part in (0, 1))
        lengths = [len(document[0]) for document in made]
    else:
        options = {"add_special_tokens": False, "split_special_tokens": True}  # "</s>" in a text is text
        encoded = tokenizer(texts, **options, return_attention_mask=False, verbose=False)["input_ids"]
        bounds = [(before if begins else [], [eos] if ends else []) for _, begins, ends in item.texts]
        whole = [[*first, *ids, *last] for ids, (first, last) in zip(encoded, bounds, strict=True)]
        ids = np.concatenate([np.array(text, np.int32) for text in whole])
    documents, characters = sum(begins for _, begins, _ in item.texts), sum(map(len, texts))
    seconds = time.process_time() - began
    return Tokens(item.held_out, item.ends, documents, characters, ids, labels, lengths, seconds)


class Workers:
    """Processes that tokenize; with one, this process does it itself."""

    def __init__(self, tokenizer: Any, control: Control, processes: int):
        self.eos, self._processes = control[1], processes
        self._own = lambda item: _tokenize(tokenizer, control, item)
        fork = multiprocessing.get_context("fork")  # they share this one's libraries
        start = (os.getpid(), tokenizer, control)
        self._pool = ProcessPoolExecutor(processes, fork, _start_worker, start) if processes > 1 else None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def in_order(self, items: Iterable[tuple[int, Item | None]]) -> Iterator[tuple[int, Tokens | None]]:
        """The tokens of items in the items' order; reads only a few items ahead."""
        if self._pool is None:
            yield from ((number, None if item is None else self._own(item)) for number, item in items)
            return
        waiting: deque[tuple[int, Future[Tokens] | None]] = deque()
        try:
            for number, item in items:
                waiting.append((number, None if item is None else self._pool.submit(_work, item)))
                if len(waiting) > 2 * self._processes:
                    yield _result(waiting.popleft())
            yield from map(_result, waiting)
        except BrokenProcessPool as error:
            raise OSError(
                "a process that tokenized was killed, maybe for want of memory: lower data.processes and prepare again"
            ) from error


def _result(waiting: tuple[int, "Future[Tokens] | None"]) -> tuple[int, Tokens | None]:
    number, future = waiting
    return number, None if future is None else future.result()


_in_worker: tuple[Any, Control]  # in a process that tokenizes: with what


def _start_worker(parent: int, tokenizer: Any, control: Control) -> None:
    global _in_worker
    _in_worker = tokenizer, control
    gc.freeze()  # what is shared with the parent stays shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in signals.SIGNALS:  # the process that reads and writes obeys them
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process after its parent, which may be killed at any time."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(item: Item) -> Tokens:
    return _tokenize(*_in_worker, item)
