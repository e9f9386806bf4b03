"""What the options of `transxssm evaluate` mean: lists of numbers, sizes, strides, and lengths nobody chose."""

SHORTEST = 512  # of the default lengths, or the training's length where that is shorter
EXTRAPOLATION = 4  # the longest default length, in training lengths
LONGEST_DEFAULT = 65_536


def default_lengths(training_length: int | None, longest: int) -> list[int]:
    """Powers of two from 512 up to four times the training's length (64K where that is unknown), at most `longest`.

    Raises:
        ValueError: none fits.
    """
    first = SHORTEST if training_length is None else min(SHORTEST, training_length)
    limit = LONGEST_DEFAULT if training_length is None else min(EXTRAPOLATION * training_length, LONGEST_DEFAULT)
    lengths = [length for power in range(17) if (length := first * 2**power) <= min(limit, longest)]
    if not lengths:
        raise ValueError(
            f"no text is as long as the shortest default window of {first} tokens: the longest has {longest}; choose --lengths"
        )
    return lengths


def read_numbers(option: str, text: str) -> list[int]:
    """Whole numbers between commas, in ascending order; K means 1024.

    Raises:
        ValueError: something else, or a number below 1.
    """
    return sorted({_number(option, part) for part in text.split(",")})


def read_shares(option: str, text: str) -> list[float]:
    """Numbers from 0 to 1 between commas, in ascending order.

    Raises:
        ValueError: something else.
    """
    try:
        shares = sorted({float(part) for part in text.split(",")})
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"{option}: got {text!r}, expected numbers from 0 to 1, such as 0,0.5,1")
    return shares


def read_sizes(text: str) -> list[tuple[int, int]]:
    """Lengths and numbers of pairs, such as 64/4,128/8.

    Raises:
        ValueError: something else.
    """
    sizes = []
    for part in text.split(","):
        length, slash, pairs = part.partition("/")
        if not slash:
            raise ValueError(f"--sizes: got {part!r}, expected tokens/pairs, such as 64/4,128/8")
        sizes.append((_number("--sizes", length), _number("--sizes", pairs)))
    return sizes


def read_stride(text: str, length: int) -> int:
    """Tokens from one window of a length to the next.

    Raises:
        ValueError: neither half, nor rolling, nor a number.
    """
    match text:
        case "half":
            return max(1, length // 2)
        case "rolling":
            return length - 1
        case _:
            try:
                return _number("--stride", text)
            except ValueError:
                raise ValueError(f"--stride: got {text!r}, expected half, rolling or a number of tokens") from None


def require_positive(**options: int | None) -> None:
    """Checks numbers of options, named as in Python; None is an option that nobody gave.

    Raises:
        ValueError: one is below 1.
    """
    for name, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1: got {value}")


def _number(option: str, text: str) -> int:
    digits = text.strip().upper()
    factor = 1024 if digits.endswith("K") else 1
    digits = digits.removesuffix("K")
    if not digits.isdecimal() or int(digits) < 1:
        raise ValueError(f"{option}: got {text.strip()!r}, expected whole numbers from 1 on, such as 512,1K,64K")
    return int(digits) * factor
