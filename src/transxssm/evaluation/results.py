"""What an evaluation has measured so far: cells in a JSON file that grows with each of them, and tables out of it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transxssm.evaluation.processes import is_first
from transxssm.whole_files import write_text_whole

Cell = dict[str, Any]
Advance = Callable[[int], object]


@dataclass(frozen=True)
class CellPlan:
    """A cell that is to be measured.

    Args:
        key: names the cell among those of the evaluation.
        num_steps: of the progress bar.
        measure: returns the cell, plain values only; calls its argument with the number of steps just done.
    """

    key: str
    num_steps: int
    measure: Callable[[Advance], Cell]


@dataclass(frozen=True)
class ResultTable:
    """Rows of words under headings."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_markdown(self) -> str:
        """The table in Markdown; the first column left, the others right."""
        lines = [list(self.headings), [":--", *["--:"] * (len(self.headings) - 1)], *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@dataclass
class Results:
    """The cells of one evaluation under one set of settings.

    Args:
        path: of the JSON file.
        evaluation: its name.
        settings: everything that a cell depends on, beside its key: plain values.
        context: where and how it was measured, which no figure should depend on: versions, device, command.
        cells: by key, in the order in which they were measured.
    """

    path: Path
    evaluation: str
    settings: dict[str, Any]
    context: dict[str, Any]
    cells: dict[str, Cell] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, evaluation: str, settings: dict[str, Any], context: dict[str, Any]) -> "Results":
        """What the file holds, or nothing yet.

        Raises:
            ValueError: it holds results of other settings (which are named), or something else.
        """
        settings = json.loads(json.dumps(settings))  # as they will be read back: tuples are lists
        results = cls(path, evaluation, settings, context)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            before, cells = stored["settings"], stored["cells"]
        except FileNotFoundError:
            return results
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path} holds no results that can be continued: delete it, or choose another output folder"
            ) from None
        differing = [
            f"{key} was {before.get(key)!r} and is {settings.get(key)!r}"
            for key in sorted({*before, *settings})
            if before.get(key) != settings.get(key)
        ]
        if differing:
            raise ValueError(
                f"{path} holds results under other settings: {'; '.join(differing)}. Choose another output folder, or delete that file"
            )
        results.cells = cells
        return results

    def measure(self, plans: Sequence[CellPlan], advance: Advance, finished: Callable[[str], object]) -> None:
        """Measures the cells that are not there yet and stores each as soon as it is.

        Args:
            plans: all cells that are wanted.
            advance: is called with steps as they are done, those of cells that were there already included.
            finished: is called with the key of each cell that was measured.
        """
        for plan in plans:
            if plan.key in self.cells:
                advance(plan.num_steps)
                continue
            self.cells[plan.key] = plan.measure(advance)
            self.save()
            finished(plan.key)

    def save(self) -> None:
        """Replaces the file at once: who reads it, or goes on from it after a crash, never finds a part. The first process writes."""
        if not is_first():
            return
        content = {
            "evaluation": self.evaluation,
            "settings": self.settings,
            "context": self.context,
            "cells": self.cells,
        }
        write_text_whole(self.path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
