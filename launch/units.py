"""Numbers as the commands print them: to three digits with prefixes, as durations, as counts; and one as they read it.

Not here: tables.
"""

_PREFIXES = (
    (1e24, "Y"),
    (1e21, "Z"),
    (1e18, "E"),
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
)


def whole_number(text: str) -> int:
    """Read a number of references, `1.12e8` included.

    Raises:
        ValueError: It is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number < 1e15:
        raise ValueError(
            f"--references {text} is no number of references; give for example 1000000 or 1.12e8"
        )
    return round(number)


def scale(value: float) -> tuple[float, str]:
    """Return the largest decimal prefix that leaves a number of one or more, as factor and sign."""
    return next(((factor, prefix) for factor, prefix in _PREFIXES if value >= factor), (1.0, ""))


def decimal(value: float) -> str:
    """A number to three digits and its decimal prefix; a unit may follow."""
    factor, prefix = scale(value)
    return f"{three(value / factor)} {prefix}"


def binary(num_bytes: float) -> str:
    """Bytes to three digits, in binary units."""
    if not num_bytes:
        return "0 B"
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if num_bytes < 1024:
            break
        num_bytes, unit = num_bytes / 1024, larger
    return f"{three(num_bytes)} {unit}"


def duration(seconds: float) -> str:
    """Seconds to three digits, in the unit that suits them."""
    for least, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= least:
            return f"{three(seconds / least)} {unit}"
    return f"{three(seconds * 1e6)} µs"


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number of things, by their name: `1 document`, `2,000 documents`."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def three(value: float) -> str:
    """A positive number to three significant digits."""
    rounded = float(f"{value:.3g}")
    if not 1e-4 <= rounded < 1e7:
        return f"{rounded:.2e}"
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:#.3g}"
