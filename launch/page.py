"""What all pages of this project share: one self-contained HTML file, in the light, in the dark, on a phone.

No script, no font, no picture from elsewhere: the page forbids the browser to load or to run anything at all.
Not here: what stands on a page (`launch.inspection_page`, `launch.report_page`), charts (`launch.chart`).
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path


def document(
    *,
    title: str,
    kicker: str,
    headline: str,
    conditions: Sequence[str],
    body: Iterable[str],
    footnote: str,
    style: str,
) -> str:
    """The whole page.

    Args:
        title: Of the browser's window.
        kicker: The line above the headline.
        headline: One sentence, HTML.
        conditions: Under which conditions it holds, in whole lines.
        body: What follows, HTML.
        footnote: How to read it.
        style: What this page adds to `STYLE`.
    """
    return "".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
            f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
            f'<header>\n<p class="kicker">{escape(kicker)}</p>\n<h1>{headline}</h1>\n',
            *(f'<p class="condition">{escape(line)}</p>\n' for line in conditions),
            "</header>\n",
            *body,
            f"<footer>{escape(footnote)}</footer>\n</body>\n</html>\n",
        )
    )


def refuse_without_folder(html: str) -> None:
    """Refuse to write a page where there is no folder, before it is made."""
    if not Path(html).absolute().parent.is_dir():
        raise ValueError(f"--html {html}: its folder does not exist; make it first")
    if Path(html).is_dir():
        raise ValueError(f"--html {html} is a folder; name the page's file in it, {html}/page.html")


def tile(label: str, value: str, note: str) -> str:
    """One number, with what it is and what it means; `section.tiles` holds several."""
    return (
        f'<div class="tile"><p class="label">{escape(label)}</p><p class="value">{escape(value)}</p>'
        f'<p class="note">{escape(note)}</p></div>\n'
    )


STYLE = """
:root{color-scheme:light dark;--bg:#f6f5f1;--card:#fff;--ink:#1d1c1a;--soft:#66625a;--line:#e3dfd6;
--help:16 150 132;--hurt:205 62 118;--helptext:#0a7c6c;--hurttext:#b3295f}
@media (prefers-color-scheme:dark){:root{--bg:#141517;--card:#1d1f22;--ink:#e9e6df;--soft:#9d988c;--line:#33363b;
--help:24 160 142;--hurt:208 62 120;--helptext:#4fd0bb;--hurttext:#ff8db5}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2.2rem 1.4rem 4rem;max-width:68rem;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI","Liberation Sans",sans-serif}
p{margin:0}
small{font-size:.8rem;color:var(--soft);font-weight:400}
em{font-style:normal}
em.help{color:var(--helptext)} em.hurt{color:var(--hurttext)}
.even{color:var(--soft)}
.kicker{color:var(--soft);font-size:.85rem;letter-spacing:.02em}
h1{font-size:1.75rem;line-height:1.25;margin:.2rem 0 .7rem;font-weight:650;letter-spacing:-.01em}
h2{font-size:1.08rem;margin:0 0 .6rem;font-weight:650}
.condition{color:var(--soft);font-size:.9rem;max-width:58rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr));gap:.8rem;margin:1.4rem 0}
.tile,.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1rem 1.15rem}
.label{font-size:.8rem;color:var(--soft)}
.value{font-size:1.45rem;font-weight:650;letter-spacing:-.01em}
.note,.legend{font-size:.82rem;color:var(--soft)}
.card{margin:0 0 1rem}
.bar{display:flex;height:.85rem;border-radius:4px;overflow:hidden;background:var(--line)}
footer{color:var(--soft);font-size:.82rem;max-width:58rem;margin-top:1.4rem}
"""
