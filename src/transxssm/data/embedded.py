"""Text that every machine with Python already has: the source files of the running interpreter.

`python-stdlib` is the standard library without its tests, about 10 MB; `python-environment` is everything installed in
site-packages, hundreds of MB beside a machine-learning stack. Generated tables are left out of both.
"""

import hashlib
import logging
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from transxssm.data.files import Advance, TextFile, decode

logger = logging.getLogger(__name__)

EMBEDDED_CORPORA = ("python-stdlib", "python-environment")

_STDLIB_EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_ENVIRONMENT_EXCLUDED = frozenset({"__pycache__"})

# A line of data: it begins, after brackets, with a number or a string (not a docstring's triple quote), or nobody typed it.
_TABLE_LINE = re.compile(
    rb"""^[ \t]*+[\[({]*+(?:[-+]?\d|[bBuUrRfF]{0,2}(?:'(?!'')|"(?!"")))[^\n]*+ | ^[^\n]{500,}+""",
    re.MULTILINE | re.VERBOSE,
)


def is_table(source: bytes) -> bool:
    """Whether more than half of a Python file's bytes are lines of data: codec and Unicode tables, colour maps, word lists.

    Such files are mostly generated, and teach a model little beyond themselves.
    """
    return sum(match.end() - match.start() for match in _TABLE_LINE.finditer(source)) > len(source) / 2


def embedded_files(corpus: str) -> list[TextFile]:
    """The .py files of an embedded corpus, named and ordered by their path below its root; tables are still among them."""
    if corpus == "python-stdlib":
        roots, excluded = {sysconfig.get_path("stdlib")}, _STDLIB_EXCLUDED
    else:
        roots, excluded = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}, _ENVIRONMENT_EXCLUDED
    files = []
    for root in map(Path, sorted(roots)):
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            if excluded.isdisjoint(relative.parts) and path.is_file():
                files.append(TextFile(relative.as_posix(), path))
    return sorted(files)


def embedded_documents(
    corpus: str, files: Sequence[TextFile], advance: Advance = lambda num_bytes: None
) -> Iterator[dict[str, str]]:
    """Name and text of each file that is text, no table, and no copy of an earlier one.

    Copies (vendored packages) would put the same text into both splits.
    """
    seen: set[bytes] = set()
    skipped: Counter[str] = Counter()
    for file in files:
        try:
            source = file.path.read_bytes()
            text = decode(source)
        except (OSError, ValueError):
            skipped["unreadable"] += 1
            continue
        advance(len(source))
        digest = hashlib.sha256(source).digest()
        if not text.strip():
            skipped["empty"] += 1
        elif digest in seen:
            skipped["copies"] += 1
        elif is_table(source):
            skipped["tables"] += 1
        else:
            seen.add(digest)
            yield {"name": file.name, "text": text}
    logger.info("%s: left out of %d files: %s", corpus, len(files), dict(skipped))
