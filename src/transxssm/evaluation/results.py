"""The results of an evaluation: cells in a JSON file, which is saved after each of them, and tables."""

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
        key: name of the cell in the evaluation.
        num_steps: steps of the progress bar.
        measure: returns the cell, as plain values. It calls its argument with the number of steps just done.
    """

    key: str
    num_steps: int
    measure: Callable[[Advance], Cell]


@dataclass(frozen=True)
class ResultTable:
    """Rows of text under headings."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_markdown(self) -> str:
        """The table in Markdown. The first column is left-aligned, the others are right-aligned."""
        lines = [list(self.headings), [":--", *["--:"] * (len(self.headings) - 1)], *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@dataclass
class Results:
    """The cells of one evaluation under one set of settings.

    Args:
        path: path of the JSON file.
        evaluation: name of the evaluation.
        settings: everything but the key on which a cell depends, as plain values.
        context: where and how it was measured (versions, device, command), on which no result should depend.
        cells: cells by key, in the order of measurement.
    """

    path: Path
    evaluation: str
    settings: dict[str, Any]
    context: dict[str, Any]
    cells: dict[str, Cell] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, evaluation: str, settings: dict[str, Any], context: dict[str, Any]) -> "Results":
        """Opens the results in the file, or empty ones if there is no file.

        Raises:
            ValueError: the file holds results of other settings, which the message names, or something else.
        """
        settings = json.loads(json.dumps(settings))  # as read back from the file: tuples become lists
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
        """Measures the missing cells, and saves each of them at once.

        Args:
            plans: all requested cells.
            advance: called with numbers of steps done, including those of existing cells.
            finished: called with the key of each cell that was measured.
        """
        for plan in plans:
            if plan.key in self.cells:
                advance(plan.num_steps)
                continue
            self.cells[plan.key] = plan.measure(advance)
            self.save()
            finished(plan.key)

    def save(self) -> None:
        """Replaces the file atomically, so that it is whole even after a crash. Only the first process writes."""
        if not is_first():
            return
        content = {
            "evaluation": self.evaluation,
            "settings": self.settings,
            "context": self.context,
            "cells": self.cells,
        }
        write_text_whole(self.path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
