"""Which text is held out: whole documents by a hash of their names, or pieces of them where documents are too few or too long."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from transxssm.data.files import cut_end

# Several pieces, spread over a text, stand for more of it than its end does; short ones leave a model no context to predict them from.
PIECES = 4
SHORTEST_PIECE, LONGEST_PIECE = 4 * 1024, 32 * 1024  # characters, where there are so many to hold out
# How many times more or less than asked for the hash of names may take before documents are cut.
FAR = 2


class Run(NamedTuple):
    """Characters `begin` to `end` of a document, on one side of the split."""

    document: int
    begin: int
    end: int
    is_held_out: bool


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of this name is held out: its hash, taken as a number in [0, 1), lies below `fraction`."""
    return hash_of(name) < fraction * 2**64


def hash_of(name: str) -> int:
    """64 bits that look random and depend on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def is_near(held_out: int, total: int, fraction: float) -> bool:
    """Whether so many characters of `total` are about `fraction` of it, and leave about the rest to train on."""
    shares = ((held_out, fraction * total), (total - held_out, (1 - fraction) * total))
    return all(expected / FAR <= share <= expected * FAR for share, expected in shares)


def cut_and_chosen(names: Sequence[str], texts: Iterable[str], num_characters: int, fraction: float) -> list[Run]:
    """All documents, cut as little as it takes to hold out about `fraction` of their characters.

    Long documents are divided into pieces, at the ends of lines or sentences where there are any, and pieces and short documents
    are held out in the order of their names' hash until the share is nearest to `fraction`; at least one is, and one is not. What
    is left of a document between two held-out pieces stays in one.

    Args:
        names: of the documents.
        texts: of the same documents, in their order.
        num_characters: of all texts.
        fraction: of the characters, between 0 and 1.

    Raises:
        ValueError: all the text is a single character.
    """
    wanted = fraction * num_characters
    smaller = min(wanted, num_characters - wanted)
    size = max(1, round(min(smaller, max(SHORTEST_PIECE, min(LONGEST_PIECE, smaller / PIECES)))))
    # Copies have the same name, and so have their pieces: what is known by a name goes to one side.
    lengths: dict[str, int] = {}
    pieces: list[tuple[str, int, int, int]] = []
    for index, (name, text) in enumerate(zip(names, texts, strict=True)):
        bounds = piece_bounds(text, size)
        for number, (begin, end) in enumerate(bounds):
            piece = name if len(bounds) == 1 else f"{name}@{number}"
            lengths[piece] = lengths.get(piece, 0) + end - begin
            pieces.append((piece, index, begin, end))
    if len(lengths) < 2:
        raise ValueError("it is one character")
    chosen = _nearest_in_order(lengths, wanted)

    runs: list[Run] = []
    for piece, index, begin, end in pieces:
        side = piece in chosen
        if runs and runs[-1].document == index and runs[-1].is_held_out == side:
            runs[-1] = runs[-1]._replace(end=end)
        else:
            runs.append(Run(index, begin, end, side))
    return runs


def piece_bounds(text: str, size: int) -> list[tuple[int, int]]:
    """Where the pieces of a text begin and end: about `size` characters each, none of them blank unless the text is."""
    bounds: list[tuple[int, int]] = []
    begin = 0
    while begin < len(text):
        # No small rest: the last piece is up to half as long again.
        end = len(text) if len(text) - begin < 1.5 * size else cut_end(text, begin, begin + size)
        if bounds and not text[begin:end].strip():
            begin = bounds.pop()[0]
        while end < len(text) and not text[begin:end].strip():
            end = cut_end(text, end, end + size)
        bounds.append((begin, end))
        begin = end
    return bounds


def _nearest_in_order(lengths: dict[str, int], wanted: float) -> set[str]:
    order = sorted(lengths, key=hash_of)
    sums, total = [], 0
    for name in order[:-1]:
        total += lengths[name]
        sums.append(total)
    count = min(range(len(sums)), key=lambda index: abs(sums[index] - wanted)) + 1
    return set(order[:count])
