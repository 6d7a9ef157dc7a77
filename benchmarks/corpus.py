"""A corpus that needs a package mirror and no Hub: `python benchmarks/corpus.py OUT [megabytes=60] [code=0.25]`.

In: the documentation in Debian packages (`apt-get download`; packages that already lie in OUT/packages are taken from
there) and the sources of installed Python packages. Out: OUT/corpus.jsonl, a document a line ({text, origin}), in the
order of the documents' digests, so that any part of it is a random sample; OUT/manifest.json: packages and versions,
counts, bytes, digest. The same versions give the same bytes. Needs a Debian or Ubuntu with perl, and lxml.
"""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, distribution
from itertools import groupby
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lxml import html

# Packages and which of their files are read: English, one form of each text, no indices.
DEBIAN = {
    "apache2-doc": "*/manual/en/*.html",
    "debian-faq": "*.en.html",
    "debian-handbook": "*/en-US/*.html",
    "debian-policy": "*/policy.html/*.html",
    "debian-reference-en": "*.en.html",
    "developers-reference": "*.html",
    "erlang-doc": "*.html",
    "gimp-help-en": "*.html",
    "git-doc": "*.html",
    "installation-guide-amd64": "*/en/*.html",
    "linux-doc": "*.html",
    "maint-guide": "*.en.html",
    "octave-doc": "*.html",
    "perl-doc": "*.pod",
    "postfix-doc": "*.html",
    "postgresql-doc": "*.html",
    "python-django-doc": "*.html",
    "python-sqlalchemy-doc": "*.html",
    "python3-doc": "*.html",
    "r-doc-html": "*.html",
    "rust-doc": "*/book/*.html",
    "sqlite3-doc": "*.html",
}
LEFT_OUT = (
    "*/translations/* */_modules/* *genindex* *contents.html *search.html *changelog* *changes.html *print.html "
    "*maintainers.html"
)
PYTHON = (
    "datasets deepspeed huggingface-hub hydra-core matplotlib numpy omegaconf pandas pyarrow safetensors tokenizers "
    "torch transformers"
)
SHORTEST, LONGEST = 500, 500_000  # characters of a document
SKIPPED = "script style nav header footer form button noscript svg math head"
BLOCKS = (
    "address article aside blockquote body br caption dd div dl dt figcaption figure h1 h2 h3 h4 h5 h6 hr li main ol p "
    "pre section table tbody thead tr ul"
)


@dataclass
class Document:
    text: str
    origin: str  # PACKAGE/PATH

    @property
    def digest(self) -> str:
        """Equal for texts that differ in white space and case only."""
        return hashlib.sha256(" ".join(self.text.lower().split()).encode()).hexdigest()


def text_of_html(source: bytes) -> str:
    """The text of a page, blocks apart, <pre> as it is, without scripts, navigation and forms."""
    parts: list[str] = []

    def add(text: str | None, kept: bool) -> None:
        if text:
            parts.append(text if kept else re.sub(r"\s+", " ", text))

    def walk(element: Any, kept: bool) -> None:
        name = element.tag if isinstance(element.tag, str) else None  # None: a comment
        if name and name not in SKIPPED.split():
            block = name in BLOCKS.split()
            parts.append("\n\n" if name in ("p", "pre", "h1", "h2", "h3", "h4") else "\n" if block else "")
            parts.append("\t" if name in ("td", "th") else "- " if name == "li" else "")
            inside = kept or name == "pre"
            add(element.text, inside)
            for child in element:
                walk(child, inside)
            parts.append("\n\n" if name in ("p", "pre", "h1", "h2", "h3", "h4") else "\n" if block else "")
        add(element.tail, kept)

    if not source.strip():
        return ""
    charset = re.search(rb"charset=[\"']?([\w-]+)", source[:2000])
    walk(html.fromstring(source, parser=html.HTMLParser(encoding=charset[1].decode() if charset else "utf-8")), False)
    return tidy("".join(parts).replace("¶", ""))


def tidy(text: str) -> str:
    """Line ends are \\n, none with white space before them, at most one empty line in a row."""
    lines = [line.rstrip().replace("\xa0", " ") for line in text.replace("\r", "").split("\n")]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(" ".join(line.split()) if "\t" in line else line for line in lines))
    return re.sub(r"^ (?=\S)", "", text, flags=re.MULTILINE).strip() + "\n"


def without_navigation(texts: list[str]) -> list[str]:
    """Pages of one package without the lines that a tenth of them, and at least 5, have."""
    seen = Counter(line for text in texts for line in set(text.split("\n")) if line)
    common = {line for line, count in seen.items() if count >= max(5, len(texts) / 10)}
    return [tidy("\n".join(line for line in text.split("\n") if line not in common)) for text in texts]


def chosen(documents: Iterable[Document], size: int) -> tuple[list[Document], Counter]:
    """The distinct documents in the order of their digests, up to `size` bytes; and what was left out, and why."""
    found: dict[str, Document] = {}
    left_out: Counter = Counter()
    for document in documents:
        if not SHORTEST <= len(document.text) <= LONGEST:
            left_out["too short" if len(document.text) < SHORTEST else "too long"] += 1
        elif found.setdefault(document.digest, document) is not document:
            left_out["met before"] += 1
    kept, used = [], 0
    for _, document in sorted(found.items()):
        used += len(document.text.encode())
        if used > size:
            left_out["beyond the size"] = len(found) - len(kept)
            break
        kept.append(document)
    return kept, left_out


def download(name: str, folder: Path) -> Path:
    """The package's .deb; of a package that only depends on the current version's (python3-doc) that one's."""
    depends = subprocess.run(["apt-cache", "depends", name], capture_output=True, text=True).stdout
    names = re.findall(rf"Depends: ({re.escape(name.removesuffix('-doc'))}[\d.]*-doc[\w.-]*)", depends)
    name = names[0] if names else name
    if not list(folder.glob(f"{name}_*.deb")):
        done = subprocess.run(["apt-get", "download", name], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{name}: apt-get download failed; try apt-get update: {done.stderr.strip()[-300:]}")
    if len(found := list(folder.glob(f"{name}_*.deb"))) > 1:
        raise ValueError(f"{folder} has {name} in {len(found)} versions: remove all but one")
    return found[0]


def debian(package: Path, name: str) -> Iterator[Document]:
    """The documents of a .deb."""
    with TemporaryDirectory(dir=package.parent) as unpacked:
        subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
        yield from _documents(Path(unpacked), name)


def _documents(unpacked: Path, name: str) -> Iterator[Document]:
    files = sorted(file for file in unpacked.rglob("*") if file.is_file() and not file.is_symlink())
    paths = {file: file.relative_to(unpacked).as_posix() for file in files}
    files = [
        f for f, p in paths.items() if fnmatch(p, DEBIAN[name]) and not any(fnmatch(p, o) for o in LEFT_OUT.split())
    ]
    if DEBIAN[name].endswith(".pod"):
        run = [subprocess.run(["pod2text", "-u", file], capture_output=True, check=True).stdout for file in files]
        texts = [tidy(text.decode("utf-8", "replace")) for text in run]
    else:
        texts = without_navigation([text_of_html(file.read_bytes()) for file in files])
    yield from (Document(text, f"{name}/{paths[file]}") for file, text in zip(files, texts, strict=True))


def python(name: str) -> Iterator[Document]:
    """The source files of an installed Python package, without its tests."""
    for path in sorted(distribution(name).files or [], key=str):
        if path.suffix == ".py" and not re.search(r"(^|/)(tests?|testing|_vendor)/|(^|/)test_", str(path)):
            file = Path(str(path.locate()))
            if file.exists():
                yield Document(tidy(file.read_text(encoding="utf-8", errors="replace")), f"{name}/{path}")


def write(out: Path, documents: list[Document], manifest: dict) -> dict:
    """OUT/corpus.jsonl and OUT/manifest.json; the manifest with counts and digest."""
    documents = sorted(documents, key=lambda document: document.digest)
    lines = [json.dumps({"text": d.text, "origin": d.origin}, ensure_ascii=False) + "\n" for d in documents]
    out.mkdir(parents=True, exist_ok=True)
    (part := out / "corpus.jsonl.part").write_text("".join(lines), encoding="utf-8")
    part.replace(out / "corpus.jsonl")
    by_source = sorted((d.origin.split("/")[0], len(d.text.encode())) for d in documents)
    manifest["sources"] = {
        name: {"version": manifest["versions"].get(name), "documents": len(sizes), "bytes": sum(sizes)}
        for name, sizes in ((n, [size for _, size in g]) for n, g in groupby(by_source, key=lambda found: found[0]))
    }
    del manifest["versions"]
    manifest |= {"documents": len(documents), "bytes": sum(size for _, size in by_source)}
    manifest["sha256"] = hashlib.sha256("".join(lines).encode()).hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def main(out: str, *options: str) -> None:
    given = {"megabytes": "60", "code": "0.25"} | dict(o.partition("=")[::2] for o in options)
    try:
        megabytes, share = float(given.pop("megabytes")), float(given.pop("code"))
    except ValueError:
        megabytes = share = -1.0
    if given or not 0 < megabytes < inf or not 0 <= share <= 1:
        raise ValueError(
            f"{', '.join(options)}: give megabytes=N (of text) and code=SHARE (of it that is Python, 0 to 1)"
        )
    packages = Path(out) / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    versions: dict[str, str] = {}
    prose: list[Document] = []
    code: list[Document] = []
    for name in DEBIAN:
        deb = download(name, packages)
        shown = ["dpkg-deb", "-W", "--showformat=${Package} ${Version}", deb]
        versions[name] = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
        prose += debian(deb, name)
        print(f"{versions[name]:<50} {len(prose):>6,} documents so far", file=sys.stderr, flush=True)
    for name in PYTHON.split():
        try:
            code += python(name)
        except PackageNotFoundError:
            raise ValueError(f"{name} is not installed: its sources are part of the corpus") from None
        versions[name] = distribution(name).version
    kept_prose, no_prose = chosen(prose, int(megabytes * 1e6 * (1 - share)))
    kept_code, no_code = chosen(code, int(megabytes * 1e6 * share))
    recipe = {"megabytes": megabytes, "code": share, "left_out": {"prose": no_prose, "code": no_code}}
    manifest = write(Path(out), kept_prose + kept_code, recipe | {"versions": versions})
    print(json.dumps(manifest, indent=1))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(map(str, error.cmd))}: {(error.stderr or b'failed')[-300:]!r}; remove a damaged package")
    except (ValueError, LookupError, OSError) as error:
        sys.exit(str(error))
