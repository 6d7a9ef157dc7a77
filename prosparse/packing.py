"""From token ids to files of rows: packing, and folders that are complete or invisible.

In: the tokens of a segment's documents in order (tokenization.py).
Out: train.arrow, held_out.arrow and manifest.json, with counts and digests of both, in a folder that one rename makes
visible.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from prosparse import chat, shards
from prosparse.data import SPLITS, incomplete, read_manifest
from prosparse.tokenization import Tokens

UNIT_CONTEXT = 2048  # up to this context units are packed one by one, at n times this context n together
BATCH_TOKENS = 2**20  # of a record batch


class Writers:
    """The rows of one segment at one context length, on their way to its folder."""

    def __init__(self, scratch: Path, folder: Path, context: int, chats: bool, eos: int):
        scratch.mkdir()
        self._scratch, self._folder, self._context = scratch, folder, context
        self._splits = {split: _Writer(scratch / f"{split}.arrow", context, chats, eos) for split in SPLITS}

    def add(self, tokens: Tokens) -> None:
        self._splits[SPLITS[tokens.held_out]].add(tokens)

    def commit(self) -> None:
        """Write the manifest last, and rename the folder."""
        manifest: dict[str, Any] = {"fingerprint": self._folder.name, "context": self._context}
        manifest |= {split: writer.close() for split, writer in self._splits.items()}
        publish(manifest, self._scratch, self._folder)


class _Writer:
    """Packs the tokens of one split into rows and writes them."""

    def __init__(self, path: Path, context: int, chats: bool, eos: int):
        self._path, self._context, self._chats, self._eos = path, context, chats, eos
        names = chat.COLUMNS if chats else chat.COLUMNS[:1]
        self._schema = pa.schema({name: pa.list_(pa.int32(), context) for name in names})
        self._file = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_file(self._file, self._schema)
        self._counts = dict.fromkeys(chat.COUNTS if chats else chat.COUNTS[:4], 0)
        self._largest, self._digest, self._units = -1, xxhash.xxh3_128(), 0
        self._rest = np.empty(0, np.int32)  # tokens that do not fill a row yet
        self._group: list[Tokens] = []  # conversations that are packed together
        self._rows = np.empty((len(names), 0, context), "<i4")  # that do not fill a record batch yet

    def add(self, tokens: Tokens) -> None:
        self._largest = max(self._largest, int(tokens.ids.max()))
        if self._chats:
            self._group.append(tokens)
        else:
            whole = np.concatenate([self._rest, tokens.ids])
            rows = len(whole) // self._context
            self._count({"documents": tokens.documents, "tokens": len(tokens.ids), "rows": rows})
            self._rest = whole[rows * self._context :]
            self._put(whole[: rows * self._context].reshape(1, rows, self._context))
        self._units += tokens.ends
        if tokens.ends and self._units % max(1, self._context // UNIT_CONTEXT) == 0:
            self._start_anew()

    def close(self) -> dict[str, Any]:
        """Counts and digests of what was written."""
        self._start_anew()
        if self._rows.shape[1]:
            self._write(self._rows)
        self._stream.close()
        self._file.close()
        told = {**self._counts, "largest_id": self._largest, "digest": self._digest.hexdigest()}
        file = shards.digest(self._path)
        return told | {"bytes": file["size"], "file_digest": file["xxh3_128"]}

    def _start_anew(self) -> None:
        if self._group:
            packed, counts = chat.pack(_conversations(self._group), self._context, self._eos)
            self._count(counts)
            self._put(packed)
            self._group = []
        self._count({"dropped_tokens": len(self._rest)})
        self._rest = self._rest[:0]

    def _count(self, more: dict[str, int]) -> None:
        for name, count in more.items():
            self._counts[name] += count

    def _put(self, packed: np.ndarray) -> None:
        """`packed`: int32 [columns, rows, context]."""
        packed = np.ascontiguousarray(packed, "<i4")
        self._digest.update(packed.data)
        self._rows = np.concatenate([self._rows, packed], axis=1)
        size = max(1, BATCH_TOKENS // self._context)
        while self._rows.shape[1] >= size:
            self._write(self._rows[:, :size])
            self._rows = self._rows[:, size:]

    def _write(self, rows: np.ndarray) -> None:
        columns = [pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), self._context) for part in rows]
        self._stream.write_batch(pa.record_batch(columns, schema=self._schema))


def _conversations(group: list[Tokens]) -> Iterator[Any]:
    for tokens in group:
        ends = np.cumsum(tokens.lengths)[:-1]
        yield from zip(np.split(tokens.ids, ends), np.split(tokens.labels, ends), strict=True)


def publish(manifest: dict[str, Any], scratch: Path, folder: Path) -> None:
    """Write the manifest beside the files in `scratch`, and rename it to `folder`."""
    (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in (*scratch.iterdir(), scratch):
        shards.sync(path)
    try:
        os.rename(scratch, folder)
    except OSError:
        if not is_there(folder):  # else another process was faster
            raise ValueError(incomplete(folder)) from None


def checked(folder: Path, deep: bool) -> Any:
    """The manifest of a segment; None if a file is not the one that was written. `deep`: by digest, not by size."""
    try:
        manifest = read_manifest(folder)
        for split in SPLITS:
            told, path = manifest[split], folder / f"{split}.arrow"
            size = shards.digest(path) if deep else {"size": path.stat().st_size, "xxh3_128": told["file_digest"]}
            if size != {"size": told["bytes"], "xxh3_128": told["file_digest"]}:
                return None
        return manifest
    except (OSError, ValueError, KeyError):
        return None


def is_there(folder: Path) -> bool:
    """Whether a folder was made; not whether it is still whole."""
    return (folder / "manifest.json").exists()
