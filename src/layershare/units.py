"""Sizes, counts and times in words."""

_WORDS = (("billion", 10**9), ("million", 10**6), ("thousand", 10**3))
_LETTERS = {"billion": "B", "million": "M", "thousand": "k", "": ""}


def size(count: int) -> str:
    """Bytes for people: `3.2 GB`."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if float(_plain(value)) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{_plain(value)} {unit}"


def count(number: float) -> str:
    """A count to three digits: `7.61 million`."""
    word, factor = _scale(number)
    return f"{_plain(number / factor)} {word}".rstrip()


def count_of(part: float, whole: float) -> str:
    """A part of a count in the whole's unit: `6.3 of 7.6 million`."""
    word, factor = _scale(whole)
    return f"{_plain(part / factor, 2)} of {_plain(whole / factor, 2)} {word}".rstrip()


def brief_count(number: float) -> str:
    """A count to three digits, as `keep` takes it: `7.61M`."""
    word, factor = _scale(number)
    return f"{_plain(number / factor)}{_LETTERS[word]}"


def percent(fraction: float, digits: int = 0) -> str:
    """`0.8` as `80 %`, with a space that does not break."""
    return f"{fraction:.{digits}%}".replace("%", "\N{NO-BREAK SPACE}%")


def duration(seconds: float) -> str:
    """Seconds for people: `47 s`, `3.5 min`, `2.1 h`."""
    units = (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
    unit, factor = next(each for each in units if seconds >= each[1] or each[1] == 1)
    value = seconds / factor
    return f"{value:.2g} {unit}" if value < 10 else f"{value:.0f} {unit}"


def clock_time(seconds: float) -> str:
    """Seconds as `0:12` or `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _scale(number: float) -> tuple[str, int]:
    """The largest unit of counts that a number reaches when it is rounded, and what it stands for."""
    return next(((word, factor) for word, factor in _WORDS if float(_plain(number / factor)) >= 1), ("", 1))


def _plain(value: float, digits: int = 3) -> str:
    """A number to so many digits, or to a whole one, without an exponent."""
    return f"{value:.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"
