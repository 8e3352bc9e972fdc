"""`launch.inspection_page`: everything is escaped, nothing is loaded, and a browser lays it out without complaint."""

from pathlib import Path

import numpy as np
import pytest

from data.references import Citation
from launch.inspection_page import Setting, conditions, headline, kind, nats, render, shade
from memorybank.config import QueryMode
from tests.support.browser import Elements, boxes, screenshot
from train.inspect import Chunk, Inspection, Prediction, Read, Source

HOSTILE = "</span><script>alert(1)</script><img src='http://example.org/x.png' onerror=\"alert(2)\">&amp;"


def source(title: str = "Burma, Geography") -> Source:
    tokens = (*f"{title}\n".partition(","), "Area", ":", " 676,578", " sq", " km", "\n", HOSTILE)
    index = np.array([[[3, 5, 6], [3, 5, 9]], [[1, 3, 5], [3, -1, -1]]])
    return Source(Citation("factbook/bm/geography", 0, 352, title, "factbook", ""), tokens, 3, index)


def inspection(*, gain: float = 0.4, generated: bool = False) -> Inspection:
    def predictions(without: float, *texts: str) -> tuple[Prediction, ...]:
        return tuple(Prediction(text, 2.0, without, generated) for text in texts)

    first = Chunk(
        QueryMode.previous, "", predictions(2.0, "Burma", " is", HOSTILE), (), (0.2, 0.1), (0.8, 0.9), 0
    )
    reads = (Read(7, 0.81, (0.2, 0.1), 0.6), Read(9, 0.7, (0.1, 0.05), -0.2))
    second = Chunk(
        QueryMode.previous,
        "Burma is",
        predictions(2.0 + gain, " 676,578", " sq"),
        reads,
        (0.1, 0.1),
        (0.6, 0.75),
        2,
    )
    third = Chunk(QueryMode.previous, "km", predictions(1.5, " km"), reads[:1], (0.2, 0.1), (0.6, 0.8), 0)
    return Inspection((first, second, third), {7: source(), 9: source(HOSTILE)}, 3)


SETTING = Setting("run", "continual", 800, 18_543, None, None, 2 / 3, False)


def test_the_page_holds_text_of_others_as_text_only() -> None:
    page = Elements(render(inspection(), SETTING))
    assert page.text.count(HOSTILE) >= 4  # in both views of the text, as a reference's token and as a title
    allowed = {"html", "head", "meta", "title", "style", "body", "header", "footer", "section", "article"}
    allowed |= {"h1", "h2", "p", "div", "span", "small", "em", "b", "i", "a", "strong", "br"}
    allowed |= {"details", "summary", "svg", "rect", "table", "tr", "th", "td"}
    assert {tag for tag, _ in page.elements} <= allowed


def test_the_page_loads_and_runs_nothing() -> None:
    assert Elements(render(inspection(), SETTING)).loaded == []


def test_a_reference_that_was_read_before_is_pointed_to() -> None:
    page = render(inspection(), SETTING)
    assert page.count('read before, in <a href="#chunk-1">chunk 1</a>') == 1
    assert page.count("by layer and head") == 2


def test_kept_tokens_are_shaded_by_the_heads_that_kept_them() -> None:
    page = render(inspection(), SETTING)
    assert (
        '<span class="k" style="--s:1.00" title="&#x27;Area&#x27;: kept by 4 of 4 heads">Area</span>' in page
    )
    assert '<span class="k" style="--s:0.50" title="&#x27; sq&#x27;: kept by 1 of 4 heads"> sq</span>' in page
    assert '<span class="k" style="--s:0.00"> km</span>' in page
    assert page.count("<title>layer 1, head 1: &#x27;Area&#x27;</title>") == 2  # one of each source's barcode


@pytest.mark.parametrize(("gain", "verb"), [(0.9, "helped"), (-0.9, "hurt"), (0.25, "changed little")])
def test_the_headline_says_whether_it_helped(gain: float, verb: str) -> None:
    looked = inspection(gain=gain)
    assert headline(looked) == f"memory {verb}: {nats(2 * gain - 0.5)} over 6 tokens"


def test_a_difference_that_rounds_to_nothing_is_neither_help_nor_hurt() -> None:
    assert [nats(value) for value in (-0.004, 0.004, 1.005, -2.5)] == [
        "0.00 nats", "0.00 nats", f"{1.005:+.2f} nats", "−2.50 nats",
    ]  # fmt: skip
    assert [kind(value) for value in (-0.004, 0.004, 0.006, -0.006)] == ["even", "even", "help", "hurt"]
    assert [shade(value) for value in (0.01, -0.25, 1.0, 3.0)] == [0, 0.5, 1, 1]


def test_the_conditions_name_query_filter_and_memories() -> None:
    said = " ".join(conditions(inspection(), SETTING))
    assert "compiled with these weights when first retrieved" in said
    assert "No search has seen a token that its chunk predicts." in said
    assert "more than 67% of their tokens with the text are refused: 2 were." in said
    other = Setting("run", "continual", 800, 9, "generation-x", 12, None, True)
    said = " ".join(conditions(inspection(), other))
    assert "memories of generation-x, compiled 12 steps before these weights" in said
    assert "have seen the tokens they predict" in said
    assert "refused" not in said


def test_a_browser_draws_it_light_and_dark_and_has_nothing_to_say(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(render(inspection(generated=True), SETTING))
    for dark in (False, True):
        picture = tmp_path / f"dark-{dark}.png"
        assert screenshot(path, picture, width=1200, height=900, dark=dark) == []
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "dark-True.png").read_bytes() != (tmp_path / "dark-False.png").read_bytes()


@pytest.mark.parametrize("width", [1200, 420])
def test_a_browser_lays_out_every_part_within_the_page(width: int, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(render(inspection(generated=True), SETTING))
    selectors = ["body", "h1", ".tile", "#text .t", ".chunk", ".reference", ".layer .bar", ".k", ".gain"]
    found = boxes(path, selectors, width=width)
    counts = {selector: len(some) for selector, some in found.items()}
    assert counts[".tile"] == 4
    assert counts[".chunk"] == 3
    assert counts[".reference"] == 3
    assert counts[".layer .bar"] == 4  # two layers of the two chunks that read something
    (body,) = found["body"]
    for selector in ("h1", ".tile", "#text .t", ".chunk", ".reference", ".layer .bar", ".gain"):
        for left, top, right, bottom in found[selector]:
            assert right > left, selector
            assert bottom > top, selector
            assert body[0] <= left, selector
            assert right <= body[2] + 0.5, selector
    for above, below in zip(found[".chunk"], found[".chunk"][1:], strict=False):
        assert above[3] <= below[1]
