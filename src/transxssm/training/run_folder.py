"""One run, one folder: what it may contain before a run starts, and whether a resumed run is still the same one."""

import logging
import shutil
from pathlib import Path
from typing import Any

from transxssm.training.recipe import Recipe, load_recipe

logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
LOSS_PLOT = "loss.png"
TENSORBOARD = "tensorboard"


def check_empty(run_dir: Path) -> None:
    """Checks that a new run overwrites nothing.

    Raises:
        ValueError: the folder holds something, or is none.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"training.output_dir {run_dir} is a file: choose another one")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        raise ValueError(
            f"{run_dir} is not empty: continue that run with --resume, or choose another training.output_dir"
        )


def remove_start(run_dir: Path) -> None:
    """Removes what a new run wrote before its first step, so that the corrected command finds its folder empty."""
    run_dir.joinpath(RECIPE).unlink(missing_ok=True)
    shutil.rmtree(run_dir / TENSORBOARD, ignore_errors=True)


def check_same_run(run_dir: Path, recipe: Recipe) -> None:
    """Checks that a run to be resumed has the model and data it was started with.

    Raises:
        ValueError: it has other ones; names the keys.
    """
    stored = _stored_recipe(run_dir)
    if stored is None:
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise ValueError(
                f"{run_dir} holds something other than a run (no {RECIPE}): choose another training.output_dir"
            )
        return
    before, now = stored.to_dict(), recipe.to_dict()
    differing = _differences(before, now, "model") + _differences(before, now, "data")
    if differing:
        raise ValueError(
            f"{run_dir} was started with another recipe: {'; '.join(differing)}. "
            "Resume it with its own, or start anew in another training.output_dir"
        )
    changed = _differences(before, now, "training")
    if changed:
        logger.warning("resuming with other training settings than before: %s", "; ".join(changed))


def has_same_training(run_dir: Path, recipe: Recipe) -> bool:
    """Whether the folder's run was started with the same training settings, so that if finished it has nothing left to do."""
    stored = _stored_recipe(run_dir)
    return stored is not None and stored.training == recipe.training


def _stored_recipe(run_dir: Path) -> Recipe | None:
    path = run_dir / RECIPE
    return load_recipe(path) if path.is_file() else None


def _differences(before: dict[str, Any], now: dict[str, Any], section: str) -> list[str]:
    old, new = before[section], now[section]
    return [
        f"{section}.{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
