"""From documents to token rows: on one machine or many, in one go or in several.

In: text and chat sources and a tokenizer. Out: rows of exactly `context` token ids in Arrow files, in the cache.

Documents are split into training and held-out ones by the hash of their own text, tokenized, and packed one after the
other: [BOS] document EOS [BOS] document EOS ... (conversations whole, with labels and positions: chat.py). Packing
starts anew at fixed units of documents in source order and with each segment of the source (sources.py), so rows and
digests do not depend on the number of processes or machines. A segment at one context length is one folder, committed
by a rename; a source is a table of its segments:

    CACHE/SEGMENT/  train.arrow, held_out.arrow, manifest.json (counts and digests of both)
    CACHE/SOURCE/   manifest.json (their sums, and rows, bytes and digests of every segment)
    CACHE/known/    digests of files that have been read, by path, size and time of change
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from prosparse import chat, packing, sources, tokenization
from prosparse.config import Auto, Data, Source
from prosparse.data import SPLITS, Prepared, Rows, incomplete, open_prepared
from prosparse.packing import Writers, checked, is_there, publish
from prosparse.sources import Segment, documents, hashed, segments
from prosparse.tokenization import Control, Item, Workers, units

FORMAT = 2  # of the rows and their files
SAY_SECONDS = 30  # between two lines on progress, where there is no terminal


@dataclass
class Made:
    """What one call of `prepare` did."""

    segments: int = 0  # that all sources have, each at every context length
    own: int = 0  # of them, those of this shard
    made: int = 0  # of these, those that were not there yet
    missing: int | None = None  # of all, those that nobody has made yet
    documents: int = 0  # of the made ones
    tokens: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0  # of all processes, by the clock of the CPU

    def to_dict(self) -> dict[str, Any]:
        speed = self.tokens / self.seconds if self.made else None
        per_core = self.tokens / self.core_seconds if self.made else None
        return vars(self) | {"tokens_per_second": speed, "tokens_per_second_per_core": per_core}

    def __str__(self) -> str:
        told = f"made {self.made} of {self.own} segments" + ", the others were there" * (self.made < self.own)
        if self.made:
            told += f": {self.documents:,} documents, {self.tokens:,} tokens in {self.seconds:.1f} s, "
            told += f"{self.tokens / self.seconds:,.0f} tokens/s, {self.tokens / self.core_seconds:,.0f} a core"
        return told


@dataclass
class _Plan:
    """A source cut into segments, and what its rows are made from beside their content."""

    key: str
    source: Source
    template: str | None  # of a chat source
    segments: list[Segment]
    made_from: list[Any]

    def folders(self, segment: Segment, cache: Path, contexts: Sequence[int], may_read: bool) -> dict[int, Path]:
        """The folder of a segment at each context length; none if that is not known without reading it."""
        identity = segment.identity(cache, may_read)
        if identity is None:
            return {}
        return {context: cache / hashed([self.made_from, identity, context]) for context in contexts}


# --- what is asked for ------------------------------------------------------------------------------------------------


def prepare(
    data: Data, tokenizer: PreTrainedTokenizerBase, contexts: Sequence[int], vocab_size: int | None = None
) -> dict[int, Prepared]:
    """The rows of every source of `data` at each context length (tokens); made if the cache does not have them.

    A second call only opens them; what it has to read for their fingerprint says sources.py. Any number of processes
    may prepare the same data at the same time; segments that are there already are kept.

    Raises ValueError for a source that cannot be read or is shorter than a row, for no held-out row, for a tokenizer
    without EOS or, where a chat source needs it, chat template, for a conversation that the template refuses, for a
    token id that a model of `vocab_size` tokens does not have, and for segments whose files are not what was prepared.
    """
    return prepare_all(data, tokenizer, contexts, vocab_size)[0]


def prepare_all(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[int],
    vocab_size: int | None = None,
    verify: bool = False,
) -> tuple[dict[int, Prepared], Made]:
    """`prepare`, with what it did; `verify`: read every file of rows again, also of a source that has its table."""
    folders, done = _prepare(_named(data), tokenizer, data, contexts, verify)
    result = {}
    for context in contexts:
        parts = {name: folders[f"data.sources.{name}"][context] for name in data.sources}
        result[context] = prepared = open_prepared(parts)
        for name, manifest in prepared.manifests.items():
            _require_row([manifest["train"]], f"data.sources.{name}", f"recipe.batch.context ({context})")
            largest = max(manifest[split]["largest_id"] for split in SPLITS)
            if vocab_size is not None and largest >= vocab_size:
                raise ValueError(
                    f"data.sources.{name}: the tokenizer has ids up to {largest} but the model's vocabulary is "
                    f"{vocab_size}: set data.tokenizer to the model's own"
                )
        held_out = [manifest["held_out"] for manifest in prepared.manifests.values()]
        _require_row(held_out, f"data.held_out is {data.held_out}: raise it", f"recipe.batch.context ({context})")
    return result, done


def prepare_shard(
    data: Data, tokenizer: PreTrainedTokenizerBase, contexts: Sequence[int], shard: tuple[int, int]
) -> Made:
    """Make the segments i, i + n, i + 2n, ... of all sources, for `shard` (i, n) with i from 1 to n.

    n of these, wherever and whenever they run, make what `prepare` would; that, run after them, finds it and writes the
    tables. Raises ValueError for a source or a conversation as `prepare` does.
    """
    control = _control(tokenizer, data.bos)
    plans = _plans(_named(data), tokenizer, control, data)
    _, done = _make(plans, tokenizer, control, data, contexts, shard)
    cache, left = Path(data.cache).expanduser(), 0
    for plan in plans:
        for segment in plan.segments:
            found = plan.folders(segment, cache, contexts, may_read=False)
            left += not found or not all(map(is_there, found.values()))
    done.missing = left
    return done


def text_rows(
    source: Source, tokenizer: Any, context: int, *, bos: Auto, cache: str, held_out: float | None = None
) -> Rows:
    """The rows of one source, by itself: all of it, or only its `held_out` share.

    The same share of the same text gives the held-out rows of `prepare`. Raises ValueError as `prepare` does.
    """
    (rows,) = _text_rows([SPLITS[held_out is not None]], source, tokenizer, context, bos, cache, held_out)
    return rows


def text_splits(
    source: Source, tokenizer: Any, context: int, *, bos: Auto, cache: str, held_out: float
) -> tuple[Rows, Rows]:
    """The rows of the training documents of one source and those of the `held_out` share; see `text_rows`."""
    train, other = _text_rows(SPLITS, source, tokenizer, context, bos, cache, held_out)
    return train, other


def _text_rows(
    splits: Sequence[str],
    source: Source,
    tokenizer: Any,
    context: int,
    bos: Auto,
    cache: str,
    held_out: float | None,
) -> list[Rows]:
    data = Data(held_out=held_out or 0.0, cache=cache)
    folders, _ = _prepare({"text": source}, tokenizer, data, [context], verify=False)
    prepared = open_prepared({"text": folders["text"][context]})
    for split in splits:
        key = "text" if split == "train" else f"held_out is {held_out}: raise it"
        _require_row([prepared.manifests["text"][split]], key, f"context ({context})")
    return [prepared.train["text"] if split == "train" else prepared.held_out for split in splits]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer does to text, as a digest."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return hashed({**backend, "truncation": None, "padding": None})  # which are not used here


def _require_row(splits: list[dict[str, int]], where: str, context: str) -> None:
    if sum(split["rows"] for split in splits) == 0:
        has = " and ".join(f"{sum(split[count] for split in splits)} {count}" for count in ("documents", "tokens"))
        if any(split.get("left_out_documents") for split in splits):
            raise ValueError(f"{where}: {has} fill no row: no answer begins so early: raise {context}")
        raise ValueError(f"{where}: {has} fill no row: give more text or lower {context}")


def begins_with_bos(data: Data, tokenizer: Any) -> bool:
    """Whether rows of `data` begin each document with BOS; of conversations alone the chat template says it."""
    if any(not source.is_chat for source in data.sources.values()):
        return data.bos is Auto.auto and tokenizer.bos_token_id is not None
    return chat.begins_with_bos(tokenizer, chat.chat_template(tokenizer, data.template, data.bos))


def _control(tokenizer: PreTrainedTokenizerBase, bos: Auto) -> Control:
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError("the tokenizer is not a fast one: set data.tokenizer to one that has a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token to separate documents: set data.tokenizer to one that has")
    if bos is Auto.auto and tokenizer.bos_token_id is None:
        print("The tokenizer has no BOS token: EOS alone separates documents.", file=sys.stderr)
    before = [tokenizer.bos_token_id] if bos is Auto.auto and tokenizer.bos_token_id is not None else []
    return before, tokenizer.eos_token_id


def try_cache(name: str) -> None:
    """ValueError unless rows could be prepared in the folder of this name; leaves nothing behind."""
    cache = Path(name).expanduser()
    new = [path for path in (cache, *cache.parents) if not path.exists()]
    try:
        _make_cache(cache, probe=True)
    finally:
        for made in new:
            if made.exists():
                made.rmdir()


def _make_cache(cache: Path, probe: bool) -> None:
    """Make the folder, if it is not there; `probe`: and see whether something can be written in it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if probe:
            TemporaryDirectory(prefix=".preparing-", dir=cache).cleanup()
    except OSError as error:
        raise ValueError(
            f"data.cache={cache} cannot be written ({error.strerror}): choose a folder that can"
        ) from error


# --- segments ---------------------------------------------------------------------------------------------------------


def _named(data: Data) -> dict[str, Source]:
    return {f"data.sources.{name}": source for name, source in data.sources.items()}


def _prepare(
    named: Mapping[str, Source], tokenizer: Any, data: Data, contexts: Sequence[int], verify: bool
) -> tuple[dict[str, dict[int, Path]], Made]:
    """The folder of each source's table, by its key and context length; makes what is missing."""
    control = _control(tokenizer, data.bos)
    plans = _plans(named, tokenizer, control, data)
    found, done = _make(plans, tokenizer, control, data, contexts, (1, 1))
    segments, tables = iter(found), {}
    for plan in plans:
        own = [next(segments) for _ in plan.segments]
        tables[plan.key] = {c: _tabulate(plan, [made[c] for made in own], c, data, verify) for c in contexts}
    done.missing = 0
    if done.made:
        print(f"prepare  {done}", file=sys.stderr)
    return tables, done


def _plans(named: Mapping[str, Source], tokenizer: Any, control: Control, data: Data) -> list[_Plan]:
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    result = []
    made_from: list[Any] = [FORMAT, tokenization.UNIT_CHARACTERS, packing.UNIT_CONTEXT, sources.PIECE_CHARACTERS]
    made_from += [tokenizer_digest(tokenizer), control]
    for key, source in named.items():
        template = chat.chat_template(tokenizer, data.template, data.bos) if source.is_chat else None
        own = [*made_from, data.held_out] + ([] if template is None else [chat.FORMAT, template])
        result.append(_Plan(key, source, template, segments(source, key), own))
    return result


def _make(
    plans: list[_Plan],
    tokenizer: Any,
    control: Control,
    data: Data,
    contexts: Sequence[int],
    shard: tuple[int, int],
) -> tuple[list[dict[int, Path]], Made]:
    """Make the missing ones of a shard's segments; returns the folders of all of them, by context, and what was done.

    One process reads and writes, `data.processes` tokenize, across the ends of segments.
    """
    every = [(plan, segment) for plan in plans for segment in plan.segments]
    own = every[shard[0] - 1 :: shard[1]]
    cache, folders = Path(data.cache).expanduser(), []
    _make_cache(cache, probe=False)
    done, missing = Made(len(every), len(own)), {}
    progress, began, began_core = _Progress(sum(segment.size for _, segment in own)), time.time(), time.process_time()

    def items() -> Iterator[tuple[int, Item | None]]:
        for number, (plan, segment) in enumerate(own):
            folders.append(found := plan.folders(segment, cache, contexts, may_read=True))
            missing[number] = {context: folder for context, folder in found.items() if not is_there(folder)}
            if missing[number]:
                yield from ((number, item) for item in units(segment.documents(), data.held_out, plan.template))
                yield number, None  # its end
            else:
                progress.skip(segment.size)

    with Workers(tokenizer, control, data.processes) as workers:
        try:
            for number, results in groupby(workers.in_order(items()), itemgetter(0)):
                plan, segment = own[number]
                with TemporaryDirectory(prefix=".preparing-", dir=cache, ignore_cleanup_errors=True) as scratch:
                    writers = [
                        Writers(Path(scratch, str(context)), folder, context, plan.template is not None, workers.eos)
                        for context, folder in missing[number].items()
                    ]
                    for _, tokens in results:
                        if tokens is not None:
                            for writer in writers:
                                writer.add(tokens)
                            done.documents += tokens.documents
                            done.tokens += len(tokens.ids)
                            done.core_seconds += tokens.seconds if data.processes > 1 else 0
                            progress.add(tokens.characters, done.tokens)
                    for writer in writers:
                        writer.commit()
                progress.end(segment.size)
                done.made += 1
        except chat.Unfit as error:
            raise ValueError(_told(plans, *error.args)) from error
    progress.close()
    done.seconds = time.time() - began
    done.core_seconds += time.process_time() - began_core
    return folders, done


def _told(plans: list[_Plan], conversation: str, why: str) -> str:
    """What to tell of a conversation that the template refuses."""
    plans = [plan for plan in plans if plan.template is not None]
    rows = ((p, row) for p in plans for row, text in enumerate(documents(p.source, p.key), 1) if text == conversation)
    plan, row = next(rows)
    return f"{plan.key}: row {row} of {plan.source.path} {why}: set data.template=chatml, or mend the row"


def _tabulate(plan: _Plan, found: list[Path], context: int, data: Data, verify: bool) -> Path:
    """The folder of a source's table; checks its segments, and their digests if it is new or `verify` asks for it."""
    cache = Path(data.cache).expanduser()
    folder = cache / hashed(["table", context, [path.name for path in found]])
    deep = verify or not is_there(folder)
    with ThreadPoolExecutor(data.processes) as pool:
        manifests = list(pool.map(lambda path: checked(path, deep), found))
    if bad := [path for path, manifest in zip(found, manifests, strict=True) if manifest is None]:
        raise ValueError(f"{plan.key}: {incomplete(*bad)}")
    if sum(manifest[split]["documents"] for manifest in manifests for split in SPLITS) == 0:
        raise ValueError(f"{plan.key}: {plan.source.path} holds no document that is not empty: give text")
    if not is_there(folder):
        whole: dict[str, Any] = {"fingerprint": folder.name, "context": context}
        table: dict[str, Any] = {"segments": [path.name for path in found]}
        for split in SPLITS:
            parts = [manifest[split] for manifest in manifests]
            table[split] = {name: [part[name] for part in parts] for name in ("rows", "bytes", "digest")}
            counts = [name for name in parts[0] if name in chat.COUNTS or name == "bytes"]
            whole[split] = {name: sum(part[name] for part in parts) for name in counts}
            whole[split]["largest_id"] = max(part["largest_id"] for part in parts)
            digests = table[split]["digest"]
            whole[split]["digest"] = digests[0] if len(digests) == 1 else hashed(digests)
        with TemporaryDirectory(prefix=".preparing-", dir=cache, ignore_cleanup_errors=True) as scratch:
            place = Path(scratch, "table")
            place.mkdir()
            publish(whole | {"shards": table}, place, folder)
    return folder


class _Progress:
    """How far a preparation is, on stderr: a bar on a terminal, else a line now and then."""

    def __init__(self, size: int):
        self._bar = tqdm(total=size, desc="prepare", unit="B", unit_scale=True, disable=None, leave=False)
        self._size, self._skipped, self._ended, self._begun = size, 0, 0, 0
        self._began = self._said = time.monotonic()

    def skip(self, size: int) -> None:
        """A segment that is there already."""
        self._skipped += size
        self._bar.total = self._size - self._skipped

    def add(self, characters: int, tokens: int) -> None:
        self._begun += characters
        self._bar.update(self._ended + self._begun - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and now - self._said > SAY_SECONDS:
            self._said, done, size = now, self._ended + self._begun, max(1, self._size - self._skipped)
            left = (now - self._began) * max(0, size - done) / done
            speed = tokens / (now - self._began)
            said = f"{done / size:.0%}, {tokens:,} tokens, {speed:,.0f} tokens/s, {left / 60:.1f} min left"
            print(f"prepare  {said}", file=sys.stderr, flush=True)

    def end(self, size: int) -> None:
        """A segment of `size` bytes is done."""
        self._ended, self._begun = self._ended + size, 0

    def close(self) -> None:
        self._bar.close()
