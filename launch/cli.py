"""The console script `memory3`: which command, and nothing else. Imports no torch, so that `--help` is immediate.

Not here: what the commands do (one module each).
"""

import argparse
import difflib
import errno
import importlib
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from launch.devices import DEVICES
from memorybank.config import BankContext, CodecKind
from memorybank.cost import EMBEDDERS, Hardware

_OVERRIDES = """\
settings are given in Hydra's grammar:
  experiment=demo model=micro    choose files of conf/ (docs/config.md lists them)
  warmup.steps=200 seed=1        set single keys
  continual.memory=null          switch a part off
`memory3 pretrain --cfg [settings]` prints every key with its value."""

_PRETRAIN = f"""\
{_OVERRIDES}

-m trains with every combination of listed settings, one after the other, or as a job each with launcher=slurm:
  -m model=nano,micro seed=0,1                  four runs: RUN-model-nano-seed-0, RUN-model-nano-seed-1, ...
  -m experiment=demo warmup.peak_lr=choice(1e-3,2e-3) 'continual.steps=range(100,301,100)'
One that failed is reported, and the others go on; given again, the command trains none again that has finished.
-m --cfg prints the command of each."""

_SWEEP = """\
settings are given in Hydra's grammar, and some of them vary:
  warmup.peak_lr=tag(log,interval(1e-4,1e-2))   numbers in between, drawn evenly over their logarithms
  model.num_layers=interval(2,8)                whole numbers where the key takes them
  model.width=choice(128,256) model=nano,micro  one of these
  retrieval.window=range(1,6)                   1 to 5
  sweep=memory                                  a sweep of conf/sweep/: learning_rate, memory

Trials are drawn by Optuna's TPE and run one after the other; with launcher=slurm they are jobs,
launcher.slurm.array_tasks of them at the same time. The loss of --objective text is that of the last
validation inside training: held-out text, with memory where memory is read; bad trials are pruned. That of
--objective facts is of the answers to the validation half's probes: each trial is evaluated when it is trained.
Neither reads the test half. A sweep that was stopped, or killed, goes on when the same command is given again, and
repeats nothing; a greater --trials adds some."""

_GENERATE = """\
one prompt is completed before your eyes; several are decoded together, and a prompt takes the place of one that ended:
  memory3 generate mine --prompt "The harbour of"
  memory3 generate mine --prompts questions.txt --max-new-tokens 32
  cat questions.txt | memory3 generate mine --prompts - --json > answers.jsonl
a line of --json: {"number", "memory", "prompt", "text", "references": one list of what was read for each retrieval}"""


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the console script: its module has `run(arguments) -> int`."""

    name: str
    summary: str
    details: str


COMMANDS = (
    Command("prepare", "corpus -> tokenizer -> token shards -> references -> search vectors", _OVERRIDES),
    Command("pretrain", "train: the warmup stage, then the continual stage with its memory bank", _PRETRAIN),
    Command(
        "bank",
        "build, search, edit, verify, look into and copy the memory bank of a run",
        "a bank is of one set of weights: while a run trains, keep it on an export (`memory3 checkpoint export`)",
    ),
    Command("checkpoint", "list, verify, prune and export the checkpoints of a run", ""),
    Command(
        "evaluate",
        "measure losses on held-out text and fact probes, with memory, without, and with shuffled memory",
        "",
    ),
    Command("generate", "complete prompts with a run's model, without and with memory", _GENERATE),
    Command(
        "cost", "what memory costs a model: operations, bytes and times, before a bank is written", _OVERRIDES
    ),
    Command("sweep", "train with drawn settings, trial by trial, and say which are best", _SWEEP),
    Command(
        "plan",
        "say what a run will take: parameters, memory, FLOPs, time, disk, money; and what would fit",
        _OVERRIDES,
    ),
    Command(
        "bench", "how fast this machine trains, reads and writes memory, beside what would do without it", ""
    ),
    Command(
        "doctor", "say whether this machine can train: versions, devices, disk, locks; a remedy a line", ""
    ),
    Command(
        "report",
        "make a page of one or several runs: curves, memory, bank, time, faults, and a table of their evaluations",
        "made from the files of the runs alone, of half-finished ones too; several seeds of one recipe share a table",
    ),
    Command(
        "demo", "the whole story on the World Factbook, in a quarter of an hour on two cores", _OVERRIDES
    ),
)


class _Parser(argparse.ArgumentParser):
    """With the nearest of what there is to choose from, in place of what there is not."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        near = wrong and difflib.get_close_matches(wrong[1], re.findall(r"[^', ]+", wrong[2]), n=1)
        super().error(f"{message}; did you mean {near[0]}?" if near else message)


class _Version(argparse.Action):
    """Versions of this package and of what it stands on, none of which is imported."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        for name in ("memory3-pretrain", "torch", "deepspeed"):
            try:
                print(name, version(name))
            except PackageNotFoundError:
                print(name, "is not installed")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The command line, as `--help` shows it."""
    top = _Parser(
        prog="memory3",
        description="Pretrain language models with explicit memory (Memory3, arXiv 2407.01178).",
    )
    top.add_argument("--version", action=_Version, nargs=0, help="show what is installed, and exit")
    # What deepspeed's launcher puts before the command; the environment says it as well.
    top.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    _add_commands(top, "command", COMMANDS, _add_arguments)
    return top


BANK_ACTIONS = (
    Command("build", "make the bank: every reference that the run's newest checkpoint may read", ""),
    Command(
        "add",
        "put in documents that are not there yet",
        'files hold one JSON object a line: {"id": "...", "title": "...", "text": "..."}',
    ),
    Command(
        "replace",
        "put in documents in place of those of the same ids, in one step",
        'files hold one JSON object a line: {"id": "...", "title": "...", "text": "..."}',
    ),
    Command(
        "remove",
        "take documents out: no search finds them any more",
        "the texts, vectors and records are deleted by `compact`; the prepared corpus and the weights stay as they are",
    ),
    Command("refresh", "compile all memories anew with the run's newest weights; search vectors stay", ""),
    Command("compact", "rewrite the bank without what was removed, and delete every older state", ""),
    Command(
        "verify",
        "check every byte against its hash, and a sample against the model; exit code 1 when something is wrong",
        "",
    ),
    Command("stat", "describe the bank, and the generations that training compiled", ""),
    Command("search", "show what a text retrieves", ""),
    Command(
        "fetch",
        "bring a bank into another folder, copying only what is missing there",
        "how a bank reaches a host without a shared disk; what was brought before is not brought again",
    ),
    Command(
        "audit", "say how much of what rows read repeats the rows themselves, and what gain comes from it", ""
    ),
    Command("inspect", "show what a text read, what was kept of it, and whether it helped", ""),
)


CHECKPOINT_ACTIONS = (
    Command("list", "show what a run has published, and why it stays", ""),
    Command("verify", "check every byte against its hash; exit code 1 when something is damaged", ""),
    Command(
        "prune",
        "delete the checkpoints and generations that no rule keeps, and what interrupted saves left",
        "ends of stages, branch points, damaged checkpoints and those that are being read always stay; nothing "
        "is deleted unless one of those that stay is whole",
    ),
    Command(
        "export",
        "write weights, sizes and tokenizer into a folder that others can load",
        "`memory3 generate` and `evaluate` open it like a run, `train.export.load_exported` as a torch module",
    ),
)


def _add_checkpoint_arguments(sub: argparse.ArgumentParser, name: str) -> None:
    _add_run(sub)
    if name == "export":
        sub.add_argument("target", metavar="FOLDER", help="folder to be made")
        sub.add_argument("--checkpoint", metavar="NAME", help="which one (default: the newest that is whole)")
    if name == "verify":
        sub.add_argument("checkpoint", nargs="?", metavar="NAME", help="which one (default: all)")
    if name in ("list", "prune"):
        for key, what in (
            ("last", "keep the newest N of each stage"),
            ("every", "keep those of every N steps"),
            ("best", "keep the N with the lowest validation losses of each stage"),
        ):
            sub.add_argument(
                f"--keep-{key}", type=int, metavar="N", help=f"{what} (default: saving.keep_{key} of the run)"
            )
    if name == "list":
        sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    if name == "prune":
        sub.add_argument("--dry-run", action="store_true", help="say what would go, and delete nothing")


def _add_commands(
    parser: argparse.ArgumentParser,
    kind: str,
    listed: Sequence[Command],
    add_arguments: Callable[[argparse.ArgumentParser, str], None],
) -> None:
    """Add commands to a parser, or actions (its `kind`) to that of a command."""
    commands = parser.add_subparsers(dest=kind, metavar=kind.upper(), required=True)
    for command in listed:
        sub = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog=command.details,
            # One paragraph is wrapped, several lines stand as they are.
            formatter_class=argparse.RawDescriptionHelpFormatter
            if "\n" in command.details
            else argparse.HelpFormatter,
        )
        sub.set_defaults(parser=sub)
        add_arguments(sub, command.name)


def _add_bank_arguments(sub: argparse.ArgumentParser, name: str) -> None:
    if name == "fetch":
        sub.add_argument("source", help="folder of the bank to copy")
        sub.add_argument("target", help="folder that it is brought into")
        return
    _add_run(sub)
    if name == "audit":
        _add_audit_arguments(sub)
        return
    if name == "inspect":
        _add_inspect_arguments(sub)
        return
    sub.add_argument("--bank", metavar="FOLDER", help="the bank's folder (default: RUN/bank/library)")
    if name in ("build", "refresh"):
        own = "that of the run" if name == "build" else "that of the bank"
        sub.add_argument(
            "--codec",
            choices=[kind.name for kind in CodecKind],
            help=f"how keys and values are kept (default: {own})",
        )
        sub.add_argument(
            "--context",
            choices=[context.name for context in BankContext],
            help=f"what a reference sees when it is encoded: itself, or its document before it (default: {own})",
        )
    if name in ("add", "replace"):
        sub.add_argument("files", nargs="+", metavar="FILE", help="JSON lines, perhaps gzipped")
        new = name == "add"
        sub.add_argument(
            "--source",
            default="added" if new else None,
            help=f"label under which they are kept (default: {'%(default)s' if new else 'that of the old text'})",
        )
        sub.add_argument(
            "--licence",
            default="" if new else None,
            help="licence of the texts, shown with every reference"
            + ("" if new else " (default: that of the old text)"),
        )
        for field in ("id", "title", "text"):
            sub.add_argument(
                f"--{field}-field", default=field, help=f"field that holds the {field} (default: %(default)s)"
            )
    if name in ("build", "add", "replace", "refresh"):
        sub.add_argument(
            "--ranks",
            type=int,
            default=1,
            metavar="N",
            help="processes of this machine that share the work, each with engine.threads_per_rank threads (default: "
            "%(default)s, with all threads)",
        )
    if name in ("build", "add", "replace", "refresh", "compact"):
        sub.add_argument(
            "--dry-run", action="store_true", help="say bytes, time, index and codec, and write nothing"
        )
    if name == "remove":
        sub.add_argument("documents", nargs="*", metavar="DOC", help="ids of documents")
        sub.add_argument("--source", help="all documents of this source")
    if name == "verify":
        sub.add_argument("--fix", action="store_true", help="make anew what is damaged, and nothing else")
        sub.add_argument(
            "--sample",
            type=int,
            default=64,
            help="references compiled anew and compared; 0 needs no checkpoint (default: %(default)s)",
        )
        sub.add_argument(
            "--absent", metavar="DOC", help="instead, search all files for a document that should be gone"
        )
        sub.add_argument("--text", help="some words of that document, searched for as well")
    if name == "search":
        sub.add_argument("text", help="what is searched for")
        sub.add_argument("-k", type=int, help="references shown (default: as many as a chunk reads)")


BENCH_SUBJECTS = (
    Command("attention", "attention that reads memory, beside the library's kernel without it", _OVERRIDES),
    Command(
        "step",
        "steps of both stages, beside each other, beside the matrix products, and beside a bare loop",
        _OVERRIDES,
    ),
    Command("compile", "writing memories, beside the forward pass of the same layers", _OVERRIDES),
    Command("generate", "completing prompts with memory, beside completing them without", _OVERRIDES),
    Command("loader", "reading rows and records, beside a step", _OVERRIDES),
)


def _add_bench_arguments(sub: argparse.ArgumentParser, name: str) -> None:
    sub.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="how often each side runs (default: %(default)s)"
    )
    sub.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="CPU threads of this process (default: %(default)s)",
    )
    sub.add_argument(
        "--output",
        metavar="FOLDER",
        default="benchmarks/results",
        help=f"where bench_{name}.json, .md and .png are written (default: %(default)s)",
    )
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings (see below)")


def _add_run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", help="run folder, or its name below --root")
    _add_root(sub, "folder of runs and prepared corpora")


def _add_root(sub: argparse.ArgumentParser, doc: str) -> None:
    sub.add_argument(
        "--root",
        type=os.path.expanduser,  # shells leave the ~ of --root=~/runs
        default="runs",
        metavar="FOLDER",
        help=f"{doc} (default: %(default)s)",
    )


def _add_bank_read(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--bank",
        metavar="FOLDER",
        nargs="?",
        const="",
        help="read a bank that `memory3 bank` keeps, the run's own if no folder is named (default: compile what "
        "is read)",
    )
    sub.add_argument(
        "--stale",
        choices=["refuse", "allow"],
        default="refuse",
        help="whether a bank of other weights may be read; the output then says so (default: %(default)s)",
    )


def _add_arguments(sub: argparse.ArgumentParser, name: str) -> None:
    actions = {
        "bank": (BANK_ACTIONS, _add_bank_arguments),
        "bench": (BENCH_SUBJECTS, _add_bench_arguments),
        "checkpoint": (CHECKPOINT_ACTIONS, _add_checkpoint_arguments),
    }
    if name in actions:
        _add_commands(sub, "action", *actions[name])
    if name in ("evaluate", "generate"):
        _add_run(sub)
        _add_bank_read(sub)
    if name in ("evaluate", "report"):
        sub.add_argument(
            "--split",
            choices=["validation", "test"],
            default="validation",
            help="held-out part (default: %(default)s)",
        )
    if name == "generate":
        sub.add_argument("--prompt", action="append", default=[], help="text to complete; may be repeated")
        sub.add_argument(
            "--prompts",
            metavar="FILE",
            help='a prompt a line; of FILE.jsonl {"prompt": "..."} a line; - is the standard input',
        )
        sub.add_argument(
            "--batch",
            type=int,
            default=32,
            metavar="N",
            help="prompts that are decoded together (default: %(default)s)",
        )
        sub.add_argument(
            "--json", action="store_true", help="print a JSON object for each completion that ends"
        )
        sub.add_argument(
            "--max-new-tokens", type=int, default=64, help="length of the completion (default: %(default)s)"
        )
        sub.add_argument(
            "--temperature", type=float, default=0.0, help="0 decodes greedily (default: %(default)s)"
        )
        sub.add_argument(
            "--top-p", type=float, default=1.0, help="nucleus of the sampling (default: %(default)s)"
        )
        sub.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
        sub.add_argument("--no-memory", action="store_true", help="read nothing of the bank")
        sub.add_argument(
            "--past",
            choices=["refuse", "memory"],
            default="refuse",
            help="what to do with the past of a prompt longer than the model's row: refuse it, or read it as memories "
            "(default: %(default)s)",
        )
    if name == "report":
        sub.add_argument(
            "runs",
            nargs="+",
            metavar="RUN",
            help="run folders, or names below --root; M=C pairs a run with its control",
        )
        sub.add_argument(
            "--html", metavar="FILE", default="report.html", help="the page (default: %(default)s)"
        )
        sub.add_argument("--pictures", metavar="FOLDER", help="draw the charts as PNGs, too")
        _add_root(sub, "folder of runs")
    if name == "pretrain":
        sub.add_argument("--cfg", action="store_true", help="print the composed configuration and stop")
        sub.add_argument(
            "-m",
            "--multirun",
            action="store_true",
            help="train with every combination of listed settings, a run each (see below)",
        )
        sub.add_argument(
            "--no-prepare",
            action="store_true",
            help="fail when the corpus is not prepared, instead of preparing it",
        )
    if name == "cost":
        _add_cost_arguments(sub)
    if name == "sweep":
        _add_sweep_arguments(sub)
    if name == "plan":
        _add_plan_arguments(sub)
    if name == "doctor":
        _add_root(sub, "folder of runs, whose disk is looked at")
        sub.add_argument("--json", action="store_true", help="print JSON instead of lines")
    if name in ("prepare", "pretrain", "demo", "cost", "plan", "sweep"):
        sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings (see below)")


def _add_audit_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--split",
        choices=["validation", "test", "train"],
        default="validation",
        help="held-out rows, or rows of the last bank epoch (default: %(default)s)",
    )
    sub.add_argument("--rows", type=int, metavar="N", help="rows (default: evaluation.text_rows)")
    sub.add_argument(
        "--query",
        choices=["own", "previous"],
        help="whose text a chunk's references were found with (default: continual.memory.query)",
    )
    sub.add_argument("--output", metavar="FILE.json", help="write the results there as well")


def _add_sweep_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--name", help="its folder, and the beginning of its runs' names (default: that of sweep=NAME)"
    )
    sub.add_argument(
        "--trials", type=int, metavar="N", help="trials, failed ones included (default: the file's, or 20)"
    )
    sub.add_argument(
        "--seed",
        type=int,
        default=0,
        help="decides what is drawn; `seed=` is the runs' (default: %(default)s)",
    )
    sub.add_argument(
        "--objective",
        choices=["text", "facts"],
        help="whose validation loss is made small (default: the file's, or text)",
    )
    sub.add_argument("--report", action="store_true", help="only say what there is, and train nothing")


def _add_cost_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--references", default="1e6", metavar="N", help="references of the bank (default: %(default)s)"
    )
    sub.add_argument(
        "--codec",
        choices=[kind.name for kind in CodecKind],
        default=CodecKind.model.name,
        help="how memories are stored (default: %(default)s, in bfloat16)",
    )
    sub.add_argument(
        "--embedder", choices=list(EMBEDDERS), help="what embeds queries (default: retrieval.embedder.kind)"
    )
    rates = Hardware()
    for name, rate, doc in (
        ("disk", rates.disk_gb_per_second, "GB/s of the drive with the bank"),
        ("bus", rates.bus_gb_per_second, "GB/s from host to device"),
        ("memory", rates.memory_gb_per_second, "GB/s of host memory, which a search reads"),
        ("tflops", rates.device_tflops, "TFLOP/s that the device sustains"),
    ):
        sub.add_argument(
            f"--{name}", type=float, default=rate, metavar="X", help=f"{doc} (default: %(default)s)"
        )
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
    sub.add_argument(
        "--picture", metavar="FILE.png", help="draw costs, storage and times (the paper's Figure 4)"
    )


def _add_plan_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--device", choices=list(DEVICES), help="what each rank runs on (default: what this machine has)"
    )
    sub.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="X",
        help="share of the device's nominal rate that is reached, by PaLM's count (default: %(default)s)",
    )
    sub.add_argument(
        "--tflops", type=float, metavar="X", help="the device's rate, in place of the nominal one"
    )
    sub.add_argument(
        "--memory", type=float, metavar="GIB", help="memory of a rank, in place of the nominal one"
    )
    sub.add_argument("--price", type=float, metavar="X", help="of a device for an hour, in any currency")
    sub.add_argument(
        "--references", metavar="N", help="references of the bank (default: those of the prepared corpus)"
    )
    looking = sub.add_mutually_exclusive_group()
    looking.add_argument(
        "--config-only",
        action="store_true",
        help="look at the configuration alone: not at the prepared corpus, nor at this machine's disk and memory",
    )
    looking.add_argument(
        "--search",
        action="store_true",
        help="make the searches of all bank epochs now, so that the bank's size is no estimate: takes the embedder, "
        "and minutes, which the run then saves",
    )
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _add_inspect_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--text", help="text to look into, read as `evaluate` reads")
    sub.add_argument(
        "--query",
        choices=["own", "previous"],
        help="whose text searches for a chunk of --text: its own, which has seen the tokens it predicts, or that of "
        "the chunk before it (default: previous)",
    )
    sub.add_argument("--prompt", help="prompt to complete and look into, read as `generate` reads")
    sub.add_argument(
        "--max-new-tokens", type=int, default=64, help="length of the completion (default: %(default)s)"
    )
    sub.add_argument("--html", metavar="FILE", help="write one self-contained page, too")
    sub.add_argument("--details", action="store_true", help="list what each head of each layer kept")
    _add_bank_read(sub)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; settings may stand on both sides of an option, which argparse allows on one side alone."""
    top = parser()
    arguments, left = top.parse_known_args(argv)
    sub = arguments.parser
    del arguments.parser
    has_settings = hasattr(arguments, "overrides")
    if any(text.startswith("-") for text in left):
        given = list(sys.argv[1:] if argv is None else argv)
        sub.error(_unrecognized_option(given, left, sub, has_settings=has_settings))
    if left and not has_settings:
        sub.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        arguments.overrides += left
    return arguments


def _unrecognized_option(
    given: Sequence[str], left: Sequence[str], sub: argparse.ArgumentParser, *, has_settings: bool
) -> str:
    """What to write in place of the first option that a command does not have."""
    option = next(text for text in left if text.startswith("-"))
    name, _, value = option.partition("=")
    near = difflib.get_close_matches(name, re.findall(r"--[\w-]+", sub.format_usage()), n=1)
    if near:
        return f"unrecognized arguments: {option}; did you mean {near[0]}?"
    if not has_settings:
        return f"unrecognized arguments: {option}"
    if name.startswith("--config-"):
        from launch.compose import CONF
        from launch.explain import own_files

        return f"unrecognized arguments: {option}; {own_files(CONF)}"
    following = next(iter(given[given.index(option) + 1 :]), "")
    if not value and following and not re.search(r"^-|=", following):
        value = following
    return f"unrecognized arguments: {option}; settings are written {name.lstrip('-')}={value or 'VALUE'}"


_OF_THE_DISK = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EDQUOT,
)
"""What the place of a file can cause; anything else is a mistake of ours, and shows where."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a mistake of the user ends with one clear line and exit code 2."""
    arguments = parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal has every letter
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("faiss").setLevel(logging.WARNING)
    try:
        module = importlib.import_module(
            f"launch.{arguments.command}"
        )  # torch: seconds in which one may think better
        code = int(module.run(arguments))
        sys.stdout.flush()
        return code
    except ValueError as problem:
        print(f"memory3 {arguments.command}: {problem}", file=sys.stderr)
        return 2
    except (BrokenPipeError, SystemExit) as end:  # `memory3 ... | head`: who read it has enough
        if isinstance(end, SystemExit) and not isinstance(
            end.__context__, BrokenPipeError
        ):  # else rich's own
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as problem:
        if problem.errno not in _OF_THE_DISK or problem.filename is None:
            raise
        print(
            f"memory3 {arguments.command}: {problem.filename}: {problem.strerror}; mend it, or choose another folder "
            "(paths.root, --root)",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        logging.disable(logging.INFO)  # torch, half imported, would tell of its caches
        print(f"memory3 {arguments.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
