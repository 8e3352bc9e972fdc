"""Real English text out of Debian packages, whole documents with ids that say where they stand.

    apt-get download wordnet-base dict-gcide python3.11-doc ...      # no root, nothing is installed

A package is read where it lies, by `dpkg-deb`: WordNet's glosses, dictd databases, Sphinx sources, POD, HTML, Vim's
help. Translations are left out. Every document of the same packages comes in the same order.

Not here: cutting into references (memorybank/segment.py).
"""

import functools
import gzip
import html
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

SHORTEST = 200
"""Characters: shorter entries of dictionaries are joined with those that follow."""
_BASE64 = {c: n for n, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
_FOREIGN = re.compile(r"/translations/|/(?!en)[a-z]{2}([_-][A-Z]{2})?/|\.(?!en)[a-z]{2}(\.[a-z-]+)?\.html")
_PAGES = (".txt", ".txt.gz", ".pod", ".pod.gz", ".html", ".html.gz", ".htm", ".xhtml")
_HIDDEN = re.compile(r"<(script|style|head|title|nav)\b.*?</\1>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_BLOCK = re.compile(r"</?(p|div|li|tr|h\d|dt|dd|pre|br|table|section)\b[^>]*>", re.IGNORECASE)


def read(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield id, title and text of every document in the .deb files of a folder."""
    for package in sorted(folder.glob("*.deb")):
        name = package.name.split("_")[0]
        for member, title, text in _package(package):
            tidy = re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", text)).strip()
            if len(tidy) >= SHORTEST:
                yield f"{name}:{member}", title, tidy


def _package(package: Path) -> Iterator[tuple[str, str, str]]:
    contents = subprocess.run(["dpkg-deb", "--contents", package], check=True, capture_output=True).stdout
    has_sources = b"/_sources/" in contents
    index: dict[str, bytes] = {}
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as unpacked,
        tarfile.open(fileobj=unpacked.stdout, mode="r|") as archive,
    ):
        for member in archive:
            path = PurePosixPath(member.name)
            content = archive.extractfile(member) if member.isfile() else None
            if content is None or _FOREIGN.search(member.name):
                continue
            if path.suffix == ".index":
                index[path.stem] = content.read()
            elif path.suffix == ".dz":  # its index comes before it, or after
                index[f"{path.name.removesuffix('.dict.dz')}.dict"] = gzip.decompress(content.read())
            elif path.parent.name == "wordnet" and path.name.startswith("data."):
                yield from _joined(path.name, _glosses(content.read().decode("latin-1")))
            elif path.name.endswith(_PAGES):
                yield from _page(path, content.read(), has_sources=has_sources)
    for name in [name for name in index if f"{name}.dict" in index]:
        yield from _joined(name, _entries(index[name].decode(), index[f"{name}.dict"]))


def _page(path: PurePosixPath, content: bytes, *, has_sources: bool) -> Iterator[tuple[str, str, str]]:
    if path.suffix == ".gz":
        path, content = path.with_suffix(""), gzip.decompress(content)
    text = content.decode("utf-8", "replace")
    title = path.name.split(".")[0].replace("_", " ")
    if "_sources" in path.parts or path.suffix == ".pod" or ("/vim" in str(path) and path.suffix == ".txt"):
        yield str(path), title, text
    elif path.suffix in (".html", ".htm", ".xhtml") and not has_sources:
        found = re.search(r"<title>(.*?)</title>", text, re.DOTALL | re.IGNORECASE)
        named = html.unescape(" ".join(found[1].split())) if found else title
        plain = _BLOCK.sub("\n", _HIDDEN.sub(" ", text))
        yield str(path), named[:100], html.unescape(re.sub(r"<[^>]*>", "", plain))


def _joined(name: str, entries: Iterator[str]) -> Iterator[tuple[str, str, str]]:
    """Join entries to documents of some length; the first entry's words are the title."""
    parts: list[str] = []
    number = 0
    for entry in entries:
        parts.append(entry)
        if sum(map(len, parts)) >= SHORTEST:
            yield f"{name}#{number}", re.split(r"[:,\n]", parts[0])[0][:60], "\n".join(parts)
            parts, number = [], number + 1


def _glosses(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if not line.startswith("  "):
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            words = [fields[4 + 2 * place].replace("_", " ") for place in range(int(fields[3], 16))]
            yield f"{', '.join(words)}: {gloss.strip()}"


def _entries(index: str, content: bytes) -> Iterator[str]:
    """Yield the entries of a dictd database; many headwords share one."""
    spans = {
        (_number(begin), _number(length))
        for headword, begin, length in (line.split("\t")[:3] for line in index.splitlines())
        if not headword.startswith(("00database", "00-database"))
    }
    for begin, length in sorted(spans):
        yield re.sub(r"[{}]", "", content[begin : begin + length].decode("utf-8", "replace"))


def _number(digits: str) -> int:
    return functools.reduce(lambda number, digit: 64 * number + _BASE64[digit], digits, 0)
