"""`docs/formats.md`: every file format, as the module that owns it draws it; nothing of it is written by hand.

    python -m launch.formats_page        writes the page (`make docs`); a test compares

Not here: the formats themselves (the docstrings of `_PARTS`).
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from data.files import write_atomic

PAGE = "docs/formats.md"

_PARTS = {
    "Every artefact": ("data.files",),
    "A prepared corpus, `<root>/prepared/NAME`": (
        "data.prepare",
        "data.corpus",
        "data.tokenizer",
        "data.shards",
        "data.references",
    ),
    "Search": (
        "memorybank.vectors",
        "memorybank.embedder",
        "memorybank.index_store",
        "memorybank.index_lists",
    ),
    "A run, `<root>/NAME`": ("train.checkpoint", "train.metrics", "train.tracing", "train.export"),
    "Memories": ("memorybank.store", "memorybank.record", "memorybank.quantizer", "memorybank.cold"),
    "A bank that users edit, `RUN/bank/library`": ("memorybank.library", "memorybank.segment"),
    "A sweep, `<root>/NAME`, and a grid": ("launch.sweep", "launch.study", "launch.trial", "launch.grid"),
}

_HEAD = """\
# File formats

Made from the modules that own the formats: `python -m launch.formats_page`. What is binary is little-endian; tables
are numpy structured arrays, whose columns stand in the module. A format that changes takes a new version, and an older
one is refused by name.

Artefacts name those that they were made from by fingerprint: corpus, tokenizer, shards, references, vectors, index,
neighbours, checkpoint, generation. Opening one whose inputs are not those at hand is refused, and both are named.
"""


def render(root: Path) -> str:
    """The page, from the sources below a repository's root."""
    return _HEAD + "".join(_sections(root))


def _sections(root: Path) -> Iterator[str]:
    for title, modules in _PARTS.items():
        yield f"\n## {title}\n"
        for module in modules:
            path = root / f"{module.replace('.', '/')}.py"
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert docstring is not None
            yield f"\n[`{module}`](../{path.relative_to(root).as_posix()})\n\n```text\n{docstring}\n```\n"


if __name__ == "__main__":
    write_atomic(Path(PAGE), render(Path()).encode())
