"""Text becomes the same rows on one machine or many, in one go or after a kill; rows are opened when asked for."""

import gzip
import json
import os
import shutil
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny_overrides

from prosparse import data as reading
from prosparse import packing, preparation, sources, tokenization
from prosparse.cli import main
from prosparse.config import Auto, Data, Source
from prosparse.data import Rows, Shard, open_prepared
from prosparse.models.load import load_tokenizer
from prosparse.preparation import Made, prepare, prepare_all, prepare_shard, text_rows
from prosparse.sources import documents, pieces, segments

CONTEXT = 16


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(str(tiny["model"]))


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """A folder of 12 segments or so: .jsonl and .parquet that are cut, and text files that are gathered."""
    monkeypatch.setattr(sources, "SEGMENT_BYTES", 2000)
    chance, folder = np.random.default_rng(0), tmp_path / "corpus"
    folder.mkdir()
    words = ["sparse", "dense", "neuron", "gate", "layer", "fires", "rests", "ü"]
    texts = [" ".join([str(i), *chance.choice(words, chance.integers(3, 40))]) for i in range(240)]
    lines = [json.dumps({"text": text}) + "\n" * (1 + i % 3) for i, text in enumerate(texts[:100])]
    (folder / "a.jsonl").write_text("".join(lines).rstrip("\n"))
    pq.write_table(pa.table({"id": range(100), "text": texts[100:200]}), folder / "b.parquet", row_group_size=15)
    for i, text in enumerate(texts[200:]):
        (folder / f"c{i:02}.txt").write_text(text)
    return folder


@pytest.fixture
def make_data(tmp_path, corpus):
    def make(cache: str = "cache", **changes) -> Data:
        settings = {"held_out": 0.2, "cache": str(tmp_path / cache)}
        return Data(**({"sources": {"a": Source(path=str(corpus))}} | settings | changes))

    return make


def matrix(rows) -> np.ndarray:
    return np.stack([rows[i] for i in range(len(rows))])


# --- segments ---------------------------------------------------------------------------------------------------------


def test_every_document_is_in_one_segment_in_order(corpus, monkeypatch):
    cut = segments(Source(path=str(corpus)), "x")
    assert len(cut) > 8
    found = [text for segment in cut for text in segment.documents()]
    monkeypatch.setattr(sources, "SEGMENT_BYTES", 2**27)
    (whole,) = segments(Source(path=str(corpus)), "x")
    assert found == list(whole.documents()) and [text.split()[0] for text in found] == [str(i) for i in range(240)]


@pytest.mark.parametrize("size", [1, 7, 60, 100, 1000])
def test_lines_are_cut_at_any_byte(tmp_path, monkeypatch, size):
    monkeypatch.setattr(sources, "SEGMENT_BYTES", size)
    texts = ["", "a" * 90, "b", "ü" * 40, "c"]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + "\n")
    assert list(documents(Source(path=str(path)))) == texts


def test_shards_in_any_order_one_go_and_two_processes_make_the_same(make_data, tokenizer):
    contexts = [CONTEXT, 8]
    whole = prepare(make_data(), tokenizer, contexts)
    assert prepare(make_data("two", processes=2), tokenizer, contexts)[8].digest == whole[8].digest
    data, made = make_data("shards"), {}
    for i in (3, 1, 2):
        made[i] = prepare_shard(data, tokenizer, contexts, (i, 3))
    assert [done.missing for done in made.values()] != [0, 0, 0]
    before = {path: path.stat().st_mtime_ns for path in Path(data.cache).glob("*/*")}
    assert prepare_shard(data, tokenizer, contexts, (2, 3)).made == 0
    result, done = prepare_all(data, tokenizer, contexts)
    assert done.made == 0 and sum(shard.made for shard in made.values()) == done.segments > 8
    assert all(path.stat().st_mtime_ns == before[path] for path in before)
    for context in contexts:
        assert result[context].digest == whole[context].digest and result[context].manifests == whole[context].manifests
        assert (matrix(result[context].train["a"]) == matrix(whole[context].train["a"])).all()


def test_a_shard_beyond_the_segments_has_nothing_to_do(make_data, tokenizer):
    done = prepare_shard(make_data(), tokenizer, [CONTEXT], (99, 100))
    assert (done.own, done.made) == (0, 0) and done.missing == done.segments
    assert str(done) == "made 0 of 0 segments"


def test_killed_in_the_middle_and_started_again_it_finishes_with_the_same_digest(make_data, tokenizer, monkeypatch):
    data, whole = make_data(processes=2), prepare(make_data("other"), tokenizer, [CONTEXT])[CONTEXT]
    child = os.fork()
    if child == 0:
        original = packing.publish
        packing.publish = lambda *arguments: (time.sleep(0.3), original(*arguments))
        try:
            prepare(data, tokenizer, [CONTEXT])
        finally:
            os._exit(1)
    give_up = time.monotonic() + 60
    while len(done := list(Path(data.cache).glob("[!.]*/manifest.json"))) < 3 and time.monotonic() < give_up:
        time.sleep(0.02)
    workers = Path(f"/proc/{child}/task/{child}/children").read_text().split()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    before = {path: path.stat().st_mtime_ns for path in done}
    result, told = prepare_all(data, tokenizer, [CONTEXT])
    assert result[CONTEXT].digest == whole.digest and told.made == told.segments - len(before) > 0
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert workers and not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_a_worker_that_is_killed_is_told(make_data, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenization, "_work", kill_itself)
    with pytest.raises(OSError, match="a process that tokenized was killed, maybe for want of memory: lower data.proc"):
        prepare(make_data(processes=2), tokenizer, [CONTEXT])
    assert not list(Path(make_data().cache).glob("[!.]*"))


def kill_itself(item):
    os.kill(os.getpid(), signal.SIGKILL)


def test_damaged_segments_are_named_and_made_anew(make_data, tokenizer):
    data = make_data()
    first = prepare(data, tokenizer, [CONTEXT])[CONTEXT]
    bad = [first.train["a"].shards[number].path for number in (1, 3)]
    for path in bad:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # its size stays
        path.write_bytes(content)
    named = f"data.sources.a: {bad[0].parent}, {bad[1].parent} do not hold complete rows: remove them and prepare again"
    with pytest.raises(ValueError, match=named):
        prepare_all(data, tokenizer, [CONTEXT], verify=True)
    for path in bad:
        shutil.rmtree(path.parent)
    result, done = prepare_all(data, tokenizer, [CONTEXT], verify=True)
    assert done.made == 2 and result[CONTEXT].digest == first.digest


# --- what stands for the content --------------------------------------------------------------------------------------


def settle(corpus: Path) -> None:
    for path in corpus.iterdir():
        os.utime(path, ns=(0, path.stat().st_mtime_ns - 60 * 10**9))


def test_content_is_read_once_for_its_identity_and_changed_text_is_noticed(make_data, corpus, tokenizer, monkeypatch):
    settle(corpus)
    first = prepare(make_data(), tokenizer, [CONTEXT])[CONTEXT]
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_content", None)
        assert prepare(make_data(), tokenizer, [CONTEXT])[CONTEXT].digest == first.digest
    changed = corpus / "a.jsonl"
    changed.write_text(changed.read_text().replace("sparse", "SPARSE", 1))
    result, done = prepare_all(make_data(), tokenizer, [CONTEXT])
    assert done.made == 1 and result[CONTEXT].fingerprint != first.fingerprint


def test_a_file_that_changes_while_it_is_read_is_refused(corpus, make_data, tokenizer, monkeypatch):
    cut = segments(Source(path=str(corpus)), "data.sources.a")
    (corpus / "a.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"data.sources.a: .*a.jsonl was changed while it was read: prepare again"):
        cut[0].identity(Path(make_data().cache), True)


def test_a_file_that_changes_between_its_digest_and_its_reading_is_refused(corpus, make_data, tokenizer, monkeypatch):
    folders = preparation._Plan.folders

    def change(plan, segment, *given, **named):
        found = folders(plan, segment, *given, **named)
        (corpus / "a.jsonl").write_text(json.dumps({"text": "another text " * 99}) + "\n")
        return found

    data = make_data()
    with monkeypatch.context() as patch:
        patch.setattr(preparation._Plan, "folders", change)
        with pytest.raises(ValueError, match=r"data.sources.a: .*a.jsonl was changed while it was read: prepare again"):
            prepare(data, tokenizer, [CONTEXT])
    assert not [path for path in Path(data.cache).iterdir() if (path / "manifest.json").exists()]


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.parquet", b"PAR1 no"), ("x.jsonl.gz", b"no gzip"), ("y.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99)[:-9])],
    ids=["parquet", "no gzip", "cut gzip"],
)
def test_a_damaged_file_is_named(tmp_path, make_data, tokenizer, name, content):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"data.sources.a: .*{name} (cannot be read|line 1)"):
        prepare(make_data(sources={"a": Source(path=str(tmp_path / "bad"))}), tokenizer, [CONTEXT])


def test_a_cache_that_cannot_be_written_is_named(make_data, tokenizer):
    data = make_data()
    data.cache = "/proc/nowhere"
    with pytest.raises(
        ValueError, match=r"data.cache=/proc/nowhere cannot be written \(.*\): choose a folder that can"
    ):
        prepare(data, tokenizer, [CONTEXT])


# --- elsewhere --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(corpus):
    """The corpus at memory://bucket, one of fsspec's file systems."""
    system = fsspec.filesystem("memory")
    system.put(str(corpus), "/bucket", recursive=True)
    system.pipe("/bucket/.hidden/x.txt", b"hidden")
    yield system
    system.rm("/bucket", recursive=True)


def test_what_lies_elsewhere_is_read_through_fsspec(make_data, bucket, tokenizer):
    local = prepare(make_data(), tokenizer, [CONTEXT])[CONTEXT]
    away = make_data("away", sources={"a": Source(path="memory://bucket")})
    assert prepare(away, tokenizer, [CONTEXT])[CONTEXT].digest == local.digest
    assert not Path(away.cache, "known").exists()  # their time of change stands for them: nothing is read for that
    text = bucket.cat("/bucket/a.jsonl")
    bucket.pipe("/bucket/a.jsonl", text.replace(b"sparse", b"SPARSE"))
    assert prepare(away, tokenizer, [CONTEXT])[CONTEXT].digest != local.digest
    one = list(documents(Source(path="memory://bucket/c00.txt")))
    assert len(one) == 1 and one[0].startswith("200 ")


def test_mistakes_in_a_url_are_named(make_data, bucket, tokenizer):
    told = {"memory://nothing/here.jsonl": "does not exist", "memory://nothing": "holds nothing|does not exist"}
    told |= {"foo://x": "cannot be listed: .*foo"}
    if find_spec("s3fs") is None:
        told["s3://bucket/corpus"] = "needs a package that is not installed: .*s3fs"
    for path, message in told.items():
        with pytest.raises(ValueError, match=f"data.sources.a: {path} .*({message})"):
            prepare(make_data(sources={"a": Source(path=path)}), tokenizer, [CONTEXT])


# --- long documents ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ab cd\nef  gh\n\n" * 40, "ab cd " * 90, "x" * 500, "short", ""])
def test_pieces_joined_are_the_text_wherever_it_is_read(monkeypatch, text):
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 64)
    cut = list(pieces([text]))
    assert "".join(cut) == text and all(0 < len(piece) <= 64 for piece in cut)
    assert cut == list(pieces(text[i : i + 7] for i in range(0, len(text), 7)))
    if "\n" in text:
        assert all(piece.endswith("d\n") for piece in cut[:-1])  # not among white space, where tokens reach across


def test_a_long_document_gives_the_rows_of_the_whole_text(tmp_path, tokenizer, monkeypatch):
    lines = "".join(f"line {i} of a \u00fc document\r\nwith neurons\n" for i in range(400))
    (tmp_path / "long.txt").write_text(lines, newline="")
    text = lines.replace("\r\n", "\n")
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}))
    how = {"bos": Auto.auto, "cache": str(tmp_path / "cache")}
    expected = [0, *tokenizer(text, add_special_tokens=False)["input_ids"], 1]
    for limit in (2**20, 500):
        monkeypatch.setattr(sources, "PIECE_CHARACTERS", limit)
        for name in ("long.txt", "long.jsonl"):
            rows = matrix(text_rows(Source(path=str(tmp_path / name)), tokenizer, CONTEXT, **how))
            assert rows.ravel().tolist() == expected[: rows.size] and len(expected) - rows.size < CONTEXT, (limit, name)


def test_a_long_document_is_held_out_by_its_whole_text(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 10)
    (tmp_path / "x.txt").write_text("a text of more than ten characters, ü")
    (document,) = documents(Source(path=str(tmp_path / "x.txt")))
    text = "".join(document.pieces())
    assert tokenization.is_held_out(text, 0.5) == (document.digest < 0.5 * 2**64)
    (tmp_path / "x.txt").write_bytes(b"a text of more than ten characters, \xff")
    assert list(documents(Source(path=str(tmp_path / "x.txt")))) == []


# --- reading back -----------------------------------------------------------------------------------------------------


def test_rows_over_thousands_of_files_are_opened_when_asked_for_and_few_at_a_time(tmp_path):
    schema, shards = pa.schema({"input_ids": pa.list_(pa.int32(), 4)}), []
    for number in range(2000):
        path = tmp_path / f"{number}.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as stream:
            for start in range(0, number % 4, 2):  # none to three rows in batches of two
                count = min(2, number % 4 - start)
                values = pa.array(np.full(count * 4, 4 * number + start, np.int32) + np.repeat(np.arange(count), 4))
                stream.write_batch(pa.record_batch([pa.FixedSizeListArray.from_arrays(values, 4)], schema=schema))
        shards.append(Shard(path, number % 4, path.stat().st_size))
    held = open_files()
    rows = Rows(shards)
    assert open_files() == held and len(rows) == 500 * 6
    expected = [4 * number + row for number in range(2000) for row in range(number % 4)]
    for index in np.random.default_rng(0).permutation(len(rows)):
        assert (rows[int(index)] == expected[index]).all()
    assert open_files() <= held + 2 * reading.OPEN_FILES
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="does not hold complete rows: remove it and prepare again"):
        matrix(rows)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_memory_of_reading_does_not_grow_with_the_number_of_files(tmp_path):
    path, rows, context = tmp_path / "1.arrow", 64, 4096
    values = pa.array(np.arange(rows * context, dtype=np.int32))
    schema = pa.schema({"input_ids": pa.list_(pa.int32(), context)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as stream:
        column = pa.FixedSizeListArray.from_arrays(values, context)
        stream.write_batch(pa.record_batch([column], schema=schema))
    chance, found = np.random.default_rng(0), []
    for files in (200, 200, 2000):  # 2,000: 2 GB
        read = Rows([Shard(path, rows, path.stat().st_size)] * files)
        for index in chance.integers(len(read), size=4000):
            assert read[int(index)][0] == index % rows * context
        found.append(anonymous_bytes())
    assert found[2] - found[1] < 4e6, found


def anonymous_bytes() -> int:
    """What the process holds beside mapped files."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def test_opening_a_table_reads_no_file_of_rows(make_data, tokenizer):
    prepared = prepare(make_data(), tokenizer, [CONTEXT])[CONTEXT]
    for shard in prepared.train["a"].shards:
        shutil.rmtree(shard.path.parent)
    again = open_prepared(prepared.folders)
    assert len(again.train["a"]) == len(prepared.train["a"]) and again.digest == prepared.digest


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["0/4", "5/4", "x", "1/0", "1.5/2", "-1/2"])
def test_a_shard_that_is_none_is_refused(shard, capsys):
    assert main(["prepare", "experiment=demo", f"shard={shard}"]) == 2
    assert f"shard is {shard}: give I/N with I from 1 to N" in capsys.readouterr().err


def test_the_verb_prepares_shards_and_then_the_tables(tiny, corpus, tmp_path, capsys):
    given = ["prepare", *tiny_overrides(tiny, tmp_path / "run")]
    given += [f"data.sources.files.path={corpus}", f"data.cache={tmp_path / 'cache'}"]
    settle(corpus)
    said = []
    for shard in ("1/2", "2/2"):
        assert main([*given, f"shard={shard}"]) == 0
        said.append(capsys.readouterr())
    first, second = (json.loads(one.out) for one in said)
    assert first["missing"] == second["made"] > 0 and second["missing"] == 0
    assert second["tokens_per_second_per_core"] > 0 and "tokens/s" in said[1].err
    assert "all segments are there: prosparse prepare without shard" in said[1].err
    assert main(given) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["preparation"]["made"] == 0 and result["32"]["sources"]["files"]["train"]["rows"] > 0


def test_throughput_is_none_where_nothing_was_made():
    assert Made(3, 3).to_dict()["tokens_per_second"] is None
