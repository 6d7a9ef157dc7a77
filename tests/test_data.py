"""Documents become the same rows everywhere, a row of the mixture is a function of its index, mistakes are named."""

import gzip
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prosparse import packing, preparation, tokenization
from prosparse.config import Auto, Data, Source
from prosparse.data import batch, epochs, mixture, open_prepared
from prosparse.preparation import prepare, text_rows
from prosparse.sources import documents
from prosparse.tokenization import is_held_out

CONTEXT = 16
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "home"]


@pytest.fixture(scope="module")
def tiny_tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<s>", "</s>"], "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator([" ".join(WORDS)] * 4, trainers.BpeTrainer(vocab_size=300, **options))
    template = {"single": "<s> $A </s>", "special_tokens": [("<s>", 0), ("</s>", 1)]}  # what add_special_tokens adds
    backend.post_processor = processors.TemplateProcessing(**template)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def texts():
    """200 different documents of 3 to 40 words."""
    random = np.random.default_rng(0)
    return [" ".join([str(i), *random.choice(WORDS, random.integers(3, 40))]) for i in range(200)]


def write_jsonl(path: Path, texts: list) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def make_data(tmp_path, texts):
    def make(**changes) -> Data:
        path = write_jsonl(tmp_path / "a.jsonl", texts)
        cache = str(tmp_path / "cache")
        return Data(**({"sources": {"a": Source(path=path)}, "held_out": 0.2, "cache": cache} | changes))

    return make


def matrix(rows) -> np.ndarray:
    return np.stack([rows[i] for i in range(len(rows))])


# --- documents --------------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_documents(tmp_path):
    texts = ["one\u2028line\nand more", "zwei ü", ""]
    jsonl = "".join(json.dumps({"body": text or None}, ensure_ascii=False) + "\n" for text in texts).encode()
    (tmp_path / "x.jsonl").write_bytes(jsonl)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(jsonl[:30]) + gzip.compress(jsonl[30:]))  # two members
    half = zstandard.ZstdCompressor()
    (tmp_path / "x.jsonl.zst").write_bytes(half.compress(jsonl[:30]) + half.compress(jsonl[30:]))
    pq.write_table(pa.table({"id": [1, 2, 3], "body": texts}), tmp_path / "x.parquet")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_bytes(jsonl)
    for name in ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet"):
        assert list(documents(Source(path=str(tmp_path / name), column="body"))) == texts, name
    hub = Source(path=f"hub://{tmp_path / 'hub'}", column="body")
    assert list(documents(hub)) == texts


def test_a_folder_is_read_by_sorted_path_without_hidden_folders(tmp_path, capsys):
    for name in ("b.txt", "a/z.md", "a-b.py", ".git/x.txt", ".hidden.txt", "image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    assert list(documents(Source(path=str(tmp_path)), "data.sources.x")) == ["a-b.py", "a/z.md", "b.txt"]
    assert "data.sources.x: skipped 1 files that are not UTF-8" in capsys.readouterr().err


def test_stdlib_is_the_standard_library_and_the_topics_without_tests():
    texts = list(documents(Source(path="stdlib")))
    assert any("class OrderedDict" in text for text in texts)
    assert any(text.startswith('The "assert" statement') for text in texts)
    assert not any("class CmdLineTest" in text or "class HashEqualityTestCase" in text for text in texts)

    assert texts == list(documents(Source(path="stdlib")))


def test_half_a_surrogate_pair_in_json_is_replaced(tmp_path, make_data, tiny_tokenizer):
    (tmp_path / "x.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert list(documents(Source(path=str(tmp_path / "x.jsonl")))) == ["a?b"]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_documents_are_packed_in_order_with_bos_before_and_eos_after_each(tmp_path, make_data, texts, tiny_tokenizer):
    prepared = prepare(make_data(), tiny_tokenizer, [CONTEXT])[CONTEXT]
    for held_out, rows in ((False, prepared.train["a"]), (True, prepared.held_out)):
        stream = []
        for text in texts:
            if is_held_out(text, 0.2) == held_out:
                stream += [0, *tiny_tokenizer(text, add_special_tokens=False)["input_ids"], 1]
        assert len(rows) == len(stream) // CONTEXT
        assert matrix(rows).ravel().tolist() == stream[: len(rows) * CONTEXT]
        assert rows[0].dtype == np.int32


def test_bos_none_packs_without_bos(make_data, tiny_tokenizer):
    rows = matrix(prepare(make_data(bos=Auto.none), tiny_tokenizer, [CONTEXT])[CONTEXT].train["a"])
    assert 1 in rows and 0 not in rows


def test_a_tokenizer_without_bos_is_said_once(make_data, tiny_tokenizer, capsys):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="</s>")
    rows = matrix(prepare(make_data(), tokenizer, [CONTEXT, 8])[CONTEXT].train["a"])
    assert 1 in rows and 0 not in rows
    assert capsys.readouterr().err.count("no BOS token") == 1


def test_a_control_token_written_in_a_text_stays_text(tmp_path, make_data, tiny_tokenizer):
    path = write_jsonl(tmp_path / "x.jsonl", ["a </s> b <s> " * 9])
    cache = str(tmp_path / "cache")
    rows = matrix(text_rows(Source(path=path), tiny_tokenizer, CONTEXT, bos=Auto.auto, cache=cache))
    assert (rows == 0).sum() == 1 and rows[0, 0] == 0 and (rows == 1).sum() == 0


@pytest.mark.parametrize("unit", [400, 2**20])
def test_rows_and_digest_do_not_depend_on_the_number_of_processes(
    tmp_path, make_data, tiny_tokenizer, monkeypatch, unit
):
    monkeypatch.setattr(tokenization, "UNIT_CHARACTERS", unit)
    made = {}
    for processes in (1, 2, 3):
        data = make_data(processes=processes, cache=str(tmp_path / f"cache{processes}"))
        made[processes] = prepare(data, tiny_tokenizer, [CONTEXT])[CONTEXT]
    for processes in (2, 3):
        assert made[processes].digest == made[1].digest and made[processes].fingerprint == made[1].fingerprint
        assert made[processes].manifests == made[1].manifests
        assert (matrix(made[processes].train["a"]) == matrix(made[1].train["a"])).all()
    dropped = made[1].manifests["a"]["train"]["dropped_tokens"]
    assert dropped >= CONTEXT if unit == 400 else dropped < CONTEXT  # only a unit's tail that fills no row is dropped


def test_a_long_context_drops_no_larger_share_than_a_short_one(make_data, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tokenization, "UNIT_CHARACTERS", 400)  # shorter than a row of the long context
    monkeypatch.setattr(packing, "UNIT_CONTEXT", CONTEXT)
    for context, prepared in prepare(make_data(), tiny_tokenizer, [CONTEXT, 16 * CONTEXT]).items():
        count = prepared.manifests["a"]["train"]
        assert count["dropped_tokens"] < 0.2 * count["tokens"], context
        assert count["rows"] * context + count["dropped_tokens"] == count["tokens"]


def test_held_out_documents_are_chosen_by_their_own_text(tmp_path, make_data, texts, tiny_tokenizer):
    chosen = [text for text in texts if is_held_out(text, 0.2)]
    assert 0.1 < len(chosen) / len(texts) < 0.3
    assert set(chosen) < {text for text in texts if is_held_out(text, 0.3)}
    train_only = [text for text in texts if not is_held_out(text, 0.2)]
    shuffled = write_jsonl(tmp_path / "b.jsonl", sorted(texts, key=lambda text: text[::-1]))
    sources = {"a": Source(path=write_jsonl(tmp_path / "a.jsonl", texts)), "b": Source(path=shuffled)}
    prepared = prepare(make_data(sources=sources), tiny_tokenizer, [CONTEXT])[CONTEXT]
    for rows in prepared.train.values():
        decoded = tiny_tokenizer.decode(matrix(rows).ravel())
        assert not any(f"<s>{text}</s>" in decoded for text in chosen)
        assert sum(f"<s>{text}</s>" in decoded for text in train_only) >= len(train_only) - 1
    held_out = [prepared.manifests[name]["held_out"]["rows"] for name in "ab"]
    assert len(prepared.held_out) == sum(held_out)  # joined, in the order of the sources
    assert prepared.held_out[0].tolist() != prepared.held_out[held_out[0]].tolist()


def test_the_second_call_does_nothing_but_open(make_data, tiny_tokenizer, monkeypatch):
    first = prepare(make_data(), tiny_tokenizer, [CONTEXT, 8])
    for name in ("units", "Writers", "publish"):
        monkeypatch.setattr(preparation, name, None)
    second = prepare(make_data(processes=2), tiny_tokenizer, [8, CONTEXT])
    assert second[CONTEXT].digest == first[CONTEXT].digest != first[8].digest
    again = open_prepared(first[8].folders)
    assert (again.context, again.digest, len(again.held_out)) == (8, first[8].digest, len(first[8].held_out))


def test_the_fingerprint_follows_content_tokenizer_and_options_but_not_the_place(
    tmp_path, make_data, texts, tiny_tokenizer
):
    first = prepare(make_data(), tiny_tokenizer, [CONTEXT])[CONTEXT]
    (tmp_path / "moved").mkdir()
    moved = make_data(sources={"a": Source(path=write_jsonl(tmp_path / "moved" / "a.jsonl", texts), weight=2.0)})
    assert prepare(moved, tiny_tokenizer, [CONTEXT])[CONTEXT].fingerprint == first.fingerprint
    changed = make_data(sources={"a": Source(path=write_jsonl(tmp_path / "moved" / "a.jsonl", [*texts, "new"]))})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="</s>", eos_token="<s>"
    )
    others = [
        prepare(changed, tiny_tokenizer, [CONTEXT]),
        prepare(make_data(held_out=0.3), tiny_tokenizer, [CONTEXT]),
        prepare(make_data(bos=Auto.none), tiny_tokenizer, [CONTEXT]),
        prepare(make_data(), tokenizer, [CONTEXT]),
    ]
    fingerprints = [first.fingerprint, *(other[CONTEXT].fingerprint for other in others)]
    assert len(set(fingerprints)) == len(fingerprints)


@pytest.mark.parametrize("owner, name", [(packing._Writer, "_put"), (packing.json, "dumps"), (packing.os, "rename")])
def test_an_interrupted_preparation_is_invisible(tmp_path, make_data, tiny_tokenizer, monkeypatch, owner, name):
    original = getattr(owner, name)

    def interrupt(*arguments, **options):
        if name == "dumps" and not options:  # only the manifest's
            return original(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(make_data(), tiny_tokenizer, [CONTEXT])
    assert os.listdir(tmp_path / "cache") == []
    assert len(prepare(make_data(), tiny_tokenizer, [CONTEXT])[CONTEXT].train["a"]) > 0


def test_a_killed_preparation_is_invisible(tmp_path, make_data, tiny_tokenizer):
    child = os.fork()
    if child == 0:
        packing.os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        try:
            prepare(make_data(), tiny_tokenizer, [CONTEXT])
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [name[:11] for name in os.listdir(tmp_path / "cache")] == [".preparing-"]
    assert len(prepare(make_data(), tiny_tokenizer, [CONTEXT])[CONTEXT].train["a"]) > 0


def test_the_manifest_is_written_last(make_data, tiny_tokenizer, monkeypatch):
    seen = []
    original = packing.publish
    monkeypatch.setattr(packing, "publish", lambda *a: (seen.append(sorted(os.listdir(a[1]))), original(*a))[1])
    prepare(make_data(), tiny_tokenizer, [CONTEXT])
    assert seen == [["held_out.arrow", "train.arrow"]]


def test_concurrent_preparations_agree(tmp_path, make_data, tiny_tokenizer, monkeypatch):
    data, original, barrier = make_data(), packing.Writers.commit, threading.Barrier(2)
    monkeypatch.setattr(packing.Writers, "commit", lambda self: (barrier.wait(20), original(self))[1])
    digests = []
    threads = [
        threading.Thread(target=lambda: digests.append(prepare(data, tiny_tokenizer, [CONTEXT])[CONTEXT].digest))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 2 and len(set(digests)) == 1
    assert len(os.listdir(tmp_path / "cache")) == 2  # the segment and the table


def test_damaged_rows_are_refused(make_data, tiny_tokenizer):
    prepared = prepare(make_data(), tiny_tokenizer, [CONTEXT])[CONTEXT]
    (shard,) = prepared.train["a"].shards
    os.truncate(shard.path, 600)
    told = f"{shard.path.parent} does not hold complete rows: remove it and prepare again"
    with pytest.raises(ValueError, match=f"data.sources.a: {told}"):
        prepare(make_data(), tiny_tokenizer, [CONTEXT])
    with pytest.raises(ValueError, match=told):  # a rank that opens the table finds out at the first row
        open_prepared(prepared.folders).train["a"][0]
    shutil.rmtree(shard.path.parent)
    assert prepare(make_data(), tiny_tokenizer, [CONTEXT])[CONTEXT].digest == prepared.digest


def test_text_rows_are_all_of_a_text_or_the_held_out_rows_of_the_training(make_data, tiny_tokenizer):
    data = make_data()
    prepared = prepare(data, tiny_tokenizer, [CONTEXT])[CONTEXT]
    options = {"bos": Auto.auto, "cache": data.cache}
    held_out = text_rows(data.sources["a"], tiny_tokenizer, CONTEXT, **options, held_out=0.2)
    assert (matrix(held_out) == matrix(prepared.held_out)).all()
    everything = text_rows(data.sources["a"], tiny_tokenizer, CONTEXT, **options)
    assert 0 <= len(everything) - len(prepared.train["a"]) - len(held_out) <= 1


# --- mistakes ---------------------------------------------------------------------------------------------------------


def refused(data: Data, tokenizer, match: str, vocab_size: int | None = None, context: int = CONTEXT) -> None:
    with pytest.raises(ValueError, match=match):
        prepare(data, tokenizer, [context], vocab_size)


def test_a_missing_file_is_named(make_data, tiny_tokenizer):
    refused(
        make_data(sources={"x": Source(path="/no/such")}), tiny_tokenizer, "data.sources.x: /no/such does not exist"
    )


def test_a_folder_without_text_is_named(tmp_path, make_data, tiny_tokenizer):
    (tmp_path / "empty").mkdir()
    data = make_data(sources={"x": Source(path=str(tmp_path / "empty"))})
    refused(data, tiny_tokenizer, r"data.sources.x: .*empty holds nothing that is read: give files that end in \.jsonl")


def test_a_text_without_documents_is_named(tmp_path, make_data, tiny_tokenizer):
    data = make_data(sources={"x": Source(path=write_jsonl(tmp_path / "x.jsonl", [None, ""]))})
    refused(data, tiny_tokenizer, "data.sources.x: .* holds no document")


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "hub"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path, make_data, tiny_tokenizer, ending):
    path = tmp_path / ("hub/x.jsonl" if ending == "hub" else f"x.{ending}")
    path.parent.mkdir(exist_ok=True)
    if ending == "parquet":
        pq.write_table(pa.table({"body": ["a"], "id": [1]}), path)
    else:
        path.write_text('{"body": "a", "id": 1}\n')
    data = make_data(sources={"x": Source(path=f"hub://{path.parent}" if ending == "hub" else str(path))})
    refused(data, tiny_tokenizer, r"data.sources.x: .* has no column 'text': .* \(body, id\)")


def test_a_column_that_holds_no_text_is_named(tmp_path, make_data, tiny_tokenizer):
    data = make_data(sources={"x": Source(path=write_jsonl(tmp_path / "x.jsonl", ["a", 7]))})
    refused(data, tiny_tokenizer, "data.sources.x: .* row 2 has no text in 'text' but 7")


@pytest.mark.parametrize(("column", "told"), [("text", "no column 'text'"), ("messages", "no text in 'messages' but")])
def test_conversations_read_as_text_are_told_how_to_name_them(tmp_path, make_data, tiny_tokenizer, column, told):
    (tmp_path / "x.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    data = make_data(sources={"x": Source(path=str(tmp_path / "x.jsonl"), column=column)})
    refused(data, tiny_tokenizer, f"{told}.*; if it holds conversations, set `messages`, or `prompt` and `answer`$")


def test_a_line_that_is_not_json_is_named(tmp_path, make_data, tiny_tokenizer):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n\nnot json\n')
    refused(
        make_data(sources={"x": Source(path=str(tmp_path / "x.jsonl"))}),
        tiny_tokenizer,
        "data.sources.x: .* line 3 is not",
    )


def test_a_hub_name_that_cannot_be_loaded_is_named(tmp_path, make_data, tiny_tokenizer):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "x.jsonl").write_text('{"text": "a"}\n')
    data = make_data(sources={"x": Source(path=f"hub://{tmp_path / 'hub'}", split="valid")})
    refused(data, tiny_tokenizer, "data.sources.x: hub://.* cannot be loaded, mind its config and split")


def test_a_text_shorter_than_a_row_is_named_with_its_tokens(make_data, tiny_tokenizer):
    pattern = r"data.sources.a: \d+ documents and \d+ tokens fill no row: .* lower recipe.batch.context \(1000000\)"
    refused(make_data(), tiny_tokenizer, pattern, context=1_000_000)


def test_no_held_out_document_is_refused(make_data, tiny_tokenizer):
    refused(make_data(held_out=1e-9), tiny_tokenizer, "data.held_out is 1e-09: raise it: 0 documents")


def test_a_token_beyond_the_vocabulary_is_refused(make_data, tiny_tokenizer):
    prepared = prepare(make_data(), tiny_tokenizer, [CONTEXT])[CONTEXT]
    largest = max(matrix(prepared.train["a"]).max(), matrix(prepared.held_out).max())
    message = f"ids up to {largest} but the model's vocabulary is {largest}: set data.tokenizer"
    refused(make_data(), tiny_tokenizer, message, vocab_size=largest)
    prepare(make_data(), tiny_tokenizer, [CONTEXT], vocab_size=largest + 1)


def test_a_tokenizer_without_eos_is_refused(make_data, tiny_tokenizer):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<s>")
    refused(make_data(), tokenizer, "no EOS token .*: set data.tokenizer")


# --- mixture ----------------------------------------------------------------------------------------------------------

SOURCES = {"a": np.arange(700).reshape(350, 2), "b": -1 - np.arange(200).reshape(100, 2)}  # a: >= 0, b: < 0
WEIGHTS = {"a": 3.0, "b": 1.0}


def test_every_stretch_of_the_mixture_has_the_weights(tmp_path):
    rows = mixture(SOURCES, WEIGHTS, seed=0)
    from_a = np.array([rows[i][0] >= 0 for i in range(4000)])
    assert from_a.sum() == 3000
    assert all(abs(from_a[i : i + 40].sum() - 30) <= 1 for i in range(0, 3960, 7))
    assert epochs(SOURCES, WEIGHTS, 4000) == {"a": 3000 / 350, "b": 1000 / 100}


@pytest.mark.parametrize(("a", "b", "whole"), [(0.3, 0.1, 4), (0.37, 0.63, 100), (1.004, 1.0, 501), (1e-3, 3.0, 3001)])
def test_weights_are_met_to_the_row(a, b, whole):
    weights = {"a": a, "b": b}
    rows = mixture(SOURCES, weights, seed=0)
    for first in (0, 7 * whole, 10**9 * whole):
        assert sum(rows[i][0] >= 0 for i in range(first, first + whole)) == round(whole * a / (a + b))
    assert epochs(SOURCES, weights, whole)["a"] == pytest.approx(whole * a / (a + b) / 350)


def test_a_row_of_the_mixture_depends_on_seed_and_index_alone():
    order = np.random.default_rng(0).permutation(2000)
    forward = mixture(SOURCES, WEIGHTS, seed=1)
    backward = mixture(dict(reversed(SOURCES.items())), dict(reversed(WEIGHTS.items())), seed=1)
    first = np.stack([forward[i] for i in range(2000)])
    assert (np.stack([backward[int(i)] for i in order]) == first[order]).all()
    assert (np.stack([mixture(SOURCES, WEIGHTS, seed=2)[i] for i in range(2000)]) != first).any()


def test_an_epoch_has_every_row_once_and_each_its_own_order():
    rows = mixture({"b": SOURCES["b"]}, {"b": 1.0}, seed=0)
    passes = [[int(rows[i][0]) for i in range(start, start + 100)] for start in (0, 100, 200)]
    assert all(sorted(one) == sorted(SOURCES["b"][:, 0].tolist()) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    neighbor = mixture({"b": SOURCES["b"]}, {"b": 1.0}, seed=1)
    assert passes[1] != [int(neighbor[i][0]) for i in range(100)]


def test_a_batch_is_the_rows_at_its_indices_as_tensors(make_data, tiny_tokenizer):
    prepared = prepare(make_data(), tiny_tokenizer, [CONTEXT])[CONTEXT]
    rows = mixture(prepared.train, {"a": 1.0}, seed=0)
    made = batch(rows, range(5, 9))
    assert made.input_ids.tolist() == [rows[i].tolist() for i in range(5, 9)]
    assert (
        (made.labels[:, :-1] == made.input_ids[:, 1:]).all()
        and (made.labels[:, -1] == -100).all()
        and made.token_mask is None
    )
    assert batch(prepared.held_out, [1]).to("cpu").input_ids.tolist() == [prepared.held_out[1].tolist()]
    start = time.perf_counter()
    batch(rows, range(3000))
    assert time.perf_counter() - start < 2
