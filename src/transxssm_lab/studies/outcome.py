"""How a run of a study ended, read from its folder."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transxssm.training.run_folder import METRICS, read_summary
from transxssm.whole_files import write_text_whole

DIVERGED = "diverged.json"
# A difference between losses is more than noise if it exceeds this share of the first step's loss.
NOISE = 0.1


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        summary: the summary of a run that reached its last step. Empty if a number was not finite.
        rows: the rows of its metrics.jsonl.
        failure: what was not finite, and where. None if all numbers were finite.
    """

    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    failure: str | None = None

    @property
    def has_diverged(self) -> bool:
        """Whether a number was not finite, or the held-out loss ended above its start, or lost half of what it had gained.

        Both comparisons allow a tenth of the first step's training loss for noise: a model that has learnt nothing yet has not diverged.
        """
        if self.failure is not None or not math.isfinite(self.summary["eval_loss"]):
            return True
        losses = [row["loss"] for row in self.rows if "loss" in row]
        if not losses:
            return False
        first, lowest, last = losses[0], min(losses), self.summary["eval_loss"]
        return last > (1 + NOISE) * first or (lowest < (1 - NOISE) * first and last > (first + lowest) / 2)

    @property
    def eval_loss(self) -> float:
        """Held-out loss at the end, nats per token. Infinite after divergence."""
        return math.inf if self.has_diverged else self.summary["eval_loss"]

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max((row["step"] for row in self.rows), default=0)

    def held_out_curve(self) -> list[tuple[int, float, float]]:
        """Tokens, seconds of training and held-out loss at each evaluation."""
        logged = [(0, 0.0), *((row["tokens"], row["train_seconds"]) for row in self.rows if "train_seconds" in row)]
        tokens, seconds = [point[0] for point in logged], [point[1] for point in logged]
        return [
            (row["tokens"], float(np.interp(row["tokens"], tokens, seconds)), row["eval_loss"])
            for row in self.rows
            if "eval_loss" in row
        ]


def read_outcome(folder: Path) -> Outcome | None:
    """The outcome of the run in a folder, or None if there is no run or it is unfinished."""
    summary = read_summary(folder)
    if summary is not None:
        return Outcome(summary, _rows(folder))
    try:
        failure = json.loads((folder / DIVERGED).read_text(encoding="utf-8"))["failure"]
    except FileNotFoundError:
        return None
    return Outcome({}, _rows(folder), failure)


def write_divergence(folder: Path, failure: str) -> None:
    """Records that a number in the run in this folder was not finite."""
    write_text_whole(folder / DIVERGED, json.dumps({"failure": failure}, indent=2) + "\n")


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
