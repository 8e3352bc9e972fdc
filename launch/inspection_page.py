"""An `Inspection` as one self-contained HTML page.

Everything that comes from documents or from the model is escaped.
Not here: what is measured (`train.inspect`), the terminal (`launch.inspect`), what all pages share (`launch.page`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import exp

from launch.page import document, tile
from memorybank.config import QueryMode
from train.inspect import Chunk, Inspection, Prediction, Read, Source


@dataclass(frozen=True, slots=True)
class Setting:
    """The conditions of an inspection.

    Attributes:
        run: The run's name.
        stage: Its stage.
        step: The step of its weights.
        references: How many may be read.
        generation: The generation read; None: memories were compiled when first retrieved.
        age_steps: Its age.
        overlap_limit: Largest overlap with the text that a reference may have; None: nothing was refused.
        generated: Whether the model wrote the end of the row.
    """

    run: str
    stage: str
    step: int
    references: int
    generation: str | None
    age_steps: int | None
    overlap_limit: float | None
    generated: bool


def headline(inspection: Inspection) -> str:
    """What memory did, in one sentence."""
    tokens = len(inspection.predictions)
    return f"memory {_verdict(inspection)[1]}: {nats(inspection.gain)} over {tokens} tokens"


def conditions(inspection: Inspection, setting: Setting) -> list[str]:
    """Under which conditions, in whole lines."""
    memories = (
        "memories compiled with these weights when first retrieved"
        if setting.generation is None
        else f"memories of {setting.generation}, compiled {setting.age_steps} steps before these weights"
    )
    lines = [
        f"{setting.stage} step {setting.step:,}; {setting.references:,} references may be read; {memories}"
    ]
    if setting.generated:
        lines.append(
            "A prompt and its completion, read as generation reads: chunks of the prompt search with their own text "
            "and have seen the tokens they predict; each later chunk searches with the chunk before it."
        )
    elif inspection.chunks[0].query is QueryMode.own:
        lines.append(
            "Query own: each chunk searches with its own text, as a prompt does. Its search has seen the tokens it "
            "predicts, so the gains flatter memory."
        )
    else:
        lines.append(
            "Query previous: each chunk searches with the text of the chunk before it. No search has seen a token "
            "that its chunk predicts."
        )
    if setting.overlap_limit is not None:
        refused = sum(chunk.refused for chunk in inspection.chunks)
        lines.append(
            f"References that share more than {setting.overlap_limit:.0%} of their tokens with the text are refused: "
            f"{refused} {'was' if refused == 1 else 'were'}."
        )
    return lines


def reading(chunk: Chunk) -> str:
    """What a chunk searched with."""
    if not chunk.query_text:
        return "reads nothing: no chunk stands before it"
    if not chunk.reads:
        return "reads nothing: its search found no reference that it may read"
    own = "its own text, and has seen the tokens it predicts"
    return f"searched with {own if chunk.query is QueryMode.own else 'the text of the chunk before it'}"


def nats(value: float) -> str:
    """A difference of log-likelihood, with its sign; one that rounds to nothing has none."""
    number = f"{value:+.2f}".replace("-", "−")
    return f"{number[1:] if number[1:] == '0.00' else number} nats"


def kind(gain: float) -> str:
    """Whether a difference of log-likelihood, in nats, is a help, hurts, or is neither as it is printed."""
    return "even" if abs(gain) < 0.005 else "help" if gain > 0 else "hurt"


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def shade(gain: float) -> float:
    """How strongly a token is coloured, 0 to 1: full from one nat (2.7 times as likely) on."""
    return min(1.0, abs(gain)) ** 0.5 if abs(gain) >= 0.02 else 0.0


def render(inspection: Inspection, setting: Setting) -> str:
    """The whole page."""
    verdict, verb = _verdict(inspection)
    return document(
        title=f"{setting.run}: what memory did",
        kicker=f"memory3 bank inspect · {setting.run}",
        headline=(
            f'Memory <em class="{verdict}">{verb}</em>: {escape(nats(inspection.gain))} over '
            f"{len(inspection.predictions)} tokens"
        ),
        conditions=conditions(inspection, setting),
        body=_body(inspection, setting),
        footnote=_FOOTNOTE,
        style=_STYLE,
    )


def _body(inspection: Inspection, setting: Setting) -> Iterator[str]:
    yield from _tiles(inspection)
    yield from _whole_text(inspection, setting)
    seen: dict[int, int] = {}
    largest = max((abs(read.gain) for chunk in inspection.chunks for read in chunk.reads), default=1.0)
    for number, chunk in enumerate(inspection.chunks):
        yield from _chunk(number, chunk, inspection, seen, largest)


def _verdict(inspection: Inspection) -> tuple[str, str]:
    """The kind of the whole difference, and its verb; a hundredth of a nat per token is called little."""
    if abs(inspection.gain) < 0.01 * len(inspection.predictions):
        return "even", "changed little"
    return ("help", "helped") if inspection.gain > 0 else ("hurt", "hurt")


def _tiles(inspection: Inspection) -> Iterator[str]:
    predictions = inspection.predictions
    tokens = len(predictions)
    without, read = (
        sum(losses) / tokens for losses in zip(*((p.loss_without, p.loss) for p in predictions), strict=True)
    )
    filled = sum(len(chunk.reads) for chunk in inspection.chunks)
    slots = inspection.slots * len(inspection.chunks)
    yield '<section class="tiles">\n'
    yield tile(
        "loss per token",
        f"{without:.3f} → {read:.3f}",
        f"nats without memory → with it; perplexity {exp(without):.1f} → {exp(read):.1f}",
    )
    yield tile(
        "attention on memory",
        f"{mean(inspection.memory_L):.1%}",
        "by memory layer: " + " · ".join(f"{share:.1%}" for share in inspection.memory_L),
    )
    yield tile(
        "references read",
        str(len(inspection.sources)),
        f"in {filled} of {slots} slots of {len(inspection.chunks)} chunks; {slots - filled} slots empty",
    )
    if inspection.sources:
        layers, heads, kept = next(iter(inspection.sources.values())).index_LGS.shape
        union = mean(
            [sum(count > 0 for count in s.keeping) / len(s.tokens) for s in inspection.sources.values()]
        )
        yield tile(
            "kept of a reference",
            f"{kept} tokens",
            f"by each of {layers} layers × {heads} heads; together they touch {union:.0%} of its tokens",
        )
    yield "</section>\n"


def _whole_text(inspection: Inspection, setting: Setting) -> Iterator[str]:
    yield '<section class="card" id="text">\n<h2>The text, token by token</h2>\n<p class="legend">'
    yield '<span class="t help" style="--s:.9">likelier</span> and '
    yield '<span class="t hurt" style="--s:.9">less likely</span> with memory than without; '
    yield "full colour from one nat (2.7 times) on. Hover for the numbers."
    if setting.generated:
        yield ' <span class="t generated">Underlined</span>: written by the model.'
    if inspection.sources:
        heads = next(iter(inspection.sources.values())).num_heads
        swatches = "".join(
            f'<span class="k" style="--s:{(count / heads) ** 0.5:.2f}">{count}</span>'
            for count in sorted({1, heads // 4, heads // 2, heads} - {0})
        )
        yield f"<br>In the references below: kept by {swatches} of the {heads} heads of the memory layers."
    yield '</p>\n<div class="prose">'
    for number, chunk in enumerate(inspection.chunks):
        yield f'<a class="mark" href="#chunk-{number}">{number}</a>'
        yield from map(_prediction, chunk.predictions)
    yield "</div>\n</section>\n"


def _prediction(prediction: Prediction) -> str:
    classes = ["t"]
    strength = shade(prediction.gain)
    if strength:
        classes.append(kind(prediction.gain))
    if prediction.generated:
        classes.append("generated")
    hint = (
        f"{prediction.text!r}: {prediction.loss_without:.2f} nats without memory, {prediction.loss:.2f} with "
        f"({nats(prediction.gain)})"
    )
    return (
        f'<span class="{" ".join(classes)}" style="--s:{strength:.2f}" title="{escape(hint)}">'
        f"{escape(prediction.text)}</span>"
    )


def _chunk(
    number: int, chunk: Chunk, inspection: Inspection, seen: dict[int, int], largest: float
) -> Iterator[str]:
    yield f'<section class="card chunk" id="chunk-{number}">\n<h2><span class="mark">{number}</span> Chunk {number}'
    yield f' <em class="{kind(chunk.gain)}">{escape(nats(chunk.gain))}</em><small> by all memory, over '
    yield f"{len(chunk.predictions)} tokens</small></h2>\n"
    if not chunk.reads:
        yield f'<p class="note">{escape(reading(chunk))}</p>\n</section>\n'
        return
    yield '<div class="columns">\n<div>\n<div class="prose small">'
    yield from map(_prediction, chunk.predictions)
    yield f'</div>\n<p class="note">{escape(reading(chunk))}</p>\n</div>\n'
    yield from _attention(chunk)
    yield "</div>\n"
    for rank, read in enumerate(chunk.reads, start=1):
        source = inspection.sources[read.reference]
        is_example = not seen  # how much there is to open is seen at the first
        first = seen.setdefault(read.reference, number)
        yield from _reference(
            rank, read, source, largest, None if first == number else first, is_open=is_example
        )
    yield "</section>\n"


def _attention(chunk: Chunk) -> Iterator[str]:
    yield '<div class="attention">\n<p class="label">attention by memory layer</p>\n'
    for layer, (prefix, memory, context) in enumerate(
        zip(chunk.prefix_L, chunk.memory_L, chunk.context_L, strict=True)
    ):
        parts = "".join(
            f'<i class="{name}" style="width:{share:.2%}" title="{name} {share:.1%}"></i>'
            for name, share in (("memory", memory), ("prefix", prefix), ("context", context))
        )
        yield f'<div class="layer"><b>{layer}</b><span class="bar">{parts}</span><span>{memory:.1%}</span></div>\n'
    yield (
        '<p class="keys"><i class="memory"></i>memory <i class="prefix"></i>prefix '
        '<i class="context"></i>the text itself</p>\n</div>\n'
    )


def _reference(
    rank: int, read: Read, source: Source, largest: float, first: int | None, *, is_open: bool
) -> Iterator[str]:
    """One reference of a chunk; `first` is the earlier chunk that shows its text already."""
    citation = source.citation
    width = abs(read.gain) / largest * 50
    left = 50 if read.gain > 0 else 50 - width
    yield f'<article class="reference">\n<div class="line"><b class="rank">{rank}</b><div class="cite">'
    yield f"<strong>{escape(citation.title or citation.document)}</strong> "
    yield f"<small>{escape(citation.document)}, characters {citation.begin}–{citation.end}</small></div>"
    yield f'<div class="number"><small>score</small>{read.score:.2f}</div>'
    yield f'<div class="number"><small>attention</small>{mean(read.attention_L):.1%}</div>'
    yield f'<div class="number wide {kind(read.gain)}"><small>adds</small>{escape(nats(read.gain))}'
    yield f'<span class="gain"><i style="left:{left:.1f}%;width:{width:.1f}%"></i></span></div></div>\n'
    if first is None:
        yield _kept_text(source)
        yield f"<details{' open' * is_open}><summary>by layer and head</summary>"
        yield f"{_barcode(source)}{_by_head(source)}</details>\n"
    else:
        yield f'<details><summary>read before, in <a href="#chunk-{first}">chunk {first}</a></summary>'
        yield f"{_kept_text(source)}</details>\n"
    yield "</article>\n"


def _kept_text(source: Source) -> str:
    tokens = []
    for place, (token, count) in enumerate(zip(source.tokens, source.keeping, strict=True)):
        strength = (count / source.num_heads) ** 0.5
        classes = "k" if place >= source.title else "k title"
        hint = f' title="{escape(repr(token))}: kept by {count} of {source.num_heads} heads"' if count else ""
        tokens.append(f'<span class="{classes}" style="--s:{strength:.2f}"{hint}>{escape(token)}</span>')
    return f'<div class="prose kept">{"".join(tokens)}</div>\n'


def _barcode(source: Source) -> str:
    """Heads downwards, tokens to the right: which head kept which token."""
    layers, heads, _ = source.index_LGS.shape
    height = layers * (heads * 5 + 3)
    marks = [
        f'<rect x="{place * 6}" y="{layer * (heads * 5 + 3) + head * 5}" width="5" height="4">'
        f"<title>layer {layer}, head {head}: {escape(repr(source.tokens[place]))}</title></rect>"
        for layer in range(layers)
        for head in range(heads)
        for place in source.index_LGS[layer, head].tolist()
        if place >= 0
    ]
    return (
        f'<svg class="barcode" viewBox="0 0 {6 * len(source.tokens)} {height}" role="img" '
        f'aria-label="tokens kept by each head">{"".join(marks)}</svg>\n'
    )


def _by_head(source: Source) -> str:
    rows = [
        f"<tr><th>layer {layer}, head {head}</th><td>"
        + " ".join(
            f'<span class="chip">{escape(source.tokens[place].strip() or repr(source.tokens[place]))}</span>'
            for place in places.tolist()
            if place >= 0
        )
        + "</td></tr>"
        for layer, heads in enumerate(source.index_LGS)
        for head, places in enumerate(heads)
    ]
    return f'<table class="heads">{"".join(rows)}</table>\n'


_FOOTNOTE = (
    "A chunk of 64 tokens is held to account for the tokens that it predicts, the ones after each of its own. What a "
    "reference adds: the log-likelihood of the chunk's predictions, less the same with only this reference's slot "
    "emptied. What all memory adds: less the same when nothing is read anywhere. The parts need not add up to the "
    "whole, since references can say the same thing. Shares of attention are means over tokens and query heads."
)

_STYLE = """
:root{--keep:240 176 20;--memory:#e2a413;--prefix:#b9b2a4;--context:#dcd8ce}
@media (prefers-color-scheme:dark){:root{--keep:214 150 10;--memory:#d99b12;--prefix:#6d6a63;--context:#3b3e44}}
.number.help{color:var(--helptext)} .number.hurt{color:var(--hurttext)}
.prose{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.75}
.prose.small{font-size:.92rem}
.prose.kept{font-size:.88rem;line-height:1.65;margin:.35rem 0 .25rem 2rem}
.legend{margin:-.3rem 0 .6rem}
.legend .t,.legend .k{color:var(--ink);padding:.08em .35em;margin:0 .1em}
.t{border-radius:3px;padding:.08em 0}
.t.help{background:rgb(var(--help)/calc(var(--s)*.5))}
.t.hurt{background:rgb(var(--hurt)/calc(var(--s)*.45))}
.t.generated{text-decoration:underline dotted var(--soft);text-underline-offset:.25em}
.k{background:rgb(var(--keep)/calc(var(--s)*.85));border-radius:3px;padding:.08em 0}
.k.title{font-weight:600}
.mark{display:inline-block;min-width:1.3rem;padding:0 .3rem;margin:0 .15rem;border-radius:.7rem;background:var(--ink);
color:var(--card);font-size:.72rem;font-weight:650;text-align:center;text-decoration:none;line-height:1.3rem;
vertical-align:.1em}
.columns{display:grid;grid-template-columns:minmax(0,1fr) 17rem;gap:1.6rem;margin-bottom:.6rem}
.attention .layer{display:grid;grid-template-columns:1rem 1fr 3.2rem;gap:.45rem;align-items:center;font-size:.8rem;
margin:.22rem 0;font-variant-numeric:tabular-nums}
.attention .layer b{font-weight:400;color:var(--soft)}
.attention .layer span:last-child{text-align:right}
i.memory{background:var(--memory)} i.prefix{background:var(--prefix)} i.context{background:var(--context)}
.keys{font-size:.75rem;color:var(--soft);margin-top:.35rem}
.keys i{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin:0 .25rem 0 .5rem;vertical-align:-.05em}
.keys i:first-child{margin-left:0}
.reference{border-top:1px solid var(--line);padding:.75rem 0 .55rem}
.line{display:flex;gap:.9rem;align-items:flex-start}
.rank{width:1.1rem;color:var(--soft);font-weight:400;text-align:right}
.cite{flex:1;min-width:0;overflow-wrap:anywhere}
.cite small{display:block}
.number{width:4.6rem;text-align:right;font-variant-numeric:tabular-nums;font-size:.95rem}
.number.wide{width:7.2rem;font-weight:600}
.number small{display:block;line-height:1.2}
.gain{display:block;position:relative;height:5px;margin-top:.25rem;border-radius:3px;
background:linear-gradient(90deg,transparent calc(50% - 1px),var(--soft) calc(50% - 1px) calc(50% + 1px),
transparent calc(50% + 1px)),var(--line)}
.gain i{position:absolute;top:0;height:5px;border-radius:3px;background:currentColor}
details{margin-left:2rem;font-size:.85rem}
details .prose.kept{margin-left:0}
summary{color:var(--soft);cursor:pointer;font-size:.8rem}
summary a{color:inherit}
.barcode{width:100%;margin:.5rem 0;background:rgb(var(--keep)/.09);border-radius:4px}
.barcode rect{fill:rgb(var(--keep))}
.heads{border-collapse:collapse;width:100%}
.heads th{font-weight:400;color:var(--soft);text-align:left;white-space:nowrap;padding:.15rem .9rem .15rem 0;
vertical-align:top}
.chip{display:inline-block;background:rgb(var(--keep)/.22);border-radius:4px;padding:0 .35rem;margin:.05rem 0}
@media (max-width:46rem){.columns{grid-template-columns:1fr}.line{flex-wrap:wrap}.cite{flex-basis:80%}}
"""
