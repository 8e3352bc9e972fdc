"""A corpus of random tokens in the project's own formats, so that a benchmark reads what training reads.

Every document has a title line and text for four full references; nothing has a text. Tokens are drawn from the whole
vocabulary, so that no row is easier than another.
Not here: corpora of text (`data.prepare`).
"""

from pathlib import Path

import numpy as np

from data import corpus, references, shards
from data.documents import Split, Use
from data.files import publishing, write_atomic, write_json_atomic
from data.references import References
from model.config import ModelConfig

TITLE_TOKENS = 8
REFERENCES_PER_DOCUMENT = 4


def write_corpus(folder: Path, model: ModelConfig, *, documents: int) -> References:
    """Write corpus, shards and references below a folder, and open them.

    Args:
        folder: Not there yet, or empty.
        model: Sizes of references, and the vocabulary.
        documents: How many, in one shard.
    """
    title = min(TITLE_TOKENS, model.reference_tokens // 2)
    room = model.reference_tokens - title
    length = 1 + title + REFERENCES_PER_DOCUMENT * room
    identity = {"settings": {"random": 0, "documents": documents}}
    with publishing(
        folder / "corpus", kind=corpus.KIND, version=corpus.VERSION, inputs={}, **identity
    ) as work:
        table = np.zeros(documents, corpus.TABLE)
        table["split"] = corpus.SPLITS.index(Split.train)
        table["use"] = corpus.USES.index(Use.both)
        table["requires"] = table["group"] = -1
        write_atomic(work / "table.bin", table.tobytes())
        write_atomic(work / "ids.bin", b"")
        write_json_atomic(work / "names.json", {"sources": ["random"], "groups": []})
    inputs = {"corpus": corpus.Corpus.open(folder / "corpus").fingerprint}
    extra = {"vocab_size": model.vocab_size}
    with publishing(
        folder / "shards", kind=shards.KIND, version=shards.VERSION, inputs=inputs, extra=extra, **identity
    ) as work:
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, (documents, length))
        write_atomic(work / "tokens-00000.bin", tokens.astype(shards.token_dtype(model.vocab_size)).tobytes())
        rows = np.zeros(documents, shards.TOKENS)
        rows["begin"] = length * np.arange(documents)
        rows["length"], rows["title"] = length, title
        write_atomic(work / "table.bin", rows.tobytes())
    inputs = {"shards": shards.TokenShards.open(folder / "shards").fingerprint}
    with publishing(
        folder / "references",
        kind=references.KIND,
        version=references.VERSION,
        inputs=inputs,
        settings={"reference_tokens": model.reference_tokens},
        extra={"pad_id": 0, "newline_id": 0},
    ) as work:
        pieces = np.zeros((documents, REFERENCES_PER_DOCUMENT), references.REFERENCES)
        pieces["document"] = np.arange(documents)[:, None]
        pieces["begin"] = 1 + title + room * np.arange(REFERENCES_PER_DOCUMENT)
        pieces["end"] = pieces["begin"] + room
        pieces["title"] = title
        write_atomic(work / "table.bin", pieces.tobytes())
    return References.open(folder / "references")
