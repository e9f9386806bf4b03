"""The folder of a run: checks before a run starts or is resumed, and the files that are left at its end."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transxssm.plotting import BLUE, VERMILLION, Look, draw_line, label_lines, picture, short_ticks
from transxssm.training.recipe import Recipe, load_recipe
from transxssm.whole_files import write_text_whole
from transxssm.wording import nearest

logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
DATA = "data.json"
METRICS = "metrics.jsonl"
LOSS_PLOT = "loss.png"
TENSORBOARD = "tensorboard"

SUMMARY = "summary.json"
TRAINING, HELD_OUT = Look("training", BLUE, "-"), Look("held out", VERMILLION, "-")


def as_started(recipe: Recipe) -> Recipe:
    """The recipe with the settings that were chosen when the run to be resumed began. Unchanged if there were none."""
    stored = stored_recipe(recipe.output_dir)
    if stored is None or stored.fit != recipe.fit or not recipe.open_settings:
        return recipe
    before = stored.to_dict()
    chosen = {f"{section}.{key}": value for section in before for key, value in before[section].items()}
    return recipe.with_choices(chosen).closed()


def check_empty(run_dir: Path) -> None:
    """Checks that a new run overwrites nothing.

    Raises:
        ValueError: the folder is not empty, or is not a folder.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"training.output_dir {run_dir} is a file: choose another one")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        if not holds_run(run_dir):
            raise ValueError(_something_else(run_dir))
        raise ValueError(
            f"{run_dir} is not empty: continue that run with --resume, or choose another training.output_dir"
        )


def holds_run(run_dir: Path) -> bool:
    """Whether a folder holds a run that has begun and can be resumed."""
    return (run_dir / RECIPE).is_file()


def remove_start(run_dir: Path, *, was_there: bool) -> None:
    """Removes what a new run wrote before its first step, so that a corrected command finds the folder as it was.

    Args:
        run_dir: the folder.
        was_there: whether the folder existed, empty, before the run. Otherwise it is removed, too.
    """
    for name in (RECIPE, DATA):
        run_dir.joinpath(name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / TENSORBOARD, ignore_errors=True)
    if not was_there:
        with suppress(OSError):  # not empty, since another program wrote into it
            run_dir.rmdir()


def check_same_run(run_dir: Path, recipe: Recipe) -> None:
    """Checks that a run to be resumed has the model and data with which it was started.

    Raises:
        ValueError: settings differ (the message names their keys), or there is no run (the message names the nearest one).
    """
    stored = stored_recipe(run_dir)
    if stored is None:
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise ValueError(_something_else(run_dir))
        raise ValueError(
            f"nothing to resume in {run_dir}: it holds no run{_nearest_run(run_dir)}; leave out --resume to start anew"
        )
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


def write_data(run_dir: Path, contents: Mapping[str, str]) -> None:
    """Records the training and held-out data of a run when it begins (`TrainingData.contents`)."""
    write_text_whole(run_dir / DATA, json.dumps(dict(contents), indent=2) + "\n")


def check_same_data(run_dir: Path, contents: Mapping[str, str], say: Callable[..., None] = logger.warning) -> None:
    """Checks that a resumed run reads the text with which it began, since the files that its recipe names may have changed.

    A folder without a record, as an earlier version wrote it, gives a warning.

    Args:
        run_dir: the run's folder.
        contents: contents of the present data (`TrainingData.contents`).
        say: logs the warning, with the signature of a logger's method.

    Raises:
        ValueError: a split differs. The message says what each was and is.
    """
    path = run_dir / DATA
    if not path.is_file():
        if contents:
            say(
                "%s has no %s, by which a run knows its text again: if files or the version of transxssm have changed, other "
                "text is held out now, and losses before and after cannot be compared",
                run_dir,
                DATA,
            )
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    differing = [
        f"the text {name} was {before.get(name, 'a stream')} and is {contents.get(name, 'a stream')}"
        for name in sorted({*before, *contents})
        if before.get(name) != contents.get(name)
    ]
    if differing:
        raise ValueError(
            f"{run_dir} began with other text, since files or the version of transxssm have changed: {'; '.join(differing)}. "
            f"Restore the files, start anew in another training.output_dir, or remove {path} to go on with this text all the same"
        )


def has_same_training(run_dir: Path, recipe: Recipe) -> bool:
    """Whether the folder's run was started with the same training settings, so that a finished run has nothing left to do."""
    stored = stored_recipe(run_dir)
    return stored is not None and stored.training == recipe.training


def stored_recipe(run_dir: Path) -> Recipe | None:
    """The recipe of a run with every setting resolved, or None if the folder has no recipe."""
    return load_recipe(run_dir / RECIPE) if holds_run(run_dir) else None


def _something_else(run_dir: Path) -> str:
    return f"{run_dir} holds something other than a run (no {RECIPE}): choose another training.output_dir"


def _nearest_run(run_dir: Path) -> str:
    runs = [path.parent.name for path in run_dir.parent.glob(f"*/{RECIPE}")]
    close = nearest(run_dir.name, runs)
    return f" (did you mean {run_dir.parent / close}?)" if close else ""


def _differences(before: dict[str, Any], now: dict[str, Any], section: str) -> list[str]:
    old, new = before[section], now[section]
    return [
        f"{section}.{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Writes summary.json, whose presence marks a run as finished."""
    write_text_whole(run_dir / SUMMARY, json.dumps(summary, indent=2) + "\n")


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The summary that a finished run leaves in its folder, or None if the run has not finished."""
    try:
        return json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def plot_loss(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draws training and held-out loss over tokens.

    Args:
        path: path of the PNG.
        rows: rows of metrics.jsonl, with losses in nats per token.
    """
    with picture(path) as axes:
        for key, look, marker in (("loss", TRAINING, ""), ("eval_loss", HELD_OUT, "o")):
            points = [(row["tokens"], row[key]) for row in rows if key in row]
            if points:
                draw_line(axes, look, *zip(*points, strict=True), marker=marker)
        axes.set_xlabel("tokens")
        axes.set_ylabel("loss (nats per token)")
        short_ticks(axes, "x")
        label_lines(axes)
