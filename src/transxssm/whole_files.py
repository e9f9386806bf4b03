"""Files that are replaced atomically: a reader, even after a power cut, finds the old content or the new, never a part."""

import os
from pathlib import Path


def write_text_whole(path: Path, text: str) -> None:
    """Replaces a text file atomically, in UTF-8. Its folder is created if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text, encoding="utf-8")
    sync(draft)
    draft.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
