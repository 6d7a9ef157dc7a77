"""From text to token rows, and from token rows to the batches of a training.

In: text sources (the named text, files, folders, Hub data sets) and a tokenizer.
Out: rows of exactly `context` token ids in memory-mapped Arrow files, their mixture by index, and batches of it.

Documents are split into training and held-out ones by the hash of their own text, tokenised, and packed one after the
other: [BOS] document EOS [BOS] document EOS ... Packing starts anew at fixed units of documents in source order, so
rows and digests do not depend on the number of processes. One source at one context length is one folder in the cache:

    CACHE/FINGERPRINT/  train.arrow, held_out.arrow, manifest.json (counts and digests of both)
"""

import hashlib
import io
import json
import logging
import os
import sys
import sysconfig
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prosparse.config import Bos, Data, Source

FORMAT = 1  # of the rows
UNIT_CHARACTERS = 2**20  # documents are tokenised in units; the document that reaches this length ends one
UNIT_CONTEXT = 2048  # up to this context units are packed one by one, at n times this context n together
SPLITS = ("train", "held_out")
TEXT_ENDINGS = tuple(f".{name}" for name in "txt md rst tex html py c h cc cpp cu go java js ts rb rs sh sql".split())  # noqa: SIM905
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", *TEXT_ENDINGS)
Control = tuple[list[int], int]  # token ids: what goes before a document ([BOS] or nothing), and EOS


# --- documents --------------------------------------------------------------------------------------------------------


def documents(source: Source, key: str = "text") -> Iterator[str]:
    """The documents of a source in a fixed order, one at a time.

    A text file is one document; in .jsonl, .parquet and Hub data sets it is a row's `source.column` (null: an empty
    document). A folder is read recursively, sorted by relative path, without hidden files and folders. Text files that
    are not UTF-8 are skipped, which is said on stderr.

    Raises ValueError, with `key` as the name of the config key, for a path that does not exist or holds nothing
    readable, and for a missing column.
    """
    if source.path in NAMED_TEXTS:
        yield from NAMED_TEXTS[source.path]()
    elif source.path.startswith("hub://"):
        yield from _texts(_load_hub(source, key), source.column, f"{key}: {source.path}")
    else:
        skipped = []
        for path in _files(source.path, key):
            if not path.name.lower().endswith(TEXT_ENDINGS):
                where = f"{key}: {path}"
                yield from _texts(_table(path, source.column, where), source.column, where)
                continue
            try:
                yield path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError:
                skipped.append(path)
        if skipped:
            print(f"{key}: skipped {len(skipped)} files that are not UTF-8, first {skipped[0]}", file=sys.stderr)


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out `share` (0 to 1): decided by its own text, so alike everywhere."""
    return xxhash.xxh3_64_intdigest(text.encode()) < share * 2**64


def _stdlib() -> Iterator[str]:
    """The sources of the running Python's standard library without its tests, then the topics of its help()."""
    left_out = ("site-packages", "dist-packages", "pydoc_data", "test", "tests", "idle_test")
    for path in _walk(Path(sysconfig.get_path("stdlib")), (".py",), left_out):
        yield path.read_text(encoding="utf-8-sig")
    yield from (topics[name] for name in sorted(topics))


NAMED_TEXTS: dict[str, Callable[[], Iterator[str]]] = {"stdlib": _stdlib}


def _walk(root: Path, endings: tuple[str, ...], left_out: tuple[str, ...] = ()) -> list[Path]:
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".") and name not in left_out]
        found += [Path(folder, name) for name in names if name.lower().endswith(endings) and not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _files(path: str, key: str) -> list[Path]:
    root = Path(path).expanduser()
    if not root.exists():
        raise ValueError(f"{key}: {path} does not exist: give {', '.join(NAMED_TEXTS)}, a file, a folder or hub://NAME")
    files = _walk(root, ENDINGS) if root.is_dir() else [root] * root.name.lower().endswith(ENDINGS)
    if not files:
        raise ValueError(f"{key}: {path} holds nothing that is read: give files that end in {' '.join(ENDINGS)}")
    return files


def _table(path: Path, column: str, where: str) -> Iterator[Any]:
    """The rows of a .parquet or .jsonl file as dicts; of .parquet only `column`, if there is such a one."""
    if path.name.lower().endswith(".parquet"):
        with pq.ParquetFile(path) as file:
            columns = [column] if column in file.schema_arrow.names else None
            for rows in file.iter_batches(batch_size=1024, columns=columns):
                yield from rows.to_pylist()
        return
    with pa.input_stream(str(path)) as stream:  # decompresses by the file's ending
        for number, line in enumerate(io.BufferedReader(stream), 1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} line {number} is not JSON: {error}") from error


def _load_hub(source: Source, key: str) -> datasets.Dataset:
    try:
        rows = datasets.load_dataset(source.path.removeprefix("hub://"), source.config, split=source.split)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {source.path} cannot be loaded, mind its config and split: {error}") from error
    return rows.select_columns([source.column]) if source.column in rows.column_names else rows


def _texts(rows: Iterable[Any], column: str, where: str) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or column not in row:
            has = ", ".join(row) if isinstance(row, dict) else "none"
            raise ValueError(f"{where}: row {number} has no column {column!r}: set `column` to one that it has ({has})")
        text = "" if row[column] is None else row[column]
        if not isinstance(text, str):
            raise ValueError(f"{where}: row {number} has no text in {column!r} but {text!r:.40}: set another `column`")
        yield text.encode("utf-8", "replace").decode()  # JSON may hold half of a surrogate pair


def _identity(source: Source, key: str) -> list[Any]:
    """What stands for a source in a fingerprint: the content of all that is read, wherever it lies."""
    if source.path in NAMED_TEXTS:
        return [_hash(list(map(_hash, documents(source, key))))]
    if source.path.startswith("hub://"):
        return [source.path, source.column, _load_hub(source, key)._fingerprint]
    root = Path(source.path).expanduser()
    identity: list[Any] = [source.column]
    for path in _files(source.path, key):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        identity.append([path.relative_to(root).as_posix(), digest])
    return identity


# --- rows -------------------------------------------------------------------------------------------------------------


class Rows:
    """Token rows in memory-mapped Arrow files, one file after the other: `rows[i]` is int32 `[context]`, read-only."""

    def __init__(self, files: Sequence[Path]):
        columns = (batch.column(0) for path in files for batch in pa.ipc.open_stream(pa.memory_map(str(path))))
        self.blocks = [column.flatten().to_numpy().reshape(-1, column.type.list_size) for column in columns]
        self.ends = np.cumsum([len(block) for block in self.blocks], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        block = bisect_right(self.ends, index)
        return self.blocks[block][index - self.ends[block]]


@dataclass(frozen=True)
class Prepared:
    """The rows of every source at one context length (tokens).

    `held_out` joins the held-out rows of all sources, in their order. `folders` are what `open_prepared` takes.
    `manifests[name]["train" | "held_out"]` has `documents`, `tokens`, `rows`, `dropped_tokens`, `largest_id`, `digest`.
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
    without EOS, and for a token id that a model of `vocab_size` tokens does not have.
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
        fingerprint=_hash([[name, manifest["fingerprint"]] for name, manifest in manifests.items()]),
        digest=_hash(digests),
        manifests=manifests,
        folders=dict(folders),
    )


def text_rows(
    text: str, tokenizer: Any, context: int, *, bos: Bos, column: str, cache: str, held_out: float | None = None
) -> Rows:
    """The rows of one text (a named text, file, folder or hub://NAME): all of it, or only its `held_out` share.

    The same share of the same text gives the held-out rows of `prepare`. Raises ValueError as `prepare` does.
    """
    source, data = Source(path=text, column=column), Data(held_out=held_out or 0.0, cache=cache)
    folder = _make(source, "text", tokenizer, _control(tokenizer, bos), data, [context])[context]
    split, key = ("train", "text") if held_out is None else ("held_out", f"held_out is {held_out}: raise it")
    _require_row([_manifest(folder)[split]], key, f"context ({context})")
    return Rows([folder / f"{split}.arrow"])


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer does to text, as a digest."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return _hash({**backend, "truncation": None, "padding": None})  # which are not used here


def _require_row(splits: list[dict[str, int]], where: str, context: str) -> None:
    if sum(split["rows"] for split in splits) == 0:
        has = " and ".join(f"{sum(split[count] for split in splits)} {count}" for count in ("documents", "tokens"))
        raise ValueError(f"{where}: {has} fill no row: give more text or lower {context}")


def _control(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> Control:
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError("the tokenizer is not a fast one: set data.tokenizer to one that has a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token to separate documents: set data.tokenizer to one that has")
    if bos is Bos.auto and tokenizer.bos_token_id is None:
        print("The tokenizer has no BOS token: EOS alone separates documents.", file=sys.stderr)
    before = [tokenizer.bos_token_id] if bos is Bos.auto and tokenizer.bos_token_id is not None else []
    return before, tokenizer.eos_token_id


def _make(
    source: Source, key: str, tokenizer: Any, control: Control, data: Data, contexts: Sequence[int]
) -> dict[int, Path]:
    """The folder of one source at each context length, made where the cache does not have it; tokenises once."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    digest = tokenizer_digest(tokenizer)
    made_from = [FORMAT, UNIT_CHARACTERS, UNIT_CONTEXT, _identity(source, key), digest, control, data.held_out]
    cache = Path(data.cache).expanduser()
    folders = {context: cache / _hash([made_from, context]) for context in contexts}
    missing = [context for context, folder in folders.items() if not (folder / "manifest.json").exists()]
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".preparing-", dir=cache, ignore_cleanup_errors=True) as scratch:
            tokens = _tokenise(source, key, tokenizer, control, data, Path(scratch))
            for context in missing:
                _commit(tokens, context, Path(scratch, str(context)), folders[context])
    return folders


def _tokenise(source: Source, key: str, tokenizer: Any, control: Control, data: Data, scratch: Path) -> Any:
    """Tokenised units, one a row."""
    before, eos = control
    schema = pa.schema({"held_out": pa.bool_(), "texts": pa.list_(pa.large_string())})
    with pa.OSFile(str(scratch / "units.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for held_out, texts in _units(documents(source, key), data.held_out):
            stream.write_batch(pa.record_batch([[held_out], [texts]], schema=schema))
    units, number = datasets.Dataset.from_file(str(scratch / "units.arrow")), datasets.Value("int32")
    if len(units) == 0:
        raise ValueError(f"{key}: {source.path} holds no document that is not empty: give text")

    def tokenise(unit: dict[str, Any]) -> dict[str, Any]:
        options = {"add_special_tokens": False, "split_special_tokens": True}  # "</s>" in a text is text
        encoded = tokenizer(unit["texts"], **options, return_attention_mask=False, verbose=False)["input_ids"]
        tokens = [np.array([*before, *ids, eos], dtype=np.int32) for ids in encoded]
        return {"documents": len(encoded), "tokens": np.concatenate(tokens)}

    return units.map(
        tokenise,
        remove_columns=["texts"],
        features=datasets.Features(held_out=datasets.Value("bool"), documents=number, tokens=datasets.List(number)),
        num_proc=min(data.processes, len(units)) if data.processes > 1 else None,
        writer_batch_size=1,
        cache_file_name=str(scratch / "tokens.arrow"),
        new_fingerprint="tokens",  # spares hashing the tokenizer
        desc="tokenise",
    ).with_format("numpy", dtype=np.int32)


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


def _commit(tokens: Any, context: int, scratch: Path, folder: Path) -> None:
    """Write both splits and then the manifest into `scratch`, and rename it to `folder`."""
    scratch.mkdir()
    manifest: dict[str, Any] = {"fingerprint": folder.name, "context": context}
    held_out = np.array(tokens["held_out"][:], dtype=bool)
    for split, chosen in zip(SPLITS, (~held_out, held_out), strict=True):
        manifest[split] = _pack(tokens, np.flatnonzero(chosen), context, scratch / f"{split}.arrow")
    (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for path in (*scratch.iterdir(), scratch):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    try:
        os.rename(scratch, folder)
    except OSError:
        _manifest(folder)  # fine if another process was faster


def _pack(tokens: Any, units: np.ndarray, context: int, path: Path) -> dict[str, Any]:
    """Write the rows of `units`; returns their counts and digest. A tail that fills no row is dropped."""
    schema = pa.schema({"input_ids": pa.list_(pa.int32(), context)})
    number, total, rows, largest = 0, 0, 0, -1
    digest = xxhash.xxh3_128()
    together = max(1, context // UNIT_CONTEXT)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for start in range(0, len(units), together):
            pack = [tokens[int(unit)] for unit in units[start : start + together]]
            flat = np.concatenate([unit["tokens"] for unit in pack])
            kept = np.ascontiguousarray(flat[: len(flat) // context * context], dtype="<i4")
            column = pa.FixedSizeListArray.from_arrays(pa.array(kept), context)
            stream.write_batch(pa.record_batch([column], schema=schema))
            digest.update(kept.data)
            number += sum(int(unit["documents"]) for unit in pack)
            total, rows, largest = total + len(flat), rows + len(column), max(largest, int(flat.max()))
    counts = {"documents": number, "tokens": total, "rows": rows, "dropped_tokens": total - rows * context}
    return {**counts, "largest_id": largest, "bytes": path.stat().st_size, "digest": digest.hexdigest()}


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if all((folder / f"{name}.arrow").stat().st_size == manifest[name]["bytes"] for name in SPLITS):
            return manifest
    except (OSError, ValueError):
        pass
    raise ValueError(f"{folder} does not hold complete rows: remove it and prepare again")


def _hash(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value).encode())


# --- mixture ----------------------------------------------------------------------------------------------------------


def proportions(weights: Mapping[str, float]) -> dict[str, int]:
    """The weights as the whole numbers that a mixture realises exactly, the smallest as 100; sorted by name.

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

    def to(self, device: torch.device | str) -> "Batch":
        mask = None if self.token_mask is None else self.token_mask.to(device)
        return Batch(self.input_ids.to(device), self.labels.to(device), mask)


def batch(rows: Any, indices: Sequence[int]) -> Batch:
    """The rows at `indices` of a mixture or of `Rows`."""
    input_ids = torch.from_numpy(np.stack([rows[int(index)] for index in indices]).astype(np.int64))
    return Batch(input_ids=input_ids, labels=input_ids)
