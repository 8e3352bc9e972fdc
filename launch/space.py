"""What a sweep varies: Hydra's override grammar, read as fixed settings and dimensions.

    warmup.peak_lr=tag(log, interval(1e-4, 1e-2))    numbers in between, drawn evenly over their logarithms
    model.num_layers=interval(2, 8)                  whole numbers, both ends included: the schema knows the key's type
    model.width=128,256,384 or choice(128, 256)      one of these; files of conf/ as well: model=choice(nano, micro)
    retrieval.window=range(1, 9, 2)                  1, 3, 5, 7: Hydra leaves out the end

Not here: drawing values (`launch.study`), what a trial makes of its settings (`launch.compose`).
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
    Sweep,
)
from hydra.errors import HydraException

from launch.compose import CONF
from launch.explain import refuse_unknown, with_texts_quoted
from launch.keys import kind_of, unknown_key

Value = float | int | str


@dataclass(frozen=True, slots=True)
class Numbers:
    """Numbers from `low` to `high`, both included.

    Attributes:
        whole: Whether they are whole numbers.
        step: Distance of two neighbours; None for all numbers in between.
        log: Whether they are drawn evenly over their logarithms.
    """

    low: float
    high: float
    whole: bool = False
    step: float | None = None
    log: bool = False

    @property
    def ends(self) -> tuple[Value, Value]:
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some values, as an override writes them."""

    options: tuple[str, ...]

    @property
    def ends(self) -> tuple[Value, ...]:
        return self.options


Dimension = Numbers | Choice


@dataclass(frozen=True, slots=True)
class Space:
    """The settings that all trials share, and what varies.

    Attributes:
        fixed: Overrides of every trial, in the order given.
        swept: Dimensions by the key that they set.
        texts: What was written for each of them.
    """

    fixed: tuple[str, ...]
    swept: dict[str, Dimension]
    texts: dict[str, str]

    def settings(self, values: Mapping[str, Value]) -> list[str]:
        """The overrides of a trial with these values."""
        return [*self.fixed, *(f"{key}={values[key]}" for key in self.swept)]

    def corners(self) -> Iterator[list[str]]:
        """Settings that show a mistake before the first trial: each choice and end once, the others at their first."""
        first = {key: dimension.ends[0] for key, dimension in self.swept.items()}
        yield self.settings(first)
        for key, dimension in self.swept.items():
            for value in dimension.ends[1:]:
                yield self.settings({**first, key: value})


def read_space(overrides: Sequence[str], *, beneath: Mapping[str, Override] | None = None) -> Space:
    """Read overrides, of which at least one must vary something; of two for the same key the later one counts.

    Args:
        overrides: As they were written.
        beneath: Those of a file, which the others may replace (`read_overrides`).

    Raises:
        ValueError: Naming the override and what to write instead.
    """
    parsed = {**(beneath or {}), **read_overrides(overrides)}
    swept = {
        override.get_key_element(): (override, _dimension(override))
        for override in parsed.values()
        if override.is_sweep_override()
    }
    if not swept:
        raise ValueError(
            "nothing varies: write at least one setting as KEY=interval(1e-4, 1e-2) or KEY=choice(a, b), or choose "
            "sweep=NAME"
        )
    return Space(
        fixed=tuple(text_of(override) for override in parsed.values() if not override.is_sweep_override()),
        swept={key: dimension for key, (_, dimension) in swept.items()},
        texts={key: override.get_value_string() for key, (override, _) in swept.items()},
    )


def read_overrides(overrides: Sequence[str]) -> dict[str, Override]:
    """Overrides by the key or group that they set, each right by itself.

    Raises:
        ValueError: Naming the override and what to write instead.
    """
    parsed = parse_overrides(
        overrides, varied="interval(1e-4, 1e-2), tag(log, interval(...)), choice(a, b) or range(1, 5)"
    )
    for override in parsed.values():
        if override.is_sweep_override():
            _dimension(override)
    return parsed


def parse_overrides(overrides: Sequence[str], *, varied: str) -> dict[str, Override]:
    """Overrides by the key or group that they set; of two for the same one the later counts.

    Args:
        overrides: As they were written.
        varied: How to write what varies, for messages.

    Raises:
        ValueError: Naming the override and what to write instead.
    """
    refuse_unknown(overrides, CONF)
    parser = OverridesParser.create()
    parsed: dict[str, Override] = {}
    for text in with_texts_quoted(overrides):
        try:
            (override,) = parser.parse_overrides([text])
        except HydraException:
            raise ValueError(f"{text}: settings are written KEY=VALUE; what varies as {varied}") from None
        parsed[override.key_or_group] = override
    return parsed


def text_of(override: Override) -> str:
    """An override as it was written."""
    assert override.input_line is not None
    return re.sub(r"\s+", " ", override.input_line)


def quoted(setting: str) -> str:
    """A setting as a shell takes it."""
    if "'" in setting and not set(setting) & set('$`"\\'):
        return f'"{setting}"'
    return shlex.quote(setting)


def _dimension(override: Override) -> Dimension:
    value = override.value()
    text = text_of(override)
    tags = value.tags if isinstance(value, Sweep) else set()
    if tags - {"log"} or (tags and not isinstance(value, IntervalSweep)):
        raise ValueError(f"{text}: the one tag is log, of an interval: tag(log, interval(1e-4, 1e-2))")
    match value:
        case IntervalSweep():
            return _interval(override, value, log="log" in tags)
        case RangeSweep():
            return _range(text, value)
        case ChoiceSweep():
            options = tuple(dict.fromkeys(override.sweep_string_iterator()))
            if len(options) < 2:
                raise ValueError(
                    f"{text}: one choice is no choice; write {override.key_or_group}={options[0]}"
                )
            return Choice(options)
        case _:
            raise ValueError(f"{text}: list the choices, choice(a, b)")


def _interval(override: Override, value: IntervalSweep, *, log: bool) -> Numbers:
    text = text_of(override)
    kind = None if unknown_key(override.key_or_group) else kind_of(override.key_or_group)
    if kind not in (int, float):
        raise ValueError(f"{text}: {override.key_or_group} is no number; write choice(a, b)")
    assert value.start is not None
    assert value.end is not None
    low, high, whole = float(value.start), float(value.end), kind is int
    if not low < high:
        raise ValueError(f"{text}: an interval goes upwards; write interval({value.end}, {value.start})")
    if log and low <= 0:
        raise ValueError(
            f"{text}: logarithms begin above 0; write for example interval({high / 100:g}, {high:g})"
        )
    if whole and not (low.is_integer() and high.is_integer()):
        raise ValueError(f"{text}: {override.key_or_group} takes whole numbers; write whole ends")
    return Numbers(low, high, whole=whole, log=log)


def _range(text: str, value: RangeSweep) -> Numbers:
    start, stop, step = (Decimal(str(number)) for number in (value.start, value.stop, value.step))
    if step <= 0 or start + step >= stop:
        raise ValueError(
            f"{text}: a range goes upwards and leaves out its end; write for example range(1, 5)"
        )
    last = start + ((stop - start) / step).to_integral_value("ROUND_CEILING") * step - step
    whole = all(isinstance(number, int) for number in (value.start, value.stop, value.step))
    return Numbers(float(start), float(last), whole=whole, step=float(step))
