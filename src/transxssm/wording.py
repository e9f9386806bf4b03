"""Wording of messages and tables: lengths such as 4096 or 4K, the name nearest to a mistyped one, and errors in one line."""

import difflib
from collections.abc import Iterable

_SUFFIX = 1024


def parse_length(text: str) -> int:
    """Reads a number of tokens such as "4096" or "4K" (4 · 1024).

    Raises:
        ValueError: the text is not such a number, or the number is below one.
    """
    number = text.strip().removesuffix("k").removesuffix("K")
    factor = _SUFFIX if number != text.strip() else 1
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"a length is a number of tokens ≥ 1, such as 4096 or 4K: got {text!r}")
    return factor * int(number)


def format_length(length: int) -> str:
    """Formats a length: "4K" for 4096, if that is exact."""
    return str(length) if length % _SUFFIX else f"{length // _SUFFIX}K"


def nearest(name: str, known: Iterable[str], *, least: float = 0.6) -> str | None:
    """The known name nearest to a mistyped one, or None if none shares at least the fraction `least` of its letters."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=least)), None)


def one_line(error: BaseException) -> str:
    """An error's message in one line, or the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
