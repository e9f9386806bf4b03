"""How messages and tables say things: lengths as people write them (4096, 4K), the name nearest to a mistyped one, errors in one line."""

import difflib
from collections.abc import Iterable

_SUFFIX = 1024


def parse_length(text: str) -> int:
    """Tokens of "4096" or "4K" (4 · 1024).

    Raises:
        ValueError: no such number, or less than one token.
    """
    number = text.strip().removesuffix("k").removesuffix("K")
    factor = _SUFFIX if number != text.strip() else 1
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"a length is a number of tokens ≥ 1, such as 4096 or 4K: got {text!r}")
    return factor * int(number)


def format_length(length: int) -> str:
    """Such as "4K" for 4096, where that is exact."""
    return str(length) if length % _SUFFIX else f"{length // _SUFFIX}K"


def nearest(name: str, known: Iterable[str], *, least: float = 0.6) -> str | None:
    """The known name that a mistyped one is nearest to; None if no name has at least the share `least` of its letters in common with it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=least)), None)


def one_line(error: BaseException) -> str:
    """What an error says, in one line; the name of its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
