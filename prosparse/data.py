"""From documents to token rows, and from token rows to the batches of a training.

In: text and chat sources (the named text, files, folders, Hub data sets) and a tokenizer.
Out: rows of exactly `context` token ids in memory-mapped Arrow files, their mixture by index, and batches of it.

Documents are split into training and held-out ones by the hash of their own text, tokenized, and packed one after the
other: [BOS] document EOS [BOS] document EOS ... (conversations whole, with labels and positions: chat.py). Packing
starts anew at fixed units of documents in source order, so rows and digests do not depend on the number of processes.
One source at one context length is one folder in the cache:

    CACHE/FINGERPRINT/  train.arrow, held_out.arrow, manifest.json (counts and digests of both)
"""

import json
import logging
import os
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prosparse import chat
from prosparse.config import Auto, Data, Source
from prosparse.sources import documents, hashed, identity

FORMAT = 1  # of the rows
UNIT_CHARACTERS = 2**20  # documents are tokenized in units; the document that reaches this length ends one
UNIT_CONTEXT = 2048  # up to this context units are packed one by one, at n times this context n together
SPLITS = ("train", "held_out")
Control = tuple[list[int], int]  # token ids: what goes before a document ([BOS] or nothing), and EOS


# --- rows -------------------------------------------------------------------------------------------------------------


class Rows:
    """Token rows in memory-mapped Arrow files, one file after the other.

    `rows[i]` is int32 `[context]`, read-only, of a chat source `[3, context]`: ids, labels, positions (-1: padding).
    """

    def __init__(self, files: Sequence[Path]):
        batches = (batch for path in files for batch in pa.ipc.open_stream(pa.memory_map(str(path))))
        self.blocks = [
            [column.flatten().to_numpy().reshape(-1, column.type.list_size) for column in batch.columns]
            for batch in batches
        ]
        self.ends = np.cumsum([len(block[0]) for block in self.blocks], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        block = bisect_right(self.ends, index)
        columns = [column[index - self.ends[block]] for column in self.blocks[block]]
        return columns[0] if len(columns) == 1 else np.stack(columns)


@dataclass(frozen=True)
class Prepared:
    """The rows of every source at one context length (tokens).

    `held_out` joins the held-out rows of all sources, in their order. `folders` are what `open_prepared` takes.
    `manifests[name]["train" | "held_out"]` has `documents`, `tokens`, `rows`, `dropped_tokens`, `largest_id`, `digest`;
    of a chat source `labeled_tokens` and `left_out_documents` too.
    """

    context: int
    train: dict[str, Rows]
    held_out: Rows
    fingerprint: str  # of the sources, the tokenizer and the options
    digest: str  # of all rows
    manifests: dict[str, dict[str, Any]]
    folders: dict[str, Path]


def prepare(
    data: Data, tokenizer: PreTrainedTokenizerBase, contexts: Sequence[int], vocab_size: int | None = None
) -> dict[int, Prepared]:
    """The rows of every source of `data` at each context length (tokens); made if the cache does not have them.

    A second call only opens them, after reading the sources once for their fingerprint. Any number of processes may
    prepare the same data at the same time.

    Raises ValueError for a source that cannot be read or is shorter than a row, for no held-out row, for a tokenizer
    without EOS or, where a chat source needs it, chat template, for a conversation that the template refuses, and for a
    token id that a model of `vocab_size` tokens does not have.
    """
    control = _control(tokenizer, data.bos)
    made = {
        name: _make(source, f"data.sources.{name}", tokenizer, control, data, contexts)
        for name, source in data.sources.items()
    }
    result = {context: open_prepared({name: made[name][context] for name in made}) for context in contexts}
    for context, prepared in result.items():
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
    return result


def open_prepared(folders: Mapping[str, Path]) -> Prepared:
    """Open what `prepare` made, by the folder of each source; reads no text.

    Raises ValueError for a folder that is not complete.
    """
    manifests = {name: _manifest(folder) for name, folder in folders.items()}
    digests = [[name, *(manifest[split]["digest"] for split in SPLITS)] for name, manifest in manifests.items()]
    return Prepared(
        context=next(iter(manifests.values()))["context"],
        train={name: Rows([folder / "train.arrow"]) for name, folder in folders.items()},
        held_out=Rows([folder / "held_out.arrow" for folder in folders.values()]),
        fingerprint=hashed([[name, manifest["fingerprint"]] for name, manifest in manifests.items()]),
        digest=hashed(digests),
        manifests=manifests,
        folders=dict(folders),
    )


def text_rows(
    text: str, tokenizer: Any, context: int, *, bos: Auto, column: str, cache: str, held_out: float | None = None
) -> Rows:
    """The rows of one text (a named text, file, folder or hub://NAME): all of it, or only its `held_out` share.

    The same share of the same text gives the held-out rows of `prepare`. Raises ValueError as `prepare` does.
    """
    (rows,) = _text_rows([SPLITS[held_out is not None]], text, tokenizer, context, bos, column, cache, held_out)
    return rows


def text_splits(
    text: str, tokenizer: Any, context: int, *, bos: Auto, column: str, cache: str, held_out: float
) -> tuple[Rows, Rows]:
    """The rows of the training documents of one text and those of the `held_out` share; see `text_rows`."""
    train, other = _text_rows(SPLITS, text, tokenizer, context, bos, column, cache, held_out)
    return train, other


def _text_rows(
    splits: Sequence[str],
    text: str,
    tokenizer: Any,
    context: int,
    bos: Auto,
    column: str,
    cache: str,
    held_out: float | None,
) -> list[Rows]:
    source, data = Source(path=text, column=column), Data(held_out=held_out or 0.0, cache=cache)
    folder = _make(source, "text", tokenizer, _control(tokenizer, bos), data, [context])[context]
    for split in splits:
        key = "text" if split == "train" else f"held_out is {held_out}: raise it"
        _require_row([_manifest(folder)[split]], key, f"context ({context})")
    return [Rows([folder / f"{split}.arrow"]) for split in splits]


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


def _make(
    source: Source, key: str, tokenizer: Any, control: Control, data: Data, contexts: Sequence[int]
) -> dict[int, Path]:
    """The folder of one source at each context length, made where the cache does not have it; tokenizes once."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    digest = tokenizer_digest(tokenizer)
    made_from = [FORMAT, UNIT_CHARACTERS, UNIT_CONTEXT, identity(source, key), digest, control, data.held_out]
    template = chat.chat_template(tokenizer, data.template, data.bos) if source.is_chat else None
    if template is not None:
        made_from += [chat.FORMAT, template]
    cache = Path(data.cache).expanduser()
    folders = {context: cache / hashed([made_from, context]) for context in contexts}
    missing = [context for context, folder in folders.items() if not (folder / "manifest.json").exists()]
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".preparing-", dir=cache, ignore_cleanup_errors=True) as scratch:
            tokens = _tokenize(source, key, tokenizer, control, template, data, Path(scratch))
            for context in missing:
                _commit(tokens, context, control[1], Path(scratch, str(context)), folders[context])
    return folders


def _tokenize(
    source: Source, key: str, tokenizer: Any, control: Control, template: str | None, data: Data, scratch: Path
) -> Any:
    """Tokenized units, one a row; those of conversations with labels and the tokens of each document."""
    before, eos = control
    schema = pa.schema({"held_out": pa.bool_(), "texts": pa.list_(pa.large_string())})
    with pa.OSFile(str(scratch / "units.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for held_out, texts in _units(documents(source, key), data.held_out):
            stream.write_batch(pa.record_batch([[held_out], [texts]], schema=schema))
    units, number = datasets.Dataset.from_file(str(scratch / "units.arrow")), datasets.Value("int32")
    if len(units) == 0:
        raise ValueError(f"{key}: {source.path} holds no document that is not empty: give text")

    def tokenize(unit: dict[str, Any]) -> dict[str, Any]:
        options = {"add_special_tokens": False, "split_special_tokens": True}  # "</s>" in a text is text
        encoded = tokenizer(unit["texts"], **options, return_attention_mask=False, verbose=False)["input_ids"]
        tokens = [np.array([*before, *ids, eos], dtype=np.int32) for ids in encoded]
        return {"documents": len(encoded), "tokens": np.concatenate(tokens)}

    def tokenize_chats(unit: dict[str, Any]) -> dict[str, Any]:
        assert template is not None
        made = [chat.tokenize(tokenizer, template, text, eos) for text in unit["texts"]]
        ids, labels = (np.concatenate([document[part] for document in made]) for part in (0, 1))
        return {"documents": len(made), "tokens": ids, "labels": labels, "lengths": [len(ids) for ids, _ in made]}

    lists = ("tokens",) if template is None else ("tokens", "labels", "lengths")
    features = {"held_out": datasets.Value("bool"), "documents": number} | dict.fromkeys(lists, datasets.List(number))
    try:
        made = units.map(
            tokenize if template is None else tokenize_chats,
            remove_columns=["texts"],
            features=datasets.Features(features),
            num_proc=min(data.processes, len(units)) if data.processes > 1 else None,
            writer_batch_size=1,
            cache_file_name=str(scratch / "tokens.arrow"),
            new_fingerprint="tokens",  # spares hashing the tokenizer
            desc="tokenize",
        )
    except chat.Unfit as error:
        document, why = error.args
        row = next(number for number, text in enumerate(documents(source, key), 1) if text == document)
        raise ValueError(
            f"{key}: row {row} of {source.path} {why}: set data.template=chatml, or mend the row"
        ) from error
    return made.with_format("numpy", dtype=np.int32)


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out `share` (0 to 1): decided by its own text, so alike everywhere."""
    return xxhash.xxh3_64_intdigest(text.encode()) < share * 2**64


def _units(texts: Iterable[str], share: float) -> Iterator[tuple[bool, list[str]]]:
    """Gather the texts that are not empty into units of one side each: (held out, texts)."""
    units: dict[bool, list[str]] = {False: [], True: []}
    characters = {False: 0, True: 0}
    for text in filter(None, texts):
        side = is_held_out(text, share)
        units[side].append(text)
        characters[side] += len(text)
        if characters[side] >= UNIT_CHARACTERS:
            yield side, units[side]
            units[side], characters[side] = [], 0
    yield from ((side, unit) for side, unit in units.items() if unit)


def _commit(tokens: Any, context: int, eos: int, scratch: Path, folder: Path) -> None:
    """Write both splits and then the manifest into `scratch`, and rename it to `folder`."""
    scratch.mkdir()
    manifest: dict[str, Any] = {"fingerprint": folder.name, "context": context}
    held_out = np.array(tokens["held_out"][:], dtype=bool)
    for split, chosen in zip(SPLITS, (~held_out, held_out), strict=True):
        manifest[split] = _pack(tokens, np.flatnonzero(chosen), context, scratch / f"{split}.arrow", eos)
    (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for path in (*scratch.iterdir(), scratch):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    try:
        os.rename(scratch, folder)
    except OSError:
        _manifest(folder)  # fine if another process was faster


def _pack(tokens: Any, units: np.ndarray, context: int, path: Path, eos: int) -> dict[str, Any]:
    """Write the rows of `units`; returns their counts and digest."""
    chats = "labels" in tokens.column_names
    names = chat.COLUMNS if chats else chat.COLUMNS[:1]
    schema = pa.schema({name: pa.list_(pa.int32(), context) for name in names})
    counts = dict.fromkeys(chat.COUNTS if chats else chat.COUNTS[:4], 0)
    largest, digest = -1, xxhash.xxh3_128()
    together = max(1, context // UNIT_CONTEXT)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for start in range(0, len(units), together):
            group = [tokens[int(unit)] for unit in units[start : start + together]]
            packed, counted = chat.pack(_documents_of(group), context, eos) if chats else _cut(group, context)
            columns = [pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), context) for part in packed]
            stream.write_batch(pa.record_batch(columns, schema=schema))
            digest.update(packed.data)
            counts = {name: count + counted[name] for name, count in counts.items()}
            largest = max(largest, *(int(unit["tokens"].max()) for unit in group))
    return {**counts, "largest_id": largest, "bytes": path.stat().st_size, "digest": digest.hexdigest()}


def _cut(group: list[dict[str, Any]], context: int) -> tuple[np.ndarray, dict[str, int]]:
    """(int32 [1, rows, context], counts): a tail that fills no row is dropped."""
    flat = np.concatenate([unit["tokens"] for unit in group])
    rows = len(flat) // context
    counts = {"documents": sum(int(unit["documents"]) for unit in group), "tokens": len(flat), "rows": rows}
    counts["dropped_tokens"] = len(flat) - rows * context
    return np.ascontiguousarray(flat[: rows * context], dtype="<i4").reshape(1, rows, context), counts


def _documents_of(group: list[dict[str, Any]]) -> Iterator[chat.Tokens]:
    for unit in group:
        ends = np.cumsum(unit["lengths"])[:-1]
        yield from zip(np.split(unit["tokens"], ends), np.split(unit["labels"], ends), strict=True)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if all((folder / f"{name}.arrow").stat().st_size == manifest[name]["bytes"] for name in SPLITS):
            return manifest
    except (OSError, ValueError):
        pass
    raise ValueError(f"{folder} does not hold complete rows: remove it and prepare again")


# --- mixture ----------------------------------------------------------------------------------------------------------


def proportions(weights: Mapping[str, float]) -> dict[str, int]:
    """The weights as the whole numbers that a mixture realizes exactly, the smallest as 100; sorted by name.

    (grain scales the smallest weight to 100 and cuts off decimals; of these there is nothing to cut.)
    """
    smallest = min(weights.values())
    return {name: round(100 * weights[name] / smallest) for name in sorted(weights)}


def epochs(rows: Mapping[str, Sized], weights: Mapping[str, float], rows_used: int) -> dict[str, float]:
    """How often the first `rows_used` rows of the mixture pass through each source."""
    parts = proportions(weights)
    return {name: rows_used * part / sum(parts.values()) / len(rows[name]) for name, part in parts.items()}


def mixture(rows: Mapping[str, Rows], weights: Mapping[str, float], seed: int) -> Any:
    """An endless grain.MapDataset whose row i, int32 `[context]`, is a function of (rows, weights, seed, i) alone.

    Each source is shuffled, anew in every epoch, and has its share of every stretch of rows (see `proportions`).
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # grain complains at import that it has no jax profiler
    import grain

    parts = proportions(weights)
    # grain shuffles epoch e with seed + e: neighboring seeds would repeat each other's order one epoch later
    seeds = {name: xxhash.xxh32_intdigest(f"{seed}/{name}".encode()) for name in parts}
    sources = [grain.MapDataset.source(rows[name]).shuffle(seed=seeds[name]).repeat() for name in parts]
    return grain.MapDataset.mix(sources, list(parts.values()))


@dataclass
class Batch:
    """Some rows as tensors on the CPU. The loss shifts: what position p predicts is the label of p + 1."""

    input_ids: Tensor  # int64 [sequences, context]
    labels: Tensor  # int64 [sequences, context]
    token_mask: Tensor | None = None  # bool [sequences, context]; None: there is no padding
    position_ids: Tensor | None = None  # int64 [sequences, context], 0 where a document begins; None: rows are whole

    def to(self, device: torch.device | str) -> "Batch":
        if torch.device(device).type != "cuda":
            return Batch(*(None if part is None else part.to(device) for part in vars(self).values()))  # type: ignore[arg-type]
        parts = {id(part): part for part in vars(self).values() if part is not None}  # text has its ids as labels, too
        moved = {key: part.pin_memory().to(device, non_blocking=True) for key, part in parts.items()}
        return Batch(*(moved.get(id(part)) for part in vars(self).values()))  # type: ignore[arg-type]

    def inputs(self) -> dict[str, Tensor]:
        """What the model's forward takes: without positions it counts through each row."""
        return {"input_ids": self.input_ids} | (
            {} if self.position_ids is None else {"position_ids": self.position_ids}
        )


def batch(rows: Any, indices: Sequence[int]) -> Batch:
    """The rows at `indices` of a mixture or of `Rows`, text and chat alike; padding is a document of its own."""
    chosen = [rows[int(index)] for index in indices]
    if all(row.ndim == 1 for row in chosen):
        input_ids = torch.from_numpy(np.stack(chosen).astype(np.int64))
        return Batch(input_ids=input_ids, labels=input_ids)
    whole = [row if row.ndim == 2 else np.stack([row, row, np.arange(len(row))]) for row in chosen]
    input_ids, labels, positions = torch.from_numpy(np.stack(whole).astype(np.int64)).unbind(1)
    kept = positions != chat.PADDING
    positions = positions.where(kept, (~kept).cumsum(1) - 1)
    bounded = bool((positions != torch.arange(positions.shape[1])).any())
    return Batch(input_ids, labels, None if kept.all() else kept, positions if bounded else None)
