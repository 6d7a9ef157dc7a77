"""The documents of a source, in a fixed order, cut into segments, and what stands for their content.

In: a `Source`: a named text, a file, a folder, a URL or a Hub data set, of text or of conversations.
Out: segments, each with its documents and its identity; where they begin and end depends on the source alone.
"""

import io
import json
import os
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from uuid import uuid4

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from prosparse import chat
from prosparse.config import Source

TEXT_ENDINGS = tuple(f".{name}" for name in "txt md rst tex html py c h cc cpp cu go java js ts rb rs sh sql".split())  # noqa: SIM905
COMPRESSED = {".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
ENDINGS = (".jsonl", *COMPRESSED, ".parquet", *TEXT_ENDINGS)
SEGMENT_BYTES = 2**27  # of files; the part that reaches it ends a segment
SEGMENT_ROWS = 2**16  # of a Hub data set
PIECE_CHARACTERS = 2**20  # a longer text is read and tokenized in pieces
CUTS = [re.compile(cut, re.DOTALL) for cut in (r".*\S\n(?=\S)", r".*\n", r".*\S(?=\s)")]  # where, best first
STAMPS = "ETag etag md5Hash Content-MD5 blob_id LastModified Last-Modified last_modified mtime created".split()  # noqa: SIM905
SETTLED_SECONDS = 10  # a file that was written so lately may still change without a new time of change


@dataclass(frozen=True)
class Long:
    """A text file too long to hold; joined, its pieces are the text."""

    digest: int  # xxh3_64 of the text
    pieces: Callable[[], Iterator[str]]


Document = str | Long


@dataclass(frozen=True)
class Segment:
    """A stretch of a source, which is prepared by itself."""

    size: int  # bytes, or what stands for them
    documents: Callable[[], Iterator[Document]]
    identity: Callable[[Path, bool], Any]
    """(cache, may read) -> what stands for the content of all that is read; None if that would have to be read."""


@dataclass(frozen=True)
class File:
    path: str
    name: str  # within the source
    size: int
    stamp: Any  # changes with the content; None: nothing is known that does
    system: Any = None  # of fsspec; None: a path of this machine

    def open(self) -> Any:
        return open(self.path, "rb", 2**20) if self.system is None else self.system.open(self.path, "rb")


@dataclass(frozen=True)
class Part:
    """Of a file that is cut into `of` stretches of equal bytes, the rows that begin in the one with this number."""

    file: File
    number: int = 0
    of: int = 1


def documents(source: Source, key: str = "text") -> Iterator[Document]:
    """The documents of a source in a fixed order, one at a time.

    A text file is one document; in .jsonl, .parquet and Hub data sets it is a row's `source.column` (null: an empty
    document), of a chat source a row's conversation as JSON. A folder is read recursively, sorted by relative path,
    without hidden files and folders. Text files that are not UTF-8 are skipped, which is said on stderr.

    Raises ValueError, with `key` as the name of the config key, for a path that does not exist or holds nothing
    readable, for a missing column, and for what is no conversation where one is wanted.
    """
    for segment in segments(source, key):
        yield from segment.documents()


def segments(source: Source, key: str) -> list[Segment]:
    """The source cut in order; reads no content but that of a named text. Raises ValueError as `documents` does."""
    read = chat.columns(source) if source.is_chat else source.column
    if source.path in NAMED_TEXTS:
        _refuse_text(source, source.path, key)
        texts = NAMED_TEXTS[source.path]
        return [Segment(sum(map(len, texts())), texts, lambda cache, may_read: [hashed(list(map(hashed, texts())))])]
    if source.path.startswith("hub://"):
        rows = _load_hub(source, key)
        starts = range(0, len(rows), SEGMENT_ROWS)
        per_row = (rows.data.nbytes or 0) // max(1, len(rows.data))
        return [
            _hub_segment(rows, start, source, key, [source.path, read, rows._fingerprint], per_row) for start in starts
        ]
    found: list[list[Part]] = [[]]
    for file in _files(source.path, key):
        splits = file.path.lower().endswith((".jsonl", ".parquet"))
        of = max(1, -(-file.size // SEGMENT_BYTES)) if splits else 1
        for number in range(of):
            found[-1].append(Part(file, number, of))
            if sum(part.file.size / part.of for part in found[-1]) >= SEGMENT_BYTES:
                found.append([])
    made = []
    for parts in filter(None, found):
        size = int(sum(part.file.size / part.of for part in parts))
        read_all = partial(_read, parts, source, key)
        made.append(Segment(size, read_all, partial(_identity, parts, read, key)))
    return made


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """A text cut at line ends, else at white space, in pieces of up to PIECE_CHARACTERS; the text alone says where."""
    held = ""
    for chunk in chunks:
        held += chunk
        while len(held) > PIECE_CHARACTERS:
            cuts = (cut.match(held, 0, PIECE_CHARACTERS + 1) for cut in CUTS)
            at = next((min(cut.end(), PIECE_CHARACTERS) for cut in cuts if cut), PIECE_CHARACTERS)
            yield held[:at]
            held = held[at:]
    if held:
        yield held


def hashed(value: Any) -> str:
    """A digest of plain data."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value).encode())


# --- what there is ----------------------------------------------------------------------------------------------------


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


def _files(path: str, key: str) -> list[File]:
    if "://" in path:
        found = _remote_files(path, key)
    else:
        root = Path(path).expanduser().absolute()
        if not root.exists():
            names = ", ".join(NAMED_TEXTS)
            raise ValueError(f"{key}: {path} does not exist: give {names}, a file, a folder, a URL or hub://NAME")
        paths = _walk(root, ENDINGS) if root.is_dir() else [root] * root.name.lower().endswith(ENDINGS)
        stats = [(path, path.stat()) for path in paths]
        found = [File(str(p), p.relative_to(root).as_posix(), s.st_size, s.st_mtime_ns) for p, s in stats]
    if not found:
        raise ValueError(f"{key}: {path} holds nothing that is read: give files that end in {' '.join(ENDINGS)}")
    return found


def _remote_files(path: str, key: str) -> list[File]:
    """What fsspec finds below a URL, as `_walk` finds it below a folder."""
    try:
        system, root = fsspec.url_to_fs(path)
        one = root.lower().endswith(ENDINGS)  # over HTTP a file may pass for a folder: it is read for links
        listed = {root: system.info(root)} if one else system.find(root, detail=True)
        found = []
        for place, info in listed.items():
            name = place.removeprefix(root).strip("/")
            if place.lower().endswith(ENDINGS) and not any(part.startswith(".") for part in name.split("/")):
                info = info if info.get("size") is not None else system.info(place)
                stamp = next((str(info[stamp]) for stamp in STAMPS if info.get(stamp)), None)
                found.append(File(place, name or ".", info.get("size") or 0, stamp, system))
    except ImportError as error:  # fsspec's says which package opens such a URL
        raise ValueError(f"{key}: {path} needs a package that is not installed: {error}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{key}: {path} does not exist: mind its spelling, and who may read it") from error
    except Exception as error:  # each driver has its own
        raise ValueError(f"{key}: {path} cannot be listed: {type(error).__name__}: {error}") from error
    return sorted(found, key=lambda file: file.name)


def _load_hub(source: Source, key: str) -> datasets.Dataset:
    try:
        rows = datasets.load_dataset(source.path.removeprefix("hub://"), source.config, split=source.split)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {source.path} cannot be loaded, mind its config and split: {error}") from error
    wanted = list(chat.columns(source).values())
    return rows.select_columns(wanted) if set(wanted) <= set(rows.column_names) else rows


def _hub_segment(rows: Any, start: int, source: Source, key: str, identity: list, per_row: int) -> Segment:
    last = min(start + SEGMENT_ROWS, len(rows))
    read = lambda: _texts(rows.select(range(start, last)), source, f"{key}: {source.path}", start + 1)  # noqa: E731
    return Segment(per_row * (last - start), read, lambda cache, may_read: [*identity, start, last])


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(parts: list[Part], source: Source, key: str) -> Iterator[Document]:
    """The documents of some parts."""
    skipped = []
    for part in parts:
        where = f"{key}: {part.file.path}"
        if part.file.path.lower().endswith(TEXT_ENDINGS):
            _refuse_text(source, part.file.path, key)
        with _readable(where):
            try:
                if part.file.path.lower().endswith(TEXT_ENDINGS):
                    yield _text(part.file)
                else:
                    yield from _rows(part, source, where)
            except UnicodeDecodeError:
                skipped.append(part.file.path)
            _refuse_changed(part.file, key)
    if skipped:
        print(f"{key}: skipped {len(skipped)} files that are not UTF-8, first {skipped[0]}", file=sys.stderr)


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """What a driver or a decoder says of a file, with its name."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{where} cannot be read ({why}): replace or remove it") from error


def _refuse_changed(file: File, key: str) -> None:
    """ValueError if a file of this machine is no longer the one that was listed, and by which its rows are known."""
    now = os.stat(file.path) if file.system is None else None
    if now is not None and (now.st_mtime_ns, now.st_size) != (file.stamp, file.size):
        raise ValueError(f"{key}: {file.path} was changed while it was read: prepare again when it is whole")


def _text(file: File) -> Document:
    def chunks() -> Iterator[str]:
        with io.TextIOWrapper(file.open(), encoding="utf-8-sig") as stream:
            while chunk := stream.read(PIECE_CHARACTERS):
                yield chunk

    if 0 < file.size <= PIECE_CHARACTERS:
        return "".join(chunks())
    digest = xxhash.xxh3_64()
    for chunk in chunks():
        digest.update(chunk.encode())
    return Long(digest.intdigest(), lambda: pieces(chunks()))


def _rows(part: Part, source: Source, where: str) -> Iterator[str]:
    """The texts of a .parquet or .jsonl file's part; of .parquet only the source's columns are read, if it has them."""
    ending = part.file.path.lower()
    with part.file.open() as stream:
        if ending.endswith(".parquet"):
            with pq.ParquetFile(stream) as file:
                groups = _groups(file, part)
                before = sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
                wanted = list(chat.columns(source).values())
                columns = wanted if set(wanted) <= set(file.schema_arrow.names) else None
                batches = file.iter_batches(batch_size=256, row_groups=list(groups), columns=columns)
                rows = (row for batch in batches for row in batch.to_pylist())
                yield from _texts(rows, source, where, before + 1)
            return
        codec = next((codec for name, codec in COMPRESSED.items() if ending.endswith(name)), None)
        begin, end = _span(stream, part)
        if part.of > 1 and begin == end:
            return
        stream.seek(begin)
        lines = stream if codec is None else io.BufferedReader(pa.input_stream(stream, codec), 2**20)
        yield from _texts(_json(lines, begin, end if part.of > 1 else None, where), source, where)


def _json(lines: Iterable[bytes], begin: int, end: int | None, where: str) -> Iterator[Any]:
    at = begin
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError as error:
            after = f" after byte {begin}" if begin else ""
            raise ValueError(f"{where} line {number}{after} is not JSON: {error}") from error
        at += len(line)
        if end is not None and at >= end:
            return


def _span(stream: Any, part: Part) -> tuple[int, int]:
    """First byte of the part's first line, and of the next part's."""

    def line(number: int) -> int:
        at = part.file.size * number // part.of
        if at in (0, part.file.size):
            return at
        stream.seek(at - 1)
        stream.readline()
        return stream.tell()

    return line(part.number), line(part.number + 1)


def _groups(file: pq.ParquetFile, part: Part) -> range:
    number = file.metadata.num_row_groups
    return range(number * part.number // part.of, number * (part.number + 1) // part.of)


def _refuse_text(source: Source, path: Any, key: str) -> None:
    if source.is_chat:
        named = " and ".join(f"`{name}`" for name in chat.columns(source))
        raise ValueError(
            f"{key}: {path} is text without columns: remove {named}, or give .jsonl, .parquet or hub://NAME"
        )


def _texts(rows: Iterable[Any], source: Source, where: str, first: int = 1) -> Iterator[str]:
    columns = chat.columns(source)
    other = "" if source.is_chat else "; if it holds conversations, set `messages`, or `prompt` and `answer`"
    for number, row in enumerate(rows, first):
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


# --- what stands for it -----------------------------------------------------------------------------------------------


def _identity(parts: list[Part], read: Any, key: str, cache: Path, may_read: bool) -> list[Any] | None:
    """The names of all files and a digest of each content; where it lies elsewhere and has one, its stamp instead."""
    if all(part.file.system is not None and part.file.stamp for part in parts):
        contents = [f"{part.file.size} bytes, {part.file.stamp}" for part in parts]
    else:
        told = hashed([[part.file.path, part.file.size, part.file.stamp, part.number, part.of] for part in parts])
        known = cache / "known" / f"{told}.json"  # so each content is read for it once, by one machine
        try:
            contents = json.loads(known.read_text())
        except (OSError, ValueError):
            if not may_read:
                return None
            now = time.time_ns()
            contents = [_content(part, key) for part in parts]
            stamps = [part.file.stamp for part in parts]
            if all(isinstance(stamp, int) and stamp < now - SETTLED_SECONDS * 10**9 for stamp in stamps):
                known.parent.mkdir(parents=True, exist_ok=True)
                temporary = known.with_suffix(f".{uuid4().hex}")
                temporary.write_text(json.dumps(contents))
                os.replace(temporary, known)
    names = [[part.file.name, part.number, part.of] for part in parts]
    return [read, *([*name, content] for name, content in zip(names, contents, strict=True))]


def _content(part: Part, key: str) -> str:
    """A digest of all bytes that the part's rows are made of."""
    hashed, file = xxhash.xxh3_128(), part.file
    with _readable(f"{key}: {file.path}"), file.open() as stream:
        spans = [(0, file.size or sys.maxsize)]  # over HTTP the size may not be known
        if part.of > 1 and file.path.lower().endswith(".parquet"):
            spans = _parquet_spans(stream, part)
        elif part.of > 1:
            spans = [_span(stream, part)]
        for begin, end in spans:
            stream.seek(begin)
            while begin < end and (block := stream.read(min(2**22, end - begin))):
                hashed.update(block)
                begin += len(block)
    _refuse_changed(file, key)
    return hashed.hexdigest()


def _parquet_spans(stream: Any, part: Part) -> list[tuple[int, int]]:
    """The bytes of the part's row groups, and the footer, which says what they mean."""
    file = pq.ParquetFile(stream)
    footer = part.file.size - file.metadata.serialized_size - 8
    begins = []
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        columns = [group.column(column) for column in range(group.num_columns)]
        begins.append(min(c.dictionary_page_offset or c.data_page_offset for c in columns))
    groups, begins = _groups(file, part), [*begins, footer]
    return [(begins[groups.start], begins[groups.stop]), (footer, part.file.size)]
