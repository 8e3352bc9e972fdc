"""A picture of what `memory3` shows on a terminal, as rich draws it and Chromium renders it.

    python -m benchmarks.terminal_picture docs/doctor.png doctor
    python -m benchmarks.terminal_picture docs/live.png live runs/demo --step 84

A command is run as it is, with colours; the live view is that of a run's lines, as it stood after a step of its last
stage. Not here: pages, which Chromium renders by itself.
"""

import argparse
import io
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from rich.console import Console, RenderableType
from rich.text import Text

from launch.compose import load_config
from launch.worker import later_steps
from train.metrics import read_metrics
from train.terminal import LiveView

_COLUMNS, _PIXELS = 130, 1200
_MARGIN = 200
"""Chromium draws less than the height of a small window."""


def main(*argv: str) -> int:
    """Draw one picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path)
    parser.add_argument("command", help="of memory3, with its arguments; or `live RUN`")
    parser.add_argument("--step", type=int, help="of the last stage, for the live view")
    arguments, rest = parser.parse_known_args(argv)
    shown: RenderableType
    if arguments.command == "live":
        title, shown = "memory3 demo", live(Path(*rest), arguments.step)
    else:
        title, shown = f"memory3 {arguments.command}", printed([arguments.command, *rest])
    draw(shown, arguments.picture, title=title)
    return 0


def live(run: Path, step: int) -> RenderableType:
    """The live view of a run after a step of its last stage."""
    lines = read_metrics(run / "metrics.jsonl")
    last = lines[-1]["stage"]
    view = LiveView(Console(file=io.StringIO()), later_steps=later_steps(load_config(run / "config.yaml")))
    now = 0.0
    for line in lines:
        if line["stage"] != last or line["step"] <= step:
            view.log(line)
            now = line["time"]
    view.close()
    return view.render(now)


def printed(command: Sequence[str]) -> Text:
    """What a command of `memory3` prints on a terminal; of the environment's path the last name."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *command],
        env=os.environ | {"COLUMNS": str(_COLUMNS), "FORCE_COLOR": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Text.from_ansi(done.stdout.rstrip().replace(sys.prefix, Path(sys.prefix).name))


def draw(shown: RenderableType, picture: Path, *, title: str) -> None:
    """Render what a terminal shows into a PNG."""
    console = Console(record=True, file=io.StringIO(), width=_COLUMNS, force_terminal=True)
    console.print(shown)
    svg = console.export_svg(title=title)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size
    height = round(_PIXELS * float(size[2]) / float(size[1]))
    with TemporaryDirectory(prefix="picture-") as folder:
        page, shot = Path(folder, "page.html"), Path(folder, "shot.png")
        page.write_text(f"<style>body{{margin:0}}svg{{width:{_PIXELS}px;display:block}}</style>{svg}")
        subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             f"--user-data-dir={folder}/profile", f"--window-size={_PIXELS},{height + _MARGIN}",
             f"--screenshot={shot}", page.as_uri()],
            capture_output=True, check=True,
        )  # fmt: skip
        Image.open(shot).crop((0, 0, _PIXELS, height)).quantize(256).save(picture, optimize=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
