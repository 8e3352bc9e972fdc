"""Edits of a library: each makes the pieces it needs, then publishes the next state.

    documents --build / add / replace--> new segments, vectors, records --> state
    numbers of documents --remove-->                                        state
    newer weights --refresh--> records for every segment              --> state
    --compact--> segments without what was removed, copied            --> state; everything older is deleted

A quantiser is fitted by `build`, and by `refresh` for other weights. A search index is built by `build`, `add` and
`replace` when the vectors that are in none are too many, of these and of the smaller indexes (`index_plan.folded`); by
`refresh` when the embedder is another one; and by `compact` in place of one that holds a vector that was removed.

Invariants: an edit is one rename: until then readers see the library as it was, whatever becomes of the writer; an
interrupted edit that is repeated goes on after the last whole shard; the bytes do not depend on the number of ranks;
nothing but one shard is held in memory. A library has one writer at a time.

Retention: the newest state and `KEPT_STATES - 1` before it stay, and those that somebody reads; older ones are swept by
the next edit, with the pieces that no state names any more. `compact` keeps the newest alone.

Not here: reading (library.py), verification and repair (soundness.py), where documents come from (`data`).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.files import (
    MANIFEST,
    Manifest,
    delete_artefact,
    fingerprint,
    is_held,
    only_writer,
    open_manifest,
    publishing,
    write_atomic,
)
from memorybank import codecs, quantizer
from memorybank import segment as segments
from memorybank.codec import Codec
from memorybank.config import STAGES, BankContext, CodecConfig, IndexConfig, IndexKind
from memorybank.embedder import Embedder
from memorybank.index import Block, Blocks
from memorybank.index_plan import folded, plan_index
from memorybank.index_store import build_index, queries_of
from memorybank.library import (
    KIND,
    PIECE,
    REMOVED,
    STATE,
    VERSION,
    Library,
    LibrarySettings,
    Part,
    Shared,
    asked_index,
    index_blocks,
    lists_some,
    open_piece,
    piece_folder,
    settings_of,
    shared_of,
    state_folder,
    state_numbers,
    stated_index,
    to_name,
)
from memorybank.record import MemoryShape
from memorybank.segment import CutDocument, DocumentCutter, Segment, Segments, write_segment
from memorybank.store import GenerationSettings, differences
from memorybank.team import ALONE, Team
from memorybank.vectors import Vectors, compile_vectors, copy_vectors
from memorybank.writer import Encode, compile_generation, copy_generation

KEPT_STATES = 2
REFERENCES_PER_SEGMENT = 1 << 18
"""Bounds a segment's manifests (a checksum per MiB) and tables; 1e8 references make 382 segments."""
RECORDS_PER_SHARD = 2048
BATCH = 32
"""References encoded at once; the last batch is filled up, so that it also is the least that an edit encodes."""
QUERIES = 1000
"""Of these an index's recall is measured: second halves of references, as a chunk of their document would ask."""

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Told = Callable[[str, int, int, int], None]
"""What, how many in all, how many more are done, bytes of each: for a progress bar."""


@dataclass(frozen=True, slots=True)
class Known:
    """Search vectors that stand elsewhere already."""

    vectors: Vectors
    rows: Ids
    """Their rows, in the order of the references."""


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents on their way into a library."""

    origin: Mapping[str, str]
    """Fingerprints of what they are read from: an interrupted edit goes on only where these are the same."""
    read: Callable[[], Iterator[CutDocument]]
    """Reads and cuts them, always in the same order."""
    known: Known | None = None
    """The vectors of all their references, if the same embedder made them before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """Everything that turns references into vectors and records."""

    encode: Encode
    codec: CodecConfig | None
    """Of a library that is built or refreshed; None keeps the codec that it has, fitted to new weights if need be."""
    context: BankContext | None = None
    """What a reference sees of its document; None keeps what a library has, and is `reference` for a new one."""
    row_tokens: int
    """Tokens of a window in context `document`."""
    shape: MemoryShape
    dtype: torch.dtype
    """The type that the model computes in."""
    embedder: Embedder
    cutter: DocumentCutter
    layout: Mapping[str, Any]
    weights: str
    lineage: str
    step: int
    index: IndexConfig = field(default_factory=IndexConfig)
    batch: int = BATCH
    records_per_shard: int = RECORDS_PER_SHARD

    @property
    def window_tokens(self) -> int | None:
        """Tokens of a document that are encoded at once; None = each reference by itself."""
        return self.row_tokens if self.context is BankContext.document else None

    def like(self, settings: LibrarySettings) -> "Compiler":
        """Return this in the context that a library has, where no other is asked for."""
        return replace(self, context=self.context or BankContext(settings.context))

    def settings(self, codec: str) -> LibrarySettings:
        """What a library compiled with this, and a codec of that name, states."""
        return LibrarySettings(
            layout=self.layout,
            weights=self.weights,
            lineage=self.lineage,
            step=self.step,
            tokenizer=self.cutter.fingerprint,
            codec=codec,
            embedder=self.embedder.name,
            context=(self.context or BankContext.reference).value,
            window_tokens=self.window_tokens,
            index=stated_index(self.index),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Editor:
    """How a library is edited: where, with what, by whom; each edit is a method that returns the new state's number."""

    folder: Path
    compiler: Compiler | None = None
    team: Team = ALONE
    told: Told = lambda what, total, done, size: None
    references_per_segment: int = REFERENCES_PER_SEGMENT

    def build(self, documents: Documents) -> int:
        """Make a library of documents.

        Raises:
            ValueError: there is one already, or two documents have one id.
        """
        with self._writing():
            if state_numbers(self.folder):
                raise ValueError(
                    f"there is a bank in {self.folder} already: change it with `memory3 bank add`, `replace`, `remove` "
                    "or `refresh`, or name another folder with --bank"
                )
            return self._put(None, documents, replaces=False, action="build")

    def add(self, documents: Documents) -> int:
        """Put in documents whose ids are not there yet.

        Raises:
            ValueError: an id is there, or the library was compiled with something else.
        """
        return self._change(documents, replaces=False, action="add")

    def replace(self, documents: Documents) -> int:
        """Put in documents, and take out those of the same ids, in one state.

        Raises:
            ValueError: an id is not there, or the library was compiled with something else.
        """
        return self._change(documents, replaces=True, action="replace")

    def remove(self, documents: Ids) -> int:
        """Take out documents by their numbers (`Library.document_numbers`): no search finds them from now on."""
        with self._writing(), Library.open(self.folder) as base:
            left = base.without(np.union1d(base.removed, documents))
            return self._publish(
                base, base.settings, *left, base.next_reference, shared=base.shared, action="remove"
            )

    def refresh(self) -> int:
        """Compile all records with the compiler's weights; search vectors stay, unless the embedder is another one."""
        expect = {"tokenizer": self._compiler().cutter.fingerprint}
        with self._writing(), Library.open(self.folder, expect=expect) as base:
            return self._like(base.settings)._refreshed(base)

    def compact(self) -> int:
        """Rewrite what holds removed documents, join small segments, and delete everything older.

        Nothing is encoded or embedded: records and vectors are copied, and an index that holds a removed vector is
        built again from those that are left. After this, nothing of a removed document is left in the folder (but for
        what the centroids of a quantiser, which are means, owe to it: `refresh` for other weights fits them anew).

        Raises:
            ValueError: somebody still reads an older state, which therefore stays; the new one is published.
        """
        with self._writing(), Library.open(self.folder) as base:
            assert self.team.world_size == 1, "copying is one process's work"
            number, none = base.number, np.zeros(0, np.int64)
            groups = compaction(base, self.references_per_segment)
            listed = {name for index in base.indexes for name in index.inputs}
            lists_gone = not listed <= {part.vectors for part in base.parts}
            if len(base.removed) or len(groups) < len(base.parts) or lists_gone:
                parts = self._rewritten(base, groups)
                shared = replace(base.shared, indexes=self._indexed(base, parts, base.number + 1, whole=True))
                number = self._publish(
                    base, base.settings, parts, none, base.next_reference, shared=shared, action="compact"
                )
            base.close()
            held = sweep(self.folder, kept=1)
        if held:
            raise ValueError(
                f"bank {self.folder} is compact in state {number}, but {', '.join(path.name for path in held)} is "
                "being read, and still holds what was removed; when the reader is done, run `memory3 bank compact` "
                "again"
            )
        return number

    def make_again(self, state: Manifest, part: Part, name: str) -> None:
        """Make the vectors or records of a part from its text, where what a state names was lost.

        Raises:
            ValueError: the library was compiled with something else.
        """
        compiler, settings = self._compiler(), settings_of(state)
        refuse_changes(self.folder, settings, compiler)
        texts = Segment(open_piece(self.folder / part.text))
        if name == part.vectors:
            return self._embed(texts, self.folder / name, len(texts))
        ids = texts.numbers
        if PIECE.fullmatch(part.records)[2] != PIECE.fullmatch(part.text)[2]:  # type: ignore[index]  # refreshed since
            removed = state.mapped(REMOVED).read_all().view(np.int64)
            of = texts.document_numbers[texts.references["document"]]
            ids = ids[~np.isin(of, removed)]
        then = replace(
            compiler.like(settings), lineage=state.settings["lineage"], step=state.settings["step"]
        )
        return replace(self, compiler=then)._encode(
            texts,
            ids,
            self.folder / name,
            len(ids),
            codecs.named(settings.codec, compiler.shape, shared_of(state).codec_folders(self.folder)),
        )

    def index_again(self, state: Manifest, parts: Sequence[Part], name: str) -> str | None:
        """Build the index of a state from these parts of it, and return its name; None when so few need none."""
        compiler, settings = self._compiler(), settings_of(state)
        refuse_changes(self.folder, settings, compiler)
        return self._build_index(None, parts, self.folder / name, asked_index(settings.index))

    def rename(self, state: Manifest, fingerprints: Mapping[str, str], indexes: tuple[str, ...]) -> None:
        """Publish a state like `state` whose pieces have other fingerprints now, and delete those of the lost ones."""
        publish_state(
            self.folder,
            int(state.settings["number"]) + 1,
            settings_of(state),
            [Part(**part) for part in state.settings["parts"]],
            state.mapped(REMOVED).read_all().view(np.int64),
            int(state.settings["next_reference"]),
            shared=replace(shared_of(state), indexes=indexes),
            action="repair",
            known=fingerprints,
        )
        for number in state_numbers(self.folder)[:-1]:
            delete_artefact(state_folder(self.folder, number))
        sweep(self.folder)

    # -- steps

    def _change(self, documents: Documents, *, replaces: bool, action: str) -> int:
        compiler = self._compiler()
        with self._writing(), Library.open(self.folder) as base:
            refuse_changes(self.folder, base.settings, compiler)
            return self._like(base.settings)._put(base, documents, replaces=replaces, action=action)

    def _like(self, settings: LibrarySettings) -> "Editor":
        return replace(self, compiler=self._compiler().like(settings))

    def _refreshed(self, base: Library) -> int:
        compiler, kept = self._compiler(), self._kept_codec(base)
        if kept is not None and not _changes(base.settings, compiler, but=("lineage", "step")):
            return base.number
        number = base.number + 1
        codec, codec_piece = kept or self._new_codec(base, base.segments, number)
        embeds = compiler.embedder.name != base.settings.embedder
        same = ("lineage", "step", "index", "embedder")
        encodes = kept is None or bool(_changes(base.settings, compiler, but=same))
        parts = []
        for place, part in enumerate(base.parts):
            texts = base.segments[place]
            vectors = self.folder / part.vectors
            if embeds:
                vectors = piece_folder(self.folder, "vectors", number, place)
                self._embed(texts, vectors, sum(map(len, base.segments)))
            records = self.folder / part.records
            if encodes:
                records = piece_folder(self.folder, "records", number, place)
                self._encode(texts, base.live_ids(place), records, len(base), codec)
            parts.append(replace(part, vectors=vectors.name, records=records.name))
        settings = compiler.settings(codec.name)
        if not encodes:
            settings = replace(settings, lineage=base.settings.lineage, step=base.settings.step)
        shared = Shared(self._indexed(base, parts, number), codec_piece)
        return self._publish(
            base, settings, parts, base.removed, base.next_reference, shared=shared, action="refresh"
        )

    def _put(self, base: Library | None, documents: Documents, *, replaces: bool, action: str) -> int:
        compiler = self._compiler()
        number = 1 if base is None else base.number + 1
        first = 0 if base is None else base.next_reference
        if self.team.rank == 0:
            self._write_segments(number, documents, first)
        self.team.barrier()
        made = self._segments_of(number)
        removed = np.zeros(0, np.int64) if base is None else base.removed
        if self.team.rank == 0:
            removed = np.union1d(removed, clashes(made, base, replaces=replaces))
        if base is None:
            codec, codec_piece = self._new_codec(base, made, number)
        else:
            codec, codec_piece = self._codec_of(base)
        parts, total = [], sum(map(len, made))
        for place, texts in enumerate(made):
            vectors = piece_folder(self.folder, "vectors", number, place)
            records = piece_folder(self.folder, "records", number, place)
            self._embed(texts, vectors, total, _known(documents.known, texts, first))
            self._encode(texts, texts.numbers, records, total, codec)
            parts.append(_part(texts, vectors, records))
        after = int(made[-1].numbers[-1]) + 1
        if base is not None:
            kept, removed = base.without(removed)
            parts = [*kept, *parts]
        shared = Shared(self._indexed(base, parts, number), codec_piece)
        settings = compiler.settings(codec.name)
        return self._publish(base, settings, parts, removed, after, shared=shared, action=action)

    def _codec_of(self, base: Library) -> tuple[Codec, str | None]:
        """Return the codec that a library has, and its piece."""
        name, shape = base.settings.codec, self._compiler().shape
        return codecs.named(name, shape, base.codec_folders), base.shared.codec

    def _kept_codec(self, base: Library) -> tuple[Codec, str | None] | None:
        """Return the codec that a library keeps with the compiler's weights, and its piece; None: it needs another."""
        compiler, piece = self._compiler(), base.shared.codec
        config, weights = compiler.codec, base.settings.weights
        has: CodecConfig | None = None
        if piece is not None:
            has = quantizer.config_of(open_piece(self.folder / piece))
        if has is None and config is not None and config.kind not in STAGES:
            kept = codecs.of_kind(config.kind, compiler.shape, compiler.dtype).name == base.settings.codec
        else:
            same = (weights, base.settings.window_tokens) == (compiler.weights, compiler.window_tokens)
            kept = config in (None, has) and (has is None or same)
        return self._codec_of(base) if kept else None

    def _new_codec(
        self, base: Library | None, texts: Sequence[Segment], number: int
    ) -> tuple[Codec, str | None]:
        """Return the codec that the compiler asks for, and its piece; a quantiser is fitted to a sample of texts."""
        compiler = self._compiler()
        config = compiler.codec
        if config is None:
            assert base is not None
            assert base.shared.codec is not None
            config = quantizer.config_of(open_piece(self.folder / base.shared.codec))
        if config.kind not in STAGES:
            return codecs.of_kind(config.kind, compiler.shape, compiler.dtype), None
        folder, references = piece_folder(self.folder, "codec", number, 0), Segments(texts)
        chosen = config

        def sampled() -> tuple[Ids, Ids]:
            found = (references.ids(rows) for rows in codecs.draw(chosen, compiler.shape, len(references)))
            held_out, sample = (ids if base is None else ids[base.is_live(ids)] for ids in found)
            return held_out, sample

        self.told("fitting the codec", 1, 0, 0)
        codec = codecs.fitted(
            config,
            compiler.shape,
            compiler.dtype,
            folder,
            encode=compiler.encode,
            references=references,
            sampled=sampled,
            inputs={
                "weights": compiler.weights,
                "references": fingerprint([of.fingerprint for of in texts]),
            },
            team=self.team,
            batch=compiler.batch,
            window_tokens=compiler.window_tokens,
        )
        self.told("fitting the codec", 1, 1, 0)
        return codec, folder.name

    def _indexed(
        self, base: Library | None, parts: Sequence[Part], number: int, *, whole: bool = False
    ) -> tuple[str, ...]:
        """Return the indexes of a state with these parts: those that stand and will do, and one that is built.

        Args:
            base: the library before.
            parts: in order.
            number: of the state.
            whole: whether an index that lists vectors of parts that are gone will not do.
        """
        if self.team.rank != 0:
            return ()  # one process decides and builds; the others wait for it to publish the state
        inputs = {part.vectors: open_piece(self.folder / part.vectors).fingerprint for part in parts}
        if self.compiler is not None:
            config = self.compiler.index
        else:
            assert base is not None
            config = asked_index(base.settings.index)
        standing: list[Manifest] = []
        if base is not None and base.settings.index == stated_index(config):
            standing = [
                index
                for index in base.indexes
                if lists_some(index, inputs) and not (whole and index.inputs.keys() - inputs.keys())
            ]
        listed = {name for index in standing for name in index.inputs}
        chosen = [part for part in parts if part.vectors not in listed]
        unlisted = sum(part.references for part in chosen)
        if standing:
            places = folded([int(index.settings["num_vectors"]) for index in standing], unlisted)
            if places is None:
                return tuple(index.folder.name for index in standing)
            kept = [index for place, index in enumerate(standing) if place not in places]
            listed = {name for index in kept for name in index.inputs}
            chosen, standing = [part for part in parts if part.vectors not in listed], kept
        made = self._build_index(base, chosen, piece_folder(self.folder, "index", number, 0), config)
        return tuple(index.folder.name for index in standing) + (() if made is None else (made,))

    def _build_index(
        self, base: Library | None, parts: Sequence[Part], folder: Path, config: IndexConfig
    ) -> str | None:
        """Build an index over some parts, and return its name; None when so few vectors need none."""
        texts = [Segment(open_piece(self.folder / part.text)) for part in parts]
        vectors = [Vectors(open_piece(self.folder / part.vectors)) for part in parts]
        total = sum(map(len, vectors))
        if not total:
            return None
        plan = plan_index(total, vectors[0].size, config)
        if plan.kind is IndexKind.exact:
            return None
        blocks = index_blocks(texts, vectors)
        query_ids, queries = self._queries(base, texts, blocks)
        build_index(
            folder,
            blocks,
            plan,
            queries=queries,
            query_ids=query_ids,
            inputs={part.vectors: found.fingerprint for part, found in zip(parts, vectors, strict=True)},
            recall=config.recall,
            progress=lambda done: self.told("indexing", total, done, plan.code_bytes),
        )
        return folder.name

    def _queries(
        self, base: Library | None, texts: Sequence[Segment], blocks: Sequence[Block]
    ) -> tuple[Ids, Floats]:
        """Return references of these texts, and a query made of each; without an embedder, those that indexes keep.

        An index keeps no query that was made of another text: who deletes a text need not look into other indexes.
        """
        of = Segments(texts)
        ids = of.ids(_spread(len(of)))
        if self.compiler is not None:
            asked = [text[len(text) // 2 :] for text in map(of.content, ids.tolist())]
            return ids, self.compiler.embedder.embed(asked)
        known = [queries_of(index) for index in (() if base is None else base.indexes)]
        if known:
            then, queries = (np.concatenate(part) for part in zip(*known, strict=True))
            there = np.flatnonzero(of.locate(then)[0] >= 0)
            if len(there):
                chosen = there[_spread(len(there))]
                return then[chosen], queries[chosen]
        return ids, Blocks(blocks).of(ids)

    def _write_segments(self, number: int, documents: Documents, first: int) -> None:
        compiler = self._compiler()

        def numbered() -> Iterator[tuple[int, CutDocument]]:
            next_number = first
            for document in documents.read():
                self.told("cutting", 0, len(document.passages), 0)
                yield next_number, document
                next_number += len(document.passages)

        stream = numbered()
        for part in count():
            peeked = next(stream, None)
            folder = piece_folder(self.folder, "text", number, part)
            if peeked is None:
                # What an abandoned edit of the same number left behind must not be taken for a part of this one.
                for leftover in self.folder.glob(f"*-{number:06d}-*"):
                    match = PIECE.fullmatch(leftover.name.removesuffix(".partial"))
                    if match and int(match[3]) >= part:
                        delete_artefact(leftover)
                if part == 0:
                    raise ValueError("there are no documents to put in; give files that hold some")
                return
            write_segment(
                folder,
                chain([peeked], stream),
                tokenizer=compiler.cutter.fingerprint,
                settings={
                    **compiler.cutter.settings,
                    "origin": dict(documents.origin),
                    "part": part,
                    "first": first,
                },
                max_references=self.references_per_segment,
            )

    def _segments_of(self, number: int) -> list[Segment]:
        found: list[Segment] = []
        for part in count():
            folder = piece_folder(self.folder, "text", number, part)
            if not (folder / MANIFEST).is_file():
                return found
            found.append(Segment(open_manifest(folder, kind=segments.KIND, version=segments.VERSION)))
        raise AssertionError

    def _embed(self, texts: Segment, folder: Path, total: int, known: Known | None = None) -> None:
        embedder = self._compiler().embedder
        if known is not None and known.vectors.embedder != embedder.name:
            known = None
        what = "embedding" if known is None else "copying vectors"

        def progress(done: int) -> None:
            self.told(what, total, done, 4 * embedder.size)

        if known is not None:
            vectors = known.vectors
            copy_vectors(vectors, vectors.read, known.rows, texts, folder, team=self.team, progress=progress)
        else:
            compile_vectors(embedder, texts, folder, team=self.team, progress=progress)

    def _encode(self, texts: Segment, ids: Ids, folder: Path, total: int, codec: Codec) -> None:
        compiler = self._compiler()
        compile_generation(
            compiler.encode,
            Segments([texts]),
            ids,
            codec,
            folder,
            settings=_generation_settings(compiler.settings(codec.name), texts),
            team=self.team,
            records_per_shard=compiler.records_per_shard,
            batch=compiler.batch,
            progress=lambda done: self.told("compiling", total, done, codec.record_bytes),
        )

    def _rewritten(self, base: Library, groups: Sequence[Sequence[int]]) -> list[Part]:
        """Copy what is left of each group of parts into one; a group that loses nothing stays as it is."""
        parts = []
        for place, group in enumerate(groups):
            is_whole = len(group) == 1 and base.live_ids(group[0]).size == base.parts[group[0]].references
            parts.append(base.parts[group[0]] if is_whole else self._joined(base, group, place))
        return parts

    def _joined(self, base: Library, group: Sequence[int], place: int) -> Part:
        """Copy what is left of a group of parts into one, which stands at a place of the next state."""
        text, vectors, records = (
            piece_folder(self.folder, what, base.number + 1, place) for what in ("text", "vectors", "records")
        )
        old = base.segments[group[0]]
        cut = {key: old.manifest.settings[key] for key in ("reference_tokens", "pad_id", "vocab_size")}
        ids = np.concatenate([base.live_ids(at) for at in group])
        left = hashlib.sha256(ids.tobytes()).hexdigest()
        origin = fingerprint([[base.segments[at].fingerprint for at in group], left])
        write_segment(
            text,
            (base.segments[at].cut_document(row) for at in group for row in base.live_documents(at).tolist()),
            tokenizer=base.settings.tokenizer,
            settings={
                **cut,
                "origin": {"segments": origin},
                "part": place,
                "first": base.parts[group[0]].first,
            },
            max_references=len(ids),
        )
        made = Segment(open_manifest(text, kind=segments.KIND, version=segments.VERSION))
        copy_vectors(base.vectors(group[0]), base.read_vectors, made.numbers, made, vectors)
        copy_generation(
            base.generation(group[0]),
            base.read,
            made.numbers,
            records,
            settings=_generation_settings(base.settings, made),
            progress=lambda done: self.told("copying", len(base), done, base.record_bytes),
        )
        return _part(made, vectors, records)

    def _publish(
        self,
        base: Library | None,
        settings: LibrarySettings,
        parts: Sequence[Part],
        removed: Ids,
        next_reference: int,
        *,
        shared: Shared,
        action: str,
    ) -> int:
        number, known = (1, {}) if base is None else (base.number + 1, base.manifest.inputs)
        if self.team.rank == 0:
            if not parts:
                raise ValueError(
                    f"nothing would be left in bank {self.folder}: delete the folder instead, if that is meant"
                )
            publish_state(
                self.folder,
                number,
                settings,
                parts,
                removed,
                next_reference,
                shared=shared,
                action=action,
                known=known,
            )
            if base is not None:
                base.close()
            sweep(self.folder)
        self.team.barrier()
        return number

    def _writing(self) -> AbstractContextManager[None]:
        return only_writer(self.folder) if self.team.rank == 0 else nullcontext()

    def _compiler(self) -> Compiler:
        assert self.compiler is not None, "this edit compiles"
        return self.compiler


def compaction(library: Library, references_per_segment: int = REFERENCES_PER_SEGMENT) -> list[list[int]]:
    """Return the parts of a library in groups that become one segment each: neighbours, small enough together."""
    groups: list[list[int]] = []
    size = 0
    for place in range(len(library.parts)):
        live = library.live_ids(place).size
        if live == 0:
            continue
        if not groups or size + live > references_per_segment:
            groups.append([])
            size = 0
        groups[-1].append(place)
        size += live
    return groups


def clashes(made: Sequence[Segment], base: Library | None, *, replaces: bool) -> Ids:
    """Return the numbers of the documents that new ones replace.

    Raises:
        ValueError: two new documents have one id; or one is there already, and is not to be replaced, or the reverse.
    """
    _refuse_repeated_ids(made)
    if base is None:
        return np.zeros(0, np.int64)
    replaced: list[int] = []
    num_new = sum(new.num_documents for new in made)
    for new in made:
        for old in base.segments:
            for document_id, _, row in new.shared_ids(old):
                number = int(old.numbers[old.documents[row]["first"]])
                if base.were_removed(np.array([number]))[0]:
                    continue
                if not replaces:
                    raise ValueError(
                        f"document {document_id!r} is in the bank already; put a new text in its place with "
                        "`memory3 bank replace`"
                    )
                replaced.append(number)
    if replaces and len(replaced) < num_new:
        for new in made:
            for row in range(new.num_documents):
                document_id = new.document(row).id
                if base.document_numbers([document_id])[0] < 0:
                    raise ValueError(
                        f"document {document_id!r} is not in the bank, so there is nothing to replace; put it in with "
                        "`memory3 bank add`"
                    )
    return np.array(sorted(replaced), np.int64)


def _refuse_repeated_ids(made: Sequence[Segment]) -> None:
    for place, new in enumerate(made):
        twice = next(new.repeated_ids(), None)
        for other in made[:place]:
            twice = twice or next((id for id, _, _ in new.shared_ids(other)), None)
        if twice is not None:
            raise ValueError(f"two of the documents have the id {twice!r}; ids must be unique")


def publish_state(
    folder: Path,
    number: int,
    settings: LibrarySettings,
    parts: Sequence[Part],
    removed: Ids,
    next_reference: int,
    *,
    shared: Shared,
    action: str,
    known: Mapping[str, str],
) -> None:
    """Publish a state of a library; `known` are fingerprints of pieces that need not be opened for them."""
    stated = asdict(settings)
    inputs = {name: str(stated.pop(name)) for name in ("weights", "tokenizer")}
    for name in chain(*(part.pieces for part in parts), shared.pieces):
        inputs[name] = known[name] if name in known else open_piece(folder / name).fingerprint
    decided = {
        **stated,
        "number": number,
        "action": action,
        "record_bytes": int(open_piece(folder / parts[0].records).settings["record_bytes"]),
        "next_reference": next_reference,
        "parts": [asdict(part) for part in parts],
        "shared": asdict(shared),
    }
    with publishing(
        state_folder(folder, number), kind=KIND, version=VERSION, settings=decided, inputs=inputs
    ) as work:
        write_atomic(work / REMOVED, removed.astype("<i8").tobytes())


def sweep(folder: Path, *, kept: int = KEPT_STATES) -> list[Path]:
    """Delete the states before the newest `kept`, and pieces that none names; return the older states that are read.

    A state that cannot be read any more keeps every piece from being deleted.
    """
    numbers = state_numbers(folder)
    held = []
    for number in numbers[:-kept]:
        state = state_folder(folder, number)
        if is_held(state):
            held.append(state)
            continue
        # Who opens it between two of these lines holds it before it is gone, or finds it gone and opens a newer one.
        aside = state.with_suffix(".outdated")
        state.rename(aside)
        if is_held(aside):
            aside.rename(state)
            held.append(state)
        else:
            delete_artefact(aside)
    named: set[str] = set()
    kept_numbers = state_numbers(folder)
    for number in kept_numbers:
        try:
            manifest = open_manifest(state_folder(folder, number), kind=KIND, version=VERSION)
        except ValueError:
            return held
        named |= manifest.inputs.keys()
    named |= {state_folder(folder, number).name for number in kept_numbers}
    for path in folder.iterdir():
        name = path.name.removesuffix(".partial").removesuffix(".outdated")
        if path.name not in named and (PIECE.fullmatch(name) or STATE.fullmatch(name)):
            delete_artefact(path)
    return held


def _spread(num: int) -> Ids:
    """Return at most `QUERIES` of the numbers below `num`, evenly apart."""
    return np.unique(np.linspace(0, num - 1, QUERIES).astype(np.int64))


def _known(known: Known | None, texts: Segment, first: int) -> Known | None:
    """Return the known vectors of one segment, of documents whose first reference has the number `first`."""
    return None if known is None else Known(known.vectors, known.rows[texts.numbers - first])


def _changes(
    settings: LibrarySettings, compiler: Compiler, *, but: Sequence[str]
) -> list[tuple[str, Any, Any]]:
    """Return what was not made with the compiler: setting, its value, the compiler's value; nothing of the codec."""
    expected = asdict(compiler.like(settings).settings(settings.codec))
    return list(differences(asdict(settings), {key: expected[key] for key in expected if key not in but}))


def refuse_changes(folder: Path, settings: LibrarySettings, compiler: Compiler) -> None:
    """Refuse to mix records of different weights, or vectors of different embedders."""
    for key, found, wanted, remedy in to_name(_changes(settings, compiler, but=("lineage", "step", "index"))):
        raise ValueError(f"bank {folder}: {key} is {found}, but the run's newest is {wanted}; {remedy}")


def _part(segment: Segment, vectors: Path, records: Path) -> Part:
    return Part(
        text=segment.folder.name,
        vectors=vectors.name,
        records=records.name,
        first=int(segment.numbers[0]),
        documents=segment.num_documents,
        references=segment.num_references,
    )


def _generation_settings(settings: LibrarySettings, segment: Segment) -> GenerationSettings:
    return GenerationSettings(
        layout=settings.layout,
        weights=settings.weights,
        lineage=settings.lineage,
        step=settings.step,
        references=segment.fingerprint,
        tokenizer=settings.tokenizer,
        context=settings.context,
        window_tokens=settings.window_tokens,
    )
