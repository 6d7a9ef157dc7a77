"""Conversations become rows with labels on answers only; their documents do not see each other; mistakes are named."""

import json
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_llama
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prosparse import tokenization
from prosparse.chat import COUNTS, TEMPLATES, chat_template, pack, tokenize
from prosparse.config import Auto, Data, Source, Template
from prosparse.data import batch, mixture, next_tokens, open_prepared
from prosparse.generation import _encode
from prosparse.preparation import _prepare, prepare
from prosparse.sources import documents
from prosparse.sparsity import language_loss, measure
from prosparse.tokenization import is_held_out

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CONTEXT = 48


def characters(eos: str = "</s>", template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are characters, and the special ones."""
    vocabulary = [*SPECIAL, "\n", *map(chr, range(32, 127)), "用", "户"]
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(vocabulary)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    more = [token for token in SPECIAL if token != eos and token != "<s>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, additional_special_tokens=more
    )
    tokenizer.chat_template = template
    return tokenizer


def chat(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def conversations():
    """60 conversations of one or two turns."""
    random = np.random.default_rng(0)
    return [chat(*("abc"[: random.integers(1, 4)] * (i % 5 + 1) for _ in range(2 + 2 * (i % 2)))) for i in range(60)]


@pytest.fixture
def make_data(tmp_path, conversations):
    def make(rows: list | None = None, source: dict | None = None, **changes) -> Data:
        rows = [{"messages": messages} for messages in conversations] if rows is None else rows
        chats = Source(path=write(tmp_path / "chat.jsonl", rows), **(source or {"messages": "messages"}))
        settings = {"held_out": 0.2, "cache": str(tmp_path / "cache"), "template": Template.minicpm}
        return Data(**({"sources": {"chat": chats}} | settings | changes))

    return make


def everything(data: Data, tokenizer, context: int = CONTEXT) -> list[np.ndarray]:
    """The rows of all conversations of data.sources.chat."""
    data.held_out = 0.0
    folders, _ = _prepare(data.sources, tokenizer, data, [context], verify=False)
    rows = open_prepared({"chat": folders["chat"][context]}).train["chat"]
    return [rows[i] for i in range(len(rows))]


def spans(row: np.ndarray, tokenizer) -> list[tuple[str, bool]]:
    """A row's tokens that are not padding: (text, labeled), by stretches; labels are the tokens themselves."""
    ids, labels, positions = (part[row[2] >= 0] for part in row)
    assert ((labels == ids) | (labels == -100)).all() and positions.tolist() == list(range(len(ids)))
    text = tokenizer.convert_ids_to_tokens(ids.tolist())
    stretches = groupby(zip(text, labels != -100, strict=True), key=lambda pair: bool(pair[1]))
    return [("".join(token for token, _ in pairs), labeled) for labeled, pairs in stretches]


# --- labels -----------------------------------------------------------------------------------------------------------

BRACKETS = (  # renders BOS itself
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    ("said", "settings", "written_out"),
    [
        (
            ["ab", "c"],
            {"template": Template.chatml},
            [("<s><|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n", False), ("c<|im_end|>\n</s>", True)],
        ),
        (["ab", " c "], {"template": Template.minicpm}, [("<s><用户>ab<AI>", False), ("c</s>", True)]),
        (
            ["ab", "c", "d", "ef", "left out"],
            {"template": Template.minicpm},
            [("<s><用户>ab<AI>", False), ("c", True), ("<用户>d<AI>", False), ("ef</s>", True)],
        ),
        (
            ["ab", "c", "d", "ef"],
            {"template": Template.auto},
            [("<s>[user]ab[assistant]", False), ("c</s>", True), ("[user]d[assistant]", False), ("ef</s>", True)],
        ),
        (
            ["ab", "c"],  # a template of the tokenizer's own says itself where BOS stands
            {"template": Template.auto, "bos": Auto.none},
            [("<s>[user]ab[assistant]", False), ("c</s>", True)],
        ),
        (["ab", "c"], {"template": Template.minicpm, "bos": Auto.none}, [("<用户>ab<AI>", False), ("c</s>", True)]),
    ],
)
def test_labels_are_on_answers_and_the_end_only(make_data, said, settings, written_out):
    tokenizer = characters(template=BRACKETS)
    (row,) = everything(make_data([{"messages": chat(*said)}], **settings), tokenizer, context=96)
    assert spans(row, tokenizer) == written_out


def test_an_answer_that_ends_with_eos_ends_there(make_data):
    tokenizer = characters(eos="<|im_end|>")
    data = make_data([{"messages": chat("ab", "c")}], template=Template.chatml)
    (row,) = everything(data, tokenizer, context=96)
    assert spans(row, tokenizer)[-1] == ("c<|im_end|>", True)
    assert (row[0] == tokenizer.eos_token_id).sum() == 2 + (row[2] < 0).sum()  # one token each; padding has its id too


def test_the_first_token_of_a_document_has_no_label_for_it_would_be_predicted_from_another_one(make_data):
    tokenizer = characters(template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    data = make_data([{"messages": chat("", "abc")}], template=Template.auto, bos=Auto.none)
    (row,) = everything(data, tokenizer)
    assert spans(row, tokenizer) == [("a", False), ("bc</s>", True)]


def test_a_first_message_of_the_assistant_is_no_answer(make_data):
    tokenizer = characters()
    messages = [{"role": "assistant", "content": "hi"}, *chat("ab", "c")]
    (row,) = everything(make_data([{"messages": messages}]), tokenizer)
    assert spans(row, tokenizer) == [("<s>hi<用户>ab<AI>", False), ("c</s>", True)]


def test_prompt_and_answer_and_every_format_give_the_same_rows(tmp_path, make_data):
    pairs = [("ab", "c"), ("d", "ef")]
    wanted = everything(make_data([{"messages": chat(*pair)} for pair in pairs]), characters())
    rows = [{"q": question, "a": answer, "id": 1} for question, answer in pairs]
    by_columns = make_data(rows, source={"prompt": "q", "answer": "a"})
    assert np.array_equal(everything(by_columns, characters()), wanted)
    pq.write_table(pa.Table.from_pylist([{"id": 1, "m": chat(*pair)} for pair in pairs]), tmp_path / "x.parquet")
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train.jsonl", [{"id": 1, "m": chat(*pair)} for pair in pairs])
    for path in (tmp_path / "x.parquet", f"hub://{tmp_path / 'hub'}"):
        data = make_data(sources={"chat": Source(path=str(path), messages="m")})
        assert np.array_equal(everything(data, characters()), wanted)


# --- as at inference --------------------------------------------------------------------------------------------------

PLAIN = (  # no BOS, and no mark where an answer ends
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
SAID = ("often a gate", "fires, or rests.", "why the\n layer", "neurons", "and then", " it counts")


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer trained on what is said; ChatML's marks are common text to it."""
    backend = Tokenizer(models.BPE())
    more: dict = {}
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder, more = decoders.ByteLevel(), {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    else:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    text = ["<用户> <AI> <|im_start|> <|im_end|> user assistant\n", *SAID, *map(chr, range(32, 127))]
    special = ["<s>", "</s>"]
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=500, special_tokens=special, **more))
    if kind == "prepended":  # as Llama 2 and MiniCPM have it
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "prepended"])
@pytest.mark.parametrize("template", [Template.chatml, Template.minicpm, BRACKETS, PLAIN])
def test_every_prompt_of_a_row_has_the_tokens_of_inference(kind, template):
    tokenizer = trained(kind)
    named = isinstance(template, Template)
    tokenizer.chat_template = None if named else template
    tokenizer.chat_template = chat_template(tokenizer, template if named else Template.auto, Auto.auto)
    ids, labels = tokenize(tokenizer, tokenizer.chat_template, json.dumps(chat(*SAID)), tokenizer.eos_token_id)
    for k in (1, 3, 5):
        prompt = _encode(tokenizer, chat(*SAID)[:k], Auto.auto)
        assert ids[: len(prompt)] == prompt and labels[len(prompt) - 1] == -100 != labels[len(prompt)]
    assert ids.count(tokenizer.bos_token_id) == (template != PLAIN)
    learned = [list(group) for is_label, group in groupby(labels, key=lambda label: label != -100) if is_label]
    assert len(learned) == 3
    for answer, said in zip(learned, SAID[1::2], strict=True):
        assert said.strip() in (text := tokenizer.decode(answer)) and "user" not in text


def test_a_token_over_the_end_of_a_prompt_is_cut_as_at_inference():
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *"abcd", "ab", "cd"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("c", "d")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    ids, labels = tokenize(tokenizer, template, json.dumps(chat("ca", "bc", "da", "bb")), tokenizer.eos_token_id)
    assert tokenizer.convert_ids_to_tokens(ids) == ["c", "a", "b", "cd", "a", "b", "b", "</s>"]
    assert [label != -100 for label in labels] == [False, False, True, False, False, True, True, True]


@pytest.mark.parametrize(("bos", "begins"), [("<s>", "<s><|im_start|>"), ("<|im_start|>", "<|im_start|>user")])
def test_a_named_template_renders_bos_once(bos, begins):
    tokenizer = characters()
    tokenizer.bos_token = bos
    template = chat_template(tokenizer, Template.chatml, Auto.auto)
    assert tokenizer.apply_chat_template(chat("a"), chat_template=template, tokenize=False).startswith(begins)
    assert chat_template(tokenizer, Template.chatml, Auto.none) == TEMPLATES[Template.chatml]


# --- packing ----------------------------------------------------------------------------------------------------------


def document(first: int, length: int, labeled: range) -> tuple[list[int], list[int]]:
    ids = list(range(first, first + length))
    return ids, [token if i in labeled else -100 for i, token in enumerate(ids)]


def test_documents_lie_whole_in_rows_and_what_does_not_fit_starts_the_next_one():
    packed, counts = pack(
        [
            document(10, 3, range(2, 3)),
            document(20, 4, range(1, 4)),  # does not fit the 3 tokens left
            document(30, 2, range(1, 2)),
            document(40, 9, range(4, 9)),  # is cut
            document(50, 9, range(6, 9)),  # has no label left when it is cut
            document(60, 5, range(3, 5)),
        ],
        context=6,
        padding=7,
    )
    none = -100
    assert packed.dtype == np.int32 and packed.swapaxes(0, 1).tolist() == [
        [[10, 11, 12, 7, 7, 7], [none, none, 12, none, none, none], [0, 1, 2, -1, -1, -1]],
        [[20, 21, 22, 23, 30, 31], [none, 21, 22, 23, none, 31], [0, 1, 2, 3, 0, 1]],
        [[40, 41, 42, 43, 44, 45], [none, none, none, none, 44, 45], [0, 1, 2, 3, 4, 5]],
        [[60, 61, 62, 63, 64, 7], [none, none, none, 63, 64, none], [0, 1, 2, 3, 4, -1]],
    ]
    assert [counts[name] for name in COUNTS] == [6, 32, 4, 12, 9, 1]


@pytest.mark.parametrize("unit", [300, 2**20])
def test_rows_do_not_depend_on_the_number_of_processes(tmp_path, make_data, monkeypatch, unit):
    monkeypatch.setattr(tokenization, "UNIT_CHARACTERS", unit)
    made = {}
    for processes in (1, 2, 3):
        data = make_data(processes=processes, cache=str(tmp_path / f"cache{processes}"))
        made[processes] = prepare(data, characters(), [CONTEXT])[CONTEXT]
    for processes in (2, 3):
        assert made[processes].digest == made[1].digest and made[processes].manifests == made[1].manifests
        assert made[processes].fingerprint == made[1].fingerprint
    counts, train = made[1].manifests["chat"], made[1].train["chat"]
    rows = [train[i] for i in range(len(train))]
    assert sum((row[1] != -100).sum() for row in rows) == counts["train"]["labeled_tokens"]
    assert sum((row[2] >= 0).sum() for row in rows) == counts["train"]["tokens"] - counts["train"]["dropped_tokens"]
    assert counts["train"]["documents"] + counts["held_out"]["documents"] == 60


def test_held_out_conversations_are_chosen_by_their_own_text(make_data, conversations):
    data, tokenizer = make_data(), characters()
    texts = list(documents(data.sources["chat"]))
    assert [json.loads(text) for text in texts] == conversations
    chosen = sum(is_held_out(text, 0.2) for text in texts)
    assert 0 < chosen == prepare(data, tokenizer, [CONTEXT])[CONTEXT].manifests["chat"]["held_out"]["documents"]
    more = make_data([{"id": 1, "messages": [{**m, "id": 2} for m in messages]} for messages in conversations])
    assert list(documents(more.sources["chat"])) == texts


def test_the_template_is_in_the_fingerprint_of_chat_sources_only(tmp_path, make_data):
    text = Source(path=write(tmp_path / "text.jsonl", [{"text": f"some text {i}"} for i in range(60)]))
    made = {}
    for template in (Template.minicpm, Template.chatml):
        data = make_data(template=template)
        data.sources["text"] = text
        made[template] = prepare(data, characters(template=BRACKETS), [CONTEXT])[CONTEXT].manifests
    one, other = made.values()
    assert one["text"] == other["text"] and one["chat"]["fingerprint"] != other["chat"]["fingerprint"]


# --- batches ----------------------------------------------------------------------------------------------------------

ROWS = {
    "text": np.arange(6, dtype=np.int32)[None],
    "whole": np.array([[[1, 2, 3, 4, 5, 6], [-100, 2, 3, 4, 5, 6], range(6)]], dtype=np.int32),
    "packed": np.array([[[1, 2, 3, 4, 0, 0], [-100, 2, -100, 4, -100, -100], [0, 1, 0, 1, -1, -1]]], dtype=np.int32),
}


def test_a_batch_mixes_text_and_conversations():
    rows = [ROWS["text"][0], ROWS["packed"][0]]
    made = batch(rows, [0, 1])
    assert made.input_ids.tolist() == [[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 0, 0]]
    assert made.labels.tolist() == [[1, 2, 3, 4, 5, -100], [2, -100, 4, -100, -100, -100]]
    assert made.token_mask.tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    assert made.position_ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 0, 1]]
    assert made.to("cpu").inputs().keys() == {"input_ids", "position_ids"}
    for name in ("text", "whole"):
        made = batch(ROWS[name], [0])
        assert made.token_mask is None and made.position_ids is None and made.inputs().keys() == {"input_ids"}
    mixed = mixture({"text": ROWS["text"], "packed": ROWS["packed"]}, {"text": 1.0, "packed": 1.0}, seed=0)
    assert batch(mixed, range(2)).position_ids is not None


def test_the_loss_of_packed_documents_is_that_of_each_by_itself(make_data):
    tokenizer = characters()
    rows = everything(make_data(), tokenizer)
    model = tiny_llama(initializer_range=0.3).eval()
    whole, alone, labels = batch(rows, range(len(rows))), [], 0
    assert whole.token_mask is not None and whole.position_ids is not None
    with torch.no_grad():
        packed = language_loss(model(**whole.inputs(), use_cache=False).logits, whole.labels)
        together = language_loss(model(input_ids=whole.input_ids, use_cache=False).logits, whole.labels)
        for row in rows:
            starts = [*np.flatnonzero(row[2] == 0), int((row[2] >= 0).sum())]
            for start, end in pairwise(starts):
                ids, wanted = (torch.from_numpy(part[start:end].astype(np.int64))[None] for part in row[:2])
                alone.append(language_loss(model(input_ids=ids, use_cache=False).logits, next_tokens(wanted)))
                labels += int((wanted[:, 1:] != -100).sum())
    assert len(alone) == 60 and packed.item() == pytest.approx(torch.stack(alone).sum().item(), rel=1e-5)
    assert abs(together - packed) > 1e-3 * packed  # documents that see each other
    result = measure(model, rows)
    assert result.tokens == labels and result.loss == pytest.approx(packed.item() / labels, rel=1e-5)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def refused(data: Data, match: str, tokenizer=None, context: int = CONTEXT) -> None:
    with pytest.raises(ValueError, match=match) as error:
        prepare(data, tokenizer or characters(), [context])
    assert "\n" not in str(error.value)
    assert not list(Path(data.cache).glob("*")) or context != CONTEXT  # nothing half-made


@pytest.mark.parametrize(
    ("source", "words"),
    [({"messages": "turns"}, "'turns': set `messages`"), ({"prompt": "messages", "answer": "a"}, "'a': set `answer`")],
)
def test_a_missing_column_is_named(make_data, source, words):
    refused(make_data(source=source), rf"data.sources.chat: .* row 1 has no column {words} .*\(messages\)")


@pytest.mark.parametrize(
    "messages", [[], chat("only asked"), chat("asked", " \n"), [{"role": "assistant", "content": "unasked"}]]
)
def test_a_row_without_an_answer_is_named(make_data, messages):
    rows = [{"messages": chat("a", "b")}, {"messages": messages}]
    refused(make_data(rows), "data.sources.chat: .* row 2 has no answer .*: remove the row")


@pytest.mark.parametrize("messages", [None, "text", [{"from": "x", "value": "a"}], [{"role": "user", "content": 7}]])
def test_a_row_that_is_no_conversation_is_named(make_data, messages):
    refused(make_data([{"messages": messages}]), "data.sources.chat: .* row 1 has no conversation in 'messages' but")


def test_an_answer_that_is_no_text_is_named(make_data):
    data = make_data([{"q": "a", "a": None}], source={"prompt": "q", "answer": "a"})
    refused(data, "row 1 has no conversation in 'q' and 'a'")


def test_text_where_conversations_are_wanted_is_named(tmp_path, make_data):
    (tmp_path / "x.txt").write_text("text")
    for path in (str(tmp_path / "x.txt"), "stdlib"):
        data = make_data(sources={"chat": Source(path=path, messages="messages")})
        refused(data, "data.sources.chat: .* is text without columns: remove `messages`, or give")


def test_a_tokenizer_without_a_chat_template_is_refused(make_data):
    refused(make_data(template=Template.auto), "no chat template: set data.template=chatml")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_template_that_is_not_consistent_is_refused_with_the_row(make_data, monkeypatch, processes):
    monkeypatch.setattr(tokenization, "UNIT_CHARACTERS", 100)
    kept = "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
    forgets = "{% for m in messages %}" + kept + "{% endfor %}"
    rows = [{"messages": chat("a", f"b{i}")} for i in range(9)] + [{"messages": chat("a", "b", "c", "d")}]
    data = make_data(rows, template=Template.auto, processes=processes)
    refused(data, "data.sources.chat: row 10 .* not the beginning .*: set data.temp", characters(template=forgets))
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + BRACKETS
    odd = [{"role": "system", "content": "s"}, *chat("a", "b")]
    rows = [{"messages": chat("a", "b")}, {"messages": odd}]
    data = make_data(rows, template=Template.auto, processes=processes)
    refused(data, "row 2 of .* does not fit the chat template, .*: user first: set", characters(template=strict))


def test_conversations_whose_answers_all_begin_too_late_are_named(make_data):
    refused(
        make_data(), r"data.sources.chat: .* no answer begins so early: raise recipe.batch.context \(8\)", context=8
    )


def test_every_named_template_is_consistent(make_data):
    for template in TEMPLATES:
        assert everything(make_data(template=template), characters(), context=400)
