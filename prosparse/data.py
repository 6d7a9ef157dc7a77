"""Token rows, and from them the batches of a training.

In: what preparation.py made: rows of exactly `context` token ids in many Arrow files, and tables that say where.
Out: rows by number, their mixture by index, and batches of it. Files are mapped when a row of theirs is asked for, and
only a few at a time, so neither opening nor memory grows with the text.
"""

import json
import logging
import sys
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

from prosparse import chat
from prosparse.sources import hashed

SPLITS = ("train", "held_out")
OPEN_FILES = 32  # of one `Rows`


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One Arrow file of rows."""

    path: Path
    rows: int
    bytes: int


class Rows:
    """Token rows in Arrow files, one file after the other; any number of threads may read them.

    `rows[i]` is int32 `[context]`, read-only, of a chat source `[3, context]`: ids, labels, positions (-1: padding).
    It raises ValueError if the file that holds it is gone or not the one that was prepared.
    """

    def __init__(self, shards: Sequence[Shard]):
        self.shards = [shard for shard in shards if shard.rows > 0]
        self.ends = np.cumsum([shard.rows for shard in self.shards], dtype=np.int64).tolist()
        self._open: OrderedDict[int, _Open] = OrderedDict()  # the last one used at the end
        self._lock = Lock()

    def __reduce__(self) -> tuple[type, tuple[list[Shard]]]:
        """Another process opens the files itself."""
        return Rows, (self.shards,)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect_right(self.ends, index)
        row = index - self.ends[number] + self.shards[number].rows
        with self._lock:
            if number not in self._open:
                self._open[number] = _Open(self.shards[number])
                if len(self._open) > OPEN_FILES:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            columns = self._open[number].row(row)
        return columns[0] if len(columns) == 1 else np.stack(columns)


class _Open:
    """A mapped file; its rows keep the mapping alive. All its record batches but the last have equally many rows."""

    def __init__(self, shard: Shard):
        try:
            if shard.path.stat().st_size != shard.bytes:
                raise pa.ArrowInvalid("of another size")
            self._reader = pa.ipc.open_file(pa.memory_map(str(shard.path)))
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(incomplete(shard.path.parent)) from error
        self._blocks: dict[int, list[np.ndarray]] = {}
        self._size = len(self._block(0)[0])

    def _block(self, number: int) -> list[np.ndarray]:
        if number not in self._blocks:
            columns = self._reader.get_batch(number).columns
            self._blocks[number] = [c.flatten().to_numpy().reshape(-1, c.type.list_size) for c in columns]
        return self._blocks[number]

    def row(self, number: int) -> list[np.ndarray]:
        block, row = divmod(number, self._size)
        return [column[row] for column in self._block(block)]


def incomplete(*folders: Path) -> str:
    """What to tell of folders whose files are not those that were prepared."""
    shown = ", ".join(map(str, folders[:5])) + ", ..." * (len(folders) > 5)
    does, them = ("does", "it") if len(folders) == 1 else ("do", "them")
    return f"{shown} {does} not hold complete rows: remove {them} and prepare again"


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


def open_prepared(folders: Mapping[str, Path]) -> Prepared:
    """Open what `prepare` made, by the folder of each source; reads its table, no text and no rows.

    Raises ValueError for a folder without a table.
    """
    manifests, shards = {}, {}
    for name, folder in folders.items():
        manifests[name] = read_manifest(folder)
        shards[name] = _shards(folder, manifests[name].pop("shards"))
    digests = [[name, *(manifest[split]["digest"] for split in SPLITS)] for name, manifest in manifests.items()]
    return Prepared(
        context=next(iter(manifests.values()))["context"],
        train={name: Rows(splits["train"]) for name, splits in shards.items()},
        held_out=Rows([shard for splits in shards.values() for shard in splits["held_out"]]),
        fingerprint=hashed([[name, manifest["fingerprint"]] for name, manifest in manifests.items()]),
        digest=hashed(digests),
        manifests=manifests,
        folders=dict(folders),
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a source or of a segment; raises ValueError if it cannot be read."""
    try:
        return json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(incomplete(folder)) from error


def _shards(folder: Path, table: dict[str, Any]) -> dict[str, list[Shard]]:
    """The files of a source's table by split."""
    return {
        split: [
            Shard(folder.parent / segment / f"{split}.arrow", rows, size)
            for segment, rows, size in zip(
                table["segments"], *(table[split][k] for k in ("rows", "bytes")), strict=True
            )
        ]
        for split in SPLITS
    }


# --- mixture ----------------------------------------------------------------------------------------------------------


def proportions(weights: Mapping[str, float]) -> dict[str, int]:
    """The smallest whole numbers in the proportion of the weights, as these are written in decimals; sorted by name."""
    exact = {name: Fraction(repr(float(weights[name]))) for name in sorted(weights)}
    unit = lcm(*(weight.denominator for weight in exact.values()))
    common = gcd(*(int(weight * unit) for weight in exact.values()))
    return {name: int(weight * unit) // common for name, weight in exact.items()}


def epochs(rows: Mapping[str, Sized], weights: Mapping[str, float], rows_used: int) -> dict[str, float]:
    """How often the first `rows_used` rows of the mixture pass through each source."""
    parts = proportions(weights)
    return {name: rows_used * part / sum(parts.values()) / len(rows[name]) for name, part in parts.items()}


class Turns:
    """Which source gives row i of an endless mixture, and its how manieth: `turns[i]` is (source, row).

    The first source takes its share of the rows, rounded down at each end, the next one of what is left, and so on: of
    any n rows a source has its share within a row for each source before it, and one.
    """

    def __init__(self, parts: Sequence[int]):
        self.parts = parts

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        index = int(index)  # numpy's would overflow below
        source, whole, before, through = 0, sum(self.parts), index, index + 1  # rows left up to the row, and with it
        while True:
            rest = whole - self.parts[source]
            left_before, left_through = before * rest // whole, through * rest // whole
            if left_through == left_before:
                return source, before - left_before
            source, whole, before, through = source + 1, rest, left_before, left_through


def mixture(rows: Mapping[str, Rows], weights: Mapping[str, float], seed: int) -> Any:
    """An endless grain.MapDataset whose row i, int32 `[context]`, is a function of (rows, weights, seed, i) alone.

    Each source is shuffled, anew in every epoch, and has its share of every stretch of rows (see `Turns`; grain's own
    mixture would round weights to a hundredth of the smallest).
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # grain complains at import that it has no jax profiler
    import grain

    parts = proportions(weights)
    # grain shuffles epoch e with seed + e: neighboring seeds would repeat each other's order one epoch later
    seeds = {name: xxhash.xxh32_intdigest(f"{seed}/{name}".encode()) for name in parts}
    sources = [grain.MapDataset.source(rows[name]).shuffle(seed=seeds[name]).repeat() for name in parts]
    return grain.MapDataset.select_from_datasets(sources, Turns(list(parts.values())))  # type: ignore[arg-type]


@dataclass
class Batch:
    """Some rows as tensors on the CPU, or the same stretch of each."""

    input_ids: Tensor  # int64 [sequences, context]
    labels: Tensor  # int64 [sequences, context]: what each position predicts, the token after it; -100: not counted
    token_mask: Tensor | None = None  # bool [sequences, context]; None: there is no padding
    position_ids: Tensor | None = None  # int64 [sequences, context], 0 where a document begins; None: rows are whole

    def to(self, device: torch.device | str) -> "Batch":
        if torch.device(device).type != "cuda":
            return Batch(*(None if part is None else part.to(device) for part in vars(self).values()))  # type: ignore[arg-type]
        moved = (None if p is None else p.pin_memory().to(device, non_blocking=True) for p in vars(self).values())
        return Batch(*moved)  # type: ignore[arg-type]

    def inputs(self) -> dict[str, Tensor]:
        """What the model's forward takes: without positions it counts through each row."""
        return {"input_ids": self.input_ids} | (
            {} if self.position_ids is None else {"position_ids": self.position_ids}
        )


def next_tokens(labels: Tensor) -> Tensor:
    """What each position of [sequences, context] predicts: the label after it, -100 at the end."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def batch(rows: Any, indices: Sequence[int]) -> Batch:
    """The rows at `indices` of a mixture or of `Rows`, text and chat alike; padding is a document of its own."""
    chosen = [rows[int(index)] for index in indices]
    if all(row.ndim == 1 for row in chosen):
        input_ids = torch.from_numpy(np.stack(chosen).astype(np.int64))
        return Batch(input_ids=input_ids, labels=next_tokens(input_ids))
    whole = [row if row.ndim == 2 else np.stack([row, row, np.arange(len(row))]) for row in chosen]
    input_ids, labels, positions = torch.from_numpy(np.stack(whole).astype(np.int64)).unbind(1)
    kept = positions != chat.PADDING
    positions = positions.where(kept, (~kept).cumsum(1) - 1)
    bounded = bool((positions != torch.arange(positions.shape[1])).any())
    return Batch(input_ids, next_tokens(labels), None if kept.all() else kept, positions if bounded else None)
