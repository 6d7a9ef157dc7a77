"""Conversations of chat sources: their templates, tokens with labels on answers only, rows of whole documents.

In: rows with `messages`, or with prompt and answer, a tokenizer and a chat template. Out: conversations as JSON, their
token ids and labels, and int32 rows of `context` tokens in which documents lie whole, one after the other.
"""

import json
from collections.abc import Iterable
from itertools import takewhile
from operator import eq
from typing import Any

import jinja2
import numpy as np

from prosparse.config import Auto, Source, Template

FORMAT = 2  # of the rows
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


def chat_template(tokenizer: Any, choice: Template, bos: Auto) -> str:
    """The Jinja text of a named template, which renders BOS first as `bos` says, or of the tokenizer's own as it is.

    Raises ValueError if the tokenizer has none of its own.
    """
    if choice is Template.auto:
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template: set data.template=chatml, or the one of the model")
        return tokenizer.get_chat_template()
    template = TEMPLATES[choice]
    if bos is Auto.none or tokenizer.bos_token is None or begins_with_bos(tokenizer, template):
        return template  # ChatML where <|im_start|> is BOS has it already
    return "{{ bos_token }}" + template


def begins_with_bos(tokenizer: Any, template: str) -> bool:
    """Whether the template renders BOS first."""
    message, token = {"role": "user", "content": ""}, tokenizer.bos_token
    return token is not None and _render(tokenizer, template, [message], True).startswith(token)


def tokenize(tokenizer: Any, template: str, document: str, eos: int) -> Tokens:
    """Ids and labels of a conversation (canonical JSON), with EOS at its end.

    What the template renders for an answer, beyond the prompt that it answers, is labeled, and EOS; all else is -100.
    The ids are those of the whole text, so each prompt has those that it has by itself, at inference. Where it would
    not have them, for a token reaches into the answer, the text after the prompt is tokenized by itself.
    What follows the last answer is left out. Raises Unfit.
    """
    texts = _texts(tokenizer, template, document)
    answer = texts[-1].removeprefix(texts[-2]).rstrip()
    if answer.endswith(tokenizer.eos_token):
        texts[-1] = texts[-2] + answer
    ids: list[int] = []
    labels: list[int] = []
    start, done = 0, 0  # of the texts, and of the characters
    while start < len(texts):
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        made = tokenizer([text[done:] for text in texts[start:]], **options)["input_ids"]
        last = len(made) - 1
        prompts = range(start % 2, last, 2)
        while torn := [i for i in prompts if i < last and made[i] != made[last][: len(made[i])]]:
            last = torn[0]
        whole = made[last]
        learned = [UNLABELED] * len(whole)
        for i in range(1 - start % 2, last + 1, 2):
            same = sum(takewhile(bool, map(eq, made[i], whole)))  # a token over the answer's end is no part of it
            answered = slice(len(made[i - 1]) if i else 0, same)
            learned[answered] = whole[answered]
        ids += whole
        labels += learned
        start, done = start + last + 1, len(texts[start + last])
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


def _texts(tokenizer: Any, template: str, document: str) -> list[str]:
    """The rendered text from its beginning to the end of each prompt and of its answer, by turns."""
    messages = json.loads(document)
    texts = [""]
    for number, message in enumerate(messages):
        if number == 0 or message["role"] != "assistant":
            continue
        try:
            prompt = _render(tokenizer, template, messages[:number], True)
            whole = _render(tokenizer, template, messages[: number + 1], False)
        except (jinja2.TemplateError, TypeError) as error:
            raise Unfit(document, f"does not fit the chat template, which says: {error}") from error
        if not (prompt.startswith(texts[-1]) and whole.startswith(prompt)):
            raise Unfit(document, "is rendered so that a prompt is not the beginning of its answer")
        texts += [prompt, whole]
    return texts[1:]


def _render(tokenizer: Any, template: str, messages: list[dict[str, str]], prompt: bool) -> str:
    options = {"chat_template": template, "tokenize": False, "add_generation_prompt": prompt}
    return tokenizer.apply_chat_template(messages, **options)
