"""Conversations of chat sources: their templates, tokens with labels on answers only, rows of whole documents.

In: rows with `messages`, or with prompt and answer, a tokenizer and a chat template. Out: conversations as JSON, their
token ids and labels, and int32 rows of `context` tokens in which documents lie whole, one after the other.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from prosparse.config import Source, Template

FORMAT = 1  # of the rows
UNLABELED = -100
PADDING = -1  # as a position
COLUMNS = ("input_ids", "labels", "positions")  # of a row's file
COUNTS = ("documents", "tokens", "rows", "dropped_tokens", "labeled_tokens", "left_out_documents")
TEMPLATES = {
    Template.chatml: (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    Template.minicpm: (  # that of the MiniCPM releases
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '<用户>' + message['content'].strip() + '<AI>' }}"
        "{% else %}{{ message['content'].strip() }}{% endif %}"
        "{% endfor %}"
    ),
}
Tokens = tuple[list[int], list[int]]  # ids and labels of one document


class Unfit(ValueError):
    """A conversation that the template does not render: (its canonical JSON, why)."""


def is_chat(source: Source) -> bool:
    return source.messages is not None or source.prompt is not None


def columns(source: Source) -> dict[str, str]:
    """The columns that a source reads, by the key that names each."""
    named = {key: getattr(source, key) for key in ("messages", "prompt", "answer")}
    return {key: name for key, name in named.items() if name is not None} or {"column": source.column}


def conversation(row: dict[str, Any], source: Source, where: str) -> str:
    """A row's messages, each with role and content, as canonical JSON.

    Raises ValueError that begins with `where` for what is no list of such messages, and for one without an answer: a
    message of the assistant that is not empty and has something before it.
    """
    found = [row[name] for name in columns(source).values()]
    roles = ("user", "assistant")
    turns = [{"role": role, "content": text} for role, text in zip(roles, found, strict=False)]
    messages = found[0] if source.messages is not None else turns
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        named = " and ".join(map(repr, columns(source).values()))
        raise ValueError(
            f"{where} has no conversation in {named} but {messages!r:.60}: give messages whose role and content are "
            "text, or remove the row"
        )
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages[1:]):
        raise ValueError(
            f"{where} has no answer to learn, no message of the assistant that is not empty: remove the row"
        )
    kept = [{key: message[key] for key in ("role", "content")} for message in messages]
    return json.dumps(kept, ensure_ascii=False, separators=(",", ":"))


def chat_template(tokenizer: PreTrainedTokenizerBase, choice: Template) -> str:
    """The Jinja text of a named template, or of the tokenizer's own; ValueError if it has none."""
    if choice is not Template.auto:
        return TEMPLATES[choice]
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: set data.template=chatml, or the one of the model")
    return tokenizer.get_chat_template()


def tokenize(tokenizer: Any, template: str, document: str, before: list[int], eos: int) -> Tokens:
    """Ids and labels of a conversation (canonical JSON), `before` at its start and EOS at its end.

    What the template renders for an answer, beyond the prompt that it answers, is labeled, and EOS; all else is -100.
    Each such piece is tokenized by itself, as at inference, where the prompt ends where the model goes on. What follows
    the last answer is left out. Raises Unfit.
    """
    ids, labels = list(before), [UNLABELED] * len(before)
    pieces = list(_pieces(tokenizer, template, document))
    last = pieces[-1][0].rstrip()
    if last.endswith(tokenizer.eos_token):
        pieces[-1] = (last, True)
    for text, answers in pieces:
        tokens = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        ids += tokens
        labels += tokens if answers else [UNLABELED] * len(tokens)
    if ids[-1] != eos:
        ids.append(eos)
        labels.append(eos)
    return ids, [UNLABELED, *labels[1:]]  # what comes before the first token is another document


def pack(documents: Iterable[Tokens], context: int, padding: int) -> tuple[np.ndarray, dict[str, int]]:
    """(int32 [columns, rows, context], counts): a document that does not fit the rest of a row starts the next one.

    A document is cut at `context` tokens, and left out if no label is left then. Padding has the token id `padding`.
    """
    rows: list[list[Tokens]] = []
    counts = dict.fromkeys(COUNTS, 0)
    room = 0
    for whole_ids, whole_labels in documents:
        ids, labels = whole_ids[:context], whole_labels[:context]
        labeled = int(np.not_equal(labels, UNLABELED).sum())
        counts["documents"] += 1
        counts["tokens"] += len(whole_ids)
        counts["dropped_tokens"] += len(whole_ids) - (len(ids) if labeled else 0)
        counts["labeled_tokens"] += labeled
        if not labeled:
            counts["left_out_documents"] += 1
            continue
        if len(ids) > room:
            rows.append([])
            room = context
        rows[-1].append((ids, labels))
        room -= len(ids)
    counts["rows"] = len(rows)
    packed = np.empty((3, len(rows), context), dtype="<i4")
    packed[:] = np.array([padding, UNLABELED, PADDING]).reshape(3, 1, 1)
    for number, row in enumerate(rows):
        start = 0
        for ids, labels in row:
            packed[:, number, start : start + len(ids)] = ids, labels, range(len(ids))
            start += len(ids)
    return packed, counts


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _pieces(tokenizer: Any, template: str, document: str) -> Iterator[tuple[str, bool]]:
    """The rendered text in pieces: (text, whether it is an answer), by turns."""
    messages = json.loads(document)
    done = ""

    def render(count: int, prompt: bool) -> str:
        options = {"chat_template": template, "tokenize": False, "add_generation_prompt": prompt}
        try:
            return tokenizer.apply_chat_template(messages[:count], **options)
        except (jinja2.TemplateError, TypeError) as error:
            raise Unfit(document, f"does not fit the chat template, which says: {error}") from error

    for number, message in enumerate(messages):
        if number == 0 or message["role"] != "assistant":
            continue
        prompt, whole = render(number, True), render(number + 1, False)
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise Unfit(document, "is rendered so that a prompt is not the beginning of its answer")
        bos = tokenizer.bos_token or ""
        yield prompt[len(done) :] if done else prompt.removeprefix(bos), False
        yield whole[len(prompt) :], True
        done = whole
