"""The extras that commands need, looked for before anything of them is imported."""

import importlib.metadata
import re

PACKAGE = "transxssm"


def require_extra(extra: str) -> None:
    """Checks that the libraries of an extra are installed.

    Which they are is what the package's own metadata says, so that an extra is written down in pyproject.toml alone.

    Raises:
        ValueError: one or more are missing; says what to install.
    """
    if missing := missing_of(extra):
        raise ValueError(
            f"this command needs {', '.join(missing)}, which the extra {extra} brings: pip install '{PACKAGE}[{extra}]'"
        )


def missing_of(extra: str) -> list[str]:
    """Names of an extra's distributions that are not installed; none where the package itself has no metadata, as in a bare checkout."""
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    names = [line for line in lines if re.search(rf"""extra\s*==\s*["']{extra}["']""", line)]
    required = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in names]
    return [name for name in required if name != PACKAGE and not _is_installed(name)]


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
