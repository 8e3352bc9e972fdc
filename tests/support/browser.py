"""A page in headless Chromium: what it says on its console, where its elements stand, how it looks."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

_QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)
_DARK = "--blink-settings=preferredColorScheme=0"


class Elements(HTMLParser):
    """Every element and attribute of a page, and whether all that was opened is closed."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._page = page
        self._open: list[str] = []
        self.feed(page)
        assert not self._open

    @property
    def loaded(self) -> list[str]:
        """What the page would load or run if it were let: nothing, on a good page; its policy must say so, too."""
        policies = [
            given["content"] for tag, given in self.elements if tag == "meta" and "http-equiv" in given
        ]
        found = [] if policies == ["default-src 'none'; style-src 'unsafe-inline'"] else ["no policy"]
        for tag, attributes in self.elements:
            found += [f"{tag} {name}" for name in attributes if name.startswith("on") or name == "src"]
            if not (attributes.get("href") or "#").startswith("#"):
                found.append(f"{tag} href={attributes['href']}")
        styles = re.findall(r"<style>(.*?)</style>", self._page, re.DOTALL)
        return found + re.findall(r"url\(|@import|http\S*", "".join(styles))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def chromium() -> str:
    """The browser; without one the test is skipped."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on this machine; Debian's package has it: apt-get install chromium")
    return path


def screenshot(page: Path, picture: Path, *, width: int, height: int, dark: bool = False) -> list[str]:
    """Draw a page into a PNG, and return what the browser's console said meanwhile."""
    done = _run(
        page, f"--window-size={width},{height}", f"--screenshot={picture}", *([_DARK] if dark else [])
    )
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def boxes(page: Path, selectors: list[str], *, width: int) -> dict[str, list[tuple[float, ...]]]:
    """For each selector the boxes (left, top, right, bottom) of its elements, in pixels."""
    measure = (
        f"const boxes = {{}}; for (const selector of {json.dumps(selectors)}) boxes[selector] = "
        "[...document.querySelectorAll(selector)].map(element => element.getBoundingClientRect())"
        ".map(box => [box.left, box.top, box.right, box.bottom]);"
        "document.body.insertAdjacentHTML('beforeend', '<pre id=measured></pre>');"
        "document.getElementById('measured').textContent = JSON.stringify(boxes);"
    )
    text = page.read_text().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    copy = page.with_name(f"measured-{page.name}")
    copy.write_text(text.replace("</body>", f"<script>{measure}</script></body>"))
    done = _run(copy, f"--window-size={width},1000", "--dump-dom")
    found = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return {selector: [tuple(box) for box in some] for selector, some in measured.items()}


def _run(page: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    with TemporaryDirectory(prefix="chromium-") as profile:
        return subprocess.run(
            [chromium(), *_QUIET, f"--user-data-dir={profile}", *arguments, page.absolute().as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
