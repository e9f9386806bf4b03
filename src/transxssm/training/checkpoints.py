"""Checkpoints that are whole or absent: written aside, listed, synced, and only then given their name."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path

from transxssm.whole_files import sync

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
MANIFEST = "files.json"
STAGING = ".unfinished"


class SaveError(OSError):
    """A checkpoint or the final model could not be written; what was there before is whole."""


def publish_folder(staged: Path, target: Path) -> None:
    """Makes a finished folder appear under its name at once, after its bytes are on the disk.

    A list of its files and their sizes goes with it, by which `why_incomplete` later finds what was cut short.
    """
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in _files(staged)}
    (staged / MANIFEST).write_text(json.dumps(sizes, indent=1, sort_keys=True), encoding="utf-8")
    _sync_tree(staged)
    if target.exists():  # left incomplete by an earlier process: complete ones are resumed from, not repeated
        shutil.rmtree(target)
    staged.rename(target)
    sync(target.parent)


def publish_files(staged: Path, target: Path) -> None:
    """Moves the files of a finished folder into another, each at once, after their bytes are on the disk."""
    _sync_tree(staged)
    for path in _files(staged):
        destination = target / path.relative_to(staged)
        destination.parent.mkdir(parents=True, exist_ok=True)
        path.replace(destination)
    shutil.rmtree(staged)
    sync(target)


def why_incomplete(checkpoint: Path) -> str | None:
    """What is missing from a checkpoint, in words; None if it is whole."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST}, which is written last, is missing"
    except ValueError:
        return f"{MANIFEST} is cut short"
    for name, expected in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected:
            return f"{name} has {path.stat().st_size} bytes of {expected}"
    return None


def last_complete_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint of the latest step that is whole; each later one that isn't is skipped with a warning."""
    for path in reversed(_checkpoints(run_dir)):
        reason = why_incomplete(path)
        if reason is None:
            return path
        logger.warning("%s is incomplete and skipped: %s", path, reason)
    return None


def keep_latest(run_dir: Path, limit: int | None, also: str | None = None) -> None:
    """Deletes whole checkpoints but the latest `limit` (None or 0: all of them) and the one whose path ends like `also`."""
    if not limit or limit < 0:
        return
    whole = [path for path in _checkpoints(run_dir) if why_incomplete(path) is None]
    kept = {path.name for path in whole[-limit:]} | ({Path(also).name} if also else set())
    for path in whole:
        if path.name not in kept:
            shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which a checkpoint was taken."""
    return int(checkpoint.name.removeprefix(PREFIX))


def save_error(what: str, run_dir: Path, error: Exception) -> SaveError:
    """One line that says what could not be saved, why, and what is left to continue from."""
    free_mb = shutil.disk_usage(run_dir).free / 1e6
    cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError) and e.errno), None)
    if cause is not None and cause.errno:
        reason = os.strerror(cause.errno)
    elif free_mb < 1:  # torch and safetensors report a full disk in words of their own
        reason = os.strerror(errno.ENOSPC)
    else:
        reason = " ".join(str(error).split())
    last = last_complete_checkpoint(run_dir)
    kept = f"{last} is whole" if last is not None else "there is no earlier checkpoint"
    return SaveError(
        f"could not save {what} in {run_dir}: {reason} ({free_mb:.0f} MB free); {kept}: make room, then run the same command with --resume"
    )


def _checkpoints(run_dir: Path) -> list[Path]:
    numbered = [path for path in run_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(numbered, key=step_of)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sync_tree(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        sync(path)
