r"""Text to token ids and back, exactly: a sentencepiece model, trained here or brought along.

Invariants: `decode(encode(text)) == text` for every text; nothing is put before a text; "\n" is one token,
the end mark of an answer; every document begins with ``<s>``. A model that normalises its text, or that
spells unknown characters as `<unk>`, breaks the first invariant and is refused.

Not here: which texts are encoded, and where the ids go (`prepare`, `shards`).
"""

import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from data.files import fingerprint, hash_files

REFERENCE_PREFIX = "Reference:"
"""Follows <s> before every context and every reference (paper section 3.2)."""

_SPACE = "\u2581"  # sentencepiece's own sign for a space; as text it has to be spelt in bytes
_LINE_CHARACTERS = 2000  # longer training lines are cut: merges are counted in whole lines
_NUM_SENTENCES = 2_000_000  # sampled when there are more


def train(texts: Iterable[str], vocab_size: int, *, character_coverage: float = 1.0) -> bytes:
    """A sentencepiece BPE model as the bytes of its ``.model`` file; the same texts give the same bytes.

    Byte fallback, split digits, identity normalisation, no space added or removed. Special pieces: <unk> 0,
    <s> 1, <pad> 2, newline 3.

    Raises:
        ValueError: The texts hold nothing, or are too few (or too varied) for the vocabulary.
    """
    lines = _lines(texts)
    first = next(lines, None)
    if first is None:
        raise ValueError("the tokenizer cannot be trained: the documents of the train split hold no text")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            required_chars=_SPACE,  # also where no text has a blank, Chinese say: prompts have
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=1,
            pad_id=2,
            eos_id=-1,
            input_sentence_size=_NUM_SENTENCES,
            max_sentence_length=8 * _LINE_CHARACTERS,
            # Stored in the model: the machine must not decide its bytes.
            num_threads=4,
            minloglevel=2,
        )
    except RuntimeError as error:
        message = str(error)
        if found := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", message):
            raise ValueError(
                f"data.vocab_size={vocab_size} is larger than the text allows: at most {found[1]} pieces can "
                f"be made of it; set data.vocab_size={found[1]} or less, or give more text"
            ) from error
        if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
            raise ValueError(
                f"data.vocab_size={vocab_size} is too small for the characters of the text: it needs at "
                f"least {found[1]}; set that, or lower data.character_coverage"
            ) from error
        raise
    return model.getvalue()


class Tokenizer:
    """A sentencepiece model, read from its ``.model`` file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.load(str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} is no sentencepiece model: {error}; give a .model file") from error
        self.fingerprint: str = fingerprint(hash_files({"model": path}))
        self.vocab_size: int = self._model.vocab_size()
        # Some models put a space before every text. It is kept out by encoding after a newline, which no
        # piece of such a model spans, and by dropping what the newline became.
        self._lead = "\n" if self._model.encode("a", out_type=str)[0].startswith(_SPACE) else ""
        self._lead_tokens: list[int] = self._model.encode(self._lead)
        self._space_bytes = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self.bos_id: int = self._model.bos_id()
        if self.bos_id < 0:
            raise ValueError(
                f"{path}: the tokenizer has no <s>; train one that has (data.tokenizer_model=null)"
            )
        self.pad_id: int = next(
            i for i in (self._model.pad_id(), self._model.eos_id(), self.bos_id) if i >= 0
        )
        if not all(self._model.is_byte(piece) for piece in self._space_bytes):
            raise ValueError(
                f"{path}: the tokenizer has no byte fallback and would lose characters; "
                "train one (data.tokenizer_model=null)"
            )
        for sample in ("  a\u3000b \n\n\tc", "\ufb01 \u00c5 \u212b e\u0301", "\u2581 \U0001f600\x00"):
            if self.decode(self.encode(sample)) != sample:
                raise ValueError(
                    f"{path}: the tokenizer does not give {sample!r} back as it was (it normalises text); "
                    "train one that does (data.tokenizer_model=null)"
                )
        newline = self.encode("\n")
        if len(newline) != 1:
            raise ValueError(f"{path}: the newline is not one token; train one (data.tokenizer_model=null)")
        self.newline_id: int = newline[0]
        self.prefix_ids: list[int] = [self.bos_id, *self.encode(REFERENCE_PREFIX)]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without <s>."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text."""
        skip = len(self._lead_tokens)
        encoded = self._model.encode([self._lead + text for text in texts], num_threads=1)
        tokens: list[list[int]] = [ids[skip:] for ids in encoded]
        for i, text in enumerate(texts):
            if _SPACE in text:
                tokens[i] = self._encode_signs(text)
        return tokens

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens; special ones say nothing, and half a character becomes U+FFFD."""
        text: str = self._model.decode([*self._lead_tokens, *(int(i) for i in ids)])
        return text[len(self._lead) :]

    def piece(self, token: int) -> str:
        """How a token is written in the model, for display."""
        piece: str = self._model.id_to_piece(int(token))
        return piece

    def split(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, for display: together they are `decode(ids)`.

        Of a character spelt in bytes the first byte has it all. Bytes that spell no character are decoded apart.
        """
        text = self.decode(ids)
        ends = np.cumsum(self._characters[list(ids)]).tolist()
        if not len(ids) or ends[-1] != len(text):
            return [self.decode([token]) for token in ids]
        return [text[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    def characters(self) -> NDArray[np.int64]:
        """For each token, how many characters of text end in it, shape (vocab_size,): their sum is len(text).

        Of a character spelt in bytes the first byte counts it.
        """
        return self._characters

    def begins_word(self) -> NDArray[np.bool_]:
        """Which tokens begin with a space, and so begin a word, shape (vocab_size,)."""
        return np.array([self.piece(token).startswith(_SPACE) for token in range(self.vocab_size)])

    @cached_property
    def _characters(self) -> NDArray[np.int64]:
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for token in range(self.vocab_size):
            if self._model.is_byte(token):
                byte = int(self.piece(token)[3:5], 16)
                counts[token] = byte & 0xC0 != 0x80
            elif not self._model.is_control(token) and not self._model.is_unknown(token):
                counts[token] = len(self.piece(token))
        counts.flags.writeable = False
        return counts

    def _encode_signs(self, text: str) -> list[int]:
        first, *others = text.split(_SPACE)
        tokens = self.encode(first)
        for part in others:
            tokens += self._space_bytes + self.encode(part)
        return tokens


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for begin in range(0, len(line), _LINE_CHARACTERS):
                yield line[begin : begin + _LINE_CHARACTERS]
