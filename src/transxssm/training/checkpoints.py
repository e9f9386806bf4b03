"""Checkpoints that are whole or absent: they are written to a staging folder, listed, synced, and then renamed."""

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
    """A checkpoint or the final model could not be written. Earlier checkpoints are whole."""


def publish_folder(staged: Path, target: Path) -> None:
    """Renames a finished folder atomically, after its bytes are on the disk.

    The folder gets a list of its files and their sizes, by which `why_incomplete` finds truncated files.
    """
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in _files(staged)}
    (staged / MANIFEST).write_text(json.dumps(sizes, indent=1, sort_keys=True), encoding="utf-8")
    _sync_tree(staged)
    if target.exists():  # left incomplete by an earlier process, since a complete one would have been resumed from
        shutil.rmtree(target)
    staged.rename(target)
    sync(target.parent)


def publish_files(staged: Path, target: Path) -> None:
    """Moves the files of a finished folder into another, each atomically, after their bytes are on the disk."""
    _sync_tree(staged)
    for path in _files(staged):
        destination = target / path.relative_to(staged)
        destination.parent.mkdir(parents=True, exist_ok=True)
        path.replace(destination)
    shutil.rmtree(staged)
    sync(target)


def why_incomplete(checkpoint: Path) -> str | None:
    """What is missing from a checkpoint, in words, or None if it is whole."""
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
    """The latest whole checkpoint. Later ones that are incomplete are skipped with a warning."""
    for path in reversed(_checkpoints(run_dir)):
        reason = why_incomplete(path)
        if reason is None:
            return path
        logger.warning("%s is incomplete and skipped: %s", path, reason)
    return None


def keep_latest(run_dir: Path, limit: int | None, also: str | None = None) -> None:
    """Deletes whole checkpoints except the latest `limit` and the one whose path ends like `also`. With None or 0 it keeps all."""
    if not limit or limit < 0:
        return
    whole = [path for path in _checkpoints(run_dir) if why_incomplete(path) is None]
    kept = {path.name for path in whole[-limit:]} | ({Path(also).name} if also else set())
    for path in whole:
        if path.name not in kept:
            shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix(PREFIX))


def save_error(what: str, run_dir: Path, error: Exception) -> SaveError:
    """An error of one line that says what could not be saved, why, and from what the run can continue."""
    free_mb = shutil.disk_usage(run_dir).free / 1e6
    cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError) and e.errno), None)
    if cause is not None and cause.errno:
        reason = os.strerror(cause.errno)
    elif free_mb < 1:  # torch and safetensors have their own messages for a full disk
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
