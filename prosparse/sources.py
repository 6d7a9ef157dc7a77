"""The documents of a source, in a fixed order, and what stands for their content.

In: a `Source`: a named text, a file, a folder or a Hub data set, of text or of conversations. Out: texts; an identity.
"""

import hashlib
import io
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from prosparse import chat
from prosparse.config import Source

TEXT_ENDINGS = tuple(f".{name}" for name in "txt md rst tex html py c h cc cpp cu go java js ts rb rs sh sql".split())  # noqa: SIM905
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", *TEXT_ENDINGS)


def documents(source: Source, key: str = "text") -> Iterator[str]:
    """The documents of a source in a fixed order, one at a time.

    A text file is one document; in .jsonl, .parquet and Hub data sets it is a row's `source.column` (null: an empty
    document), of a chat source a row's conversation as JSON. A folder is read recursively, sorted by relative path,
    without hidden files and folders. Text files that are not UTF-8 are skipped, which is said on stderr.

    Raises ValueError, with `key` as the name of the config key, for a path that does not exist or holds nothing
    readable, for a missing column, and for what is no conversation where one is wanted.
    """
    if source.path in NAMED_TEXTS:
        _refuse_text(source, source.path, key)
        yield from NAMED_TEXTS[source.path]()
    elif source.path.startswith("hub://"):
        yield from _texts(_load_hub(source, key), source, f"{key}: {source.path}")
    else:
        skipped = []
        for path in _files(source.path, key):
            if not path.name.lower().endswith(TEXT_ENDINGS):
                where = f"{key}: {path}"
                yield from _texts(_table(path, source, where), source, where)
                continue
            _refuse_text(source, path, key)
            try:
                yield path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError:
                skipped.append(path)
        if skipped:
            print(f"{key}: skipped {len(skipped)} files that are not UTF-8, first {skipped[0]}", file=sys.stderr)


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


def _table(path: Path, source: Source, where: str) -> Iterator[Any]:
    """The rows of a .parquet or .jsonl file as dicts; of .parquet only the source's columns, if it has them."""
    if path.name.lower().endswith(".parquet"):
        with pq.ParquetFile(path) as file:
            wanted = list(chat.columns(source).values())
            columns = wanted if set(wanted) <= set(file.schema_arrow.names) else None
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
    wanted = list(chat.columns(source).values())
    return rows.select_columns(wanted) if set(wanted) <= set(rows.column_names) else rows


def _refuse_text(source: Source, path: Any, key: str) -> None:
    if source.is_chat:
        named = " and ".join(f"`{name}`" for name in chat.columns(source))
        raise ValueError(
            f"{key}: {path} is text without columns: remove {named}, or give .jsonl, .parquet or hub://NAME"
        )


def _texts(rows: Iterable[Any], source: Source, where: str) -> Iterator[str]:
    columns = chat.columns(source)
    other = "" if source.is_chat else "; if it holds conversations, set `messages`, or `prompt` and `answer`"
    for number, row in enumerate(rows, 1):
        for key, column in columns.items():
            if not isinstance(row, dict) or column not in row:
                has = ", ".join(row) if isinstance(row, dict) else "none"
                raise ValueError(
                    f"{where}: row {number} has no column {column!r}: set `{key}` to one that it has ({has}){other}"
                )
        if source.is_chat:
            text = chat.conversation(row, source, f"{where}: row {number}")
        else:
            text = "" if row[source.column] is None else row[source.column]
        if not isinstance(text, str):
            told = f"{source.column!r} but {text!r:.40}: set another `column`"
            raise ValueError(f"{where}: row {number} has no text in {told}{other}")
        yield text.encode("utf-8", "replace").decode()  # JSON may hold half of a surrogate pair


def identity(source: Source, key: str) -> list[Any]:
    """What stands for a source in a fingerprint: the content of all that is read, wherever it lies."""
    if source.path in NAMED_TEXTS:
        return [hashed(list(map(hashed, documents(source, key))))]
    read = chat.columns(source) if source.is_chat else source.column
    if source.path.startswith("hub://"):
        return [source.path, read, _load_hub(source, key)._fingerprint]
    root = Path(source.path).expanduser()
    identity: list[Any] = [read]
    for path in _files(source.path, key):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        identity.append([path.relative_to(root).as_posix(), digest])
    return identity


def hashed(value: Any) -> str:
    """A digest of plain data."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value).encode())
