"""One run, one folder: what it may hold before a run starts, whether a resumed run is still the same one, and what is left at its end."""

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
    """The recipe with what was chosen for it when its run, which is to be resumed, began; as it is where nothing was."""
    stored = stored_recipe(recipe.output_dir)
    if stored is None or stored.fit != recipe.fit or not recipe.open_settings:
        return recipe
    before = stored.to_dict()
    chosen = {f"{section}.{key}": value for section in before for key, value in before[section].items()}
    return recipe.with_choices(chosen).closed()


def check_empty(run_dir: Path) -> None:
    """Checks that a new run overwrites nothing.

    Raises:
        ValueError: the folder holds something, or is none.
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
    """Whether a folder holds a run that has begun, which is what can be resumed."""
    return (run_dir / RECIPE).is_file()


def remove_start(run_dir: Path, *, was_there: bool) -> None:
    """Removes what a new run wrote before its first step, so that the corrected command finds its folder as this one did.

    Args:
        run_dir: the folder.
        was_there: whether it was, empty, before the run; else it goes too.
    """
    for name in (RECIPE, DATA):
        run_dir.joinpath(name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / TENSORBOARD, ignore_errors=True)
    if not was_there:
        with suppress(OSError):  # not empty: somebody else wrote into it
            run_dir.rmdir()


def check_same_run(run_dir: Path, recipe: Recipe) -> None:
    """Checks that a run to be resumed has the model and data it was started with.

    Raises:
        ValueError: it has other ones, named by their keys; there is no run to be resumed, when the nearest that is there is named.
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
    """Records what a run that begins trains on and holds out (`TrainingData.contents`)."""
    write_text_whole(run_dir / DATA, json.dumps(dict(contents), indent=2) + "\n")


def check_same_data(run_dir: Path, contents: Mapping[str, str], say: Callable[..., None] = logger.warning) -> None:
    """Checks that a run that goes on reads the text that it began with: its recipe names files, which may have changed.

    A folder without a record, of a run that an earlier version began, is warned of.

    Args:
        run_dir: the run's folder.
        contents: of the data as it is now (`TrainingData.contents`).
        say: takes the warning, as a logger's method does.

    Raises:
        ValueError: one split or both are not the same, each named with what it was and is.
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
    """Whether the folder's run was started with the same training settings, so that if finished it has nothing left to do."""
    stored = stored_recipe(run_dir)
    return stored is not None and stored.training == recipe.training


def stored_recipe(run_dir: Path) -> Recipe | None:
    """The recipe in a run folder, with everything that was chosen for it; None where there is none."""
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
    """Writes summary.json; its presence says that the run has finished."""
    write_text_whole(run_dir / SUMMARY, json.dumps(summary, indent=2) + "\n")


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None where there is none."""
    try:
        return json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def plot_loss(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draws training and held-out loss over tokens.

    Args:
        path: of the PNG.
        rows: of metrics.jsonl; losses in nats per token.
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
