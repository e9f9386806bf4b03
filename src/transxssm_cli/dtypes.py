"""Names of floating-point types on the command line."""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_dtype(name: str, *others: str) -> torch.dtype:
    """The type of a name.

    Args:
        name: as the user gave it.
        others: what else would be accepted in its place, for the message.

    Raises:
        ValueError: no such type.
    """
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: expected one of {', '.join([*others, *DTYPES])}")
    return DTYPES[name]
