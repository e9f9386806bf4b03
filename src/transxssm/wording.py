"""How messages and tables say things: lengths of sequences as people write them (4096, 4K, 64k)."""

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
