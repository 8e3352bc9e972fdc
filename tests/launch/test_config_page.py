"""The page that documents every key."""

from launch.config_page import PAGE, render


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run `make docs`"


def test_it_holds_every_key_once() -> None:
    page = render()
    for heading in (
        "`model.*`",
        "`data.sources.LABEL.*`",
        "`warmup.*`, `continual.*`",
        "`retrieval.embedder.*`",
    ):
        assert f"\n## {heading}\n" in page
    assert "| `steps` | whole number | `100` | Optimizer updates. |" in page
    assert "| `precision` | `bf16`, `fp32` | `bf16` | Type of parameters and activations. |" in page
    assert "| `memory` |" not in page  # a section of its own
    assert page.count("| `peak_lr` |") == 1
    empty = [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert empty == []
