"""Small corpora on disk, and data arguments that keep what they prepare in the test's own folder."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from transxssm.data import DataArguments

WORDS = [
    "def",
    "return",
    "self",
    "import",
    "value",
    "for",
    "in",
    "range",
    "(",
    ")",
    ":",
    "\n    ",
    "é",
    "🙂",
    "42",
    "#",
]


def random_text(seed: int, num_words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, str | bytes]], Path]:
    """Writes files {path: content} into a folder of the test and returns it."""

    def write_files(files: dict[str, str | bytes]) -> Path:
        folder = tmp_path / "corpus"
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return write_files


@pytest.fixture
def folder(write) -> Path:
    """Forty documents of very different lengths."""
    return write({f"part{n % 3}/{n}.txt": random_text(n, 3 + n * n % 200) for n in range(40)})


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., DataArguments]:
    """DataArguments with the given fields, a quarter held out, and a cache of their own."""

    def make(corpus: str | Path, **fields) -> DataArguments:
        defaults = {"held_out_fraction": 0.25, "vocab_size": 300, "cache_dir": str(tmp_path / "cache")}
        return DataArguments(corpus=str(corpus), **(defaults | fields))

    return make
