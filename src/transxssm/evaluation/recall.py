"""Tasks with exact answers: accuracy and loss of associative recall over lengths and pairs, and of algorithmic tasks over lengths."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from transxssm.data import AlgorithmicTask, RecallTask
from transxssm.evaluation.processes import in_turn
from transxssm.evaluation.results import Advance, Cell, CellPlan, ResultTable
from transxssm.evaluation.scoring import TokenScorer
from transxssm.plotting import BLUE, picture, tick

# Length and number of pairs as in Zoology.
STANDARD_SIZES = ((64, 4), (128, 8), (256, 16), (512, 64))


def recall_plans(
    scorer: TokenScorer,
    tasks: Sequence[RecallTask | AlgorithmicTask],
    *,
    num_examples: int,
    seed: int,
    batch_tokens: int,
) -> list[CellPlan]:
    """Plans one cell for each task.

    Raises:
        ValueError: the vocabulary has more tokens than the model has embeddings.
    """
    for task in tasks:
        if task.vocab_size > scorer.vocab_size:
            advice = "a smaller --vocab-size, that of the training"
            if isinstance(task, AlgorithmicTask):
                advice = "the task that the model was trained on"
            raise ValueError(
                f"the task's vocabulary of {task.vocab_size} does not fit the model's of {scorer.vocab_size}: choose {advice}"
            )
    return [
        CellPlan(
            key=key_of(task),
            num_steps=num_examples,
            measure=partial(measure_recall, scorer, task, num_examples, seed, batch_tokens),
        )
        for task in tasks
    ]


def key_of(task: RecallTask | AlgorithmicTask) -> str:
    """The name of a task's cell: length and pairs, or task and length."""
    return f"{task.length}/{task.num_pairs}" if isinstance(task, RecallTask) else f"{task.name}/{task.length}"


def measure_recall(
    scorer: TokenScorer,
    task: RecallTask | AlgorithmicTask,
    num_examples: int,
    seed: int,
    batch_tokens: int,
    advance: Advance,
) -> Cell:
    """Measures accuracy (the value is the likeliest of all tokens) and loss over the questions of `num_examples` sequences.

    Returns:
        Both, and the accuracy's standard error from the spread between sequences.
    """
    rows = max(1, batch_tokens // task.num_tokens)

    def answered(first: int) -> tuple[float, Tensor]:
        count = min(rows, num_examples - first)
        batch = task.sequences(seed, first, count)
        scores = scorer(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets))
        hits = scores.hits.reshape(count, -1)[:, -task.num_judged :]
        return float(scores.losses.cpu().double().mean()) * count, hits.cpu().double().mean(1)

    nats, parts = 0.0, []
    for batch_nats, accuracies in in_turn(answered, range(0, num_examples, rows)):
        nats += batch_nats
        parts.append(accuracies)
        advance(len(accuracies))
    accuracy = torch.cat(parts)
    return {
        "length": task.length,
        **({"pairs": task.num_pairs} if isinstance(task, RecallTask) else {"task": task.name}),
        "examples": num_examples,
        "accuracy": float(accuracy.mean()),
        "standard_error": float(accuracy.std()) / math.sqrt(num_examples) if num_examples > 1 else None,
        "nats_per_answer": nats / num_examples,
    }


def recall_table(cells: Iterable[Cell]) -> ResultTable:
    """A table with a row for each task, the shortest first."""
    return ResultTable(
        ["task", "length", "examples", "accuracy", "± s.e.", "nats per answer"],
        [
            [
                _name(cell),
                f"{cell['length']:,}",
                f"{cell['examples']:,}",
                f"{cell['accuracy']:.2%}",
                "–" if cell["standard_error"] is None else f"{cell['standard_error']:.2%}",
                f"{cell['nats_per_answer']:.4f}",
            ]
            for cell in sorted(cells, key=_place)
        ],
    )


def plot_recall(path: Path, cells: Iterable[Cell]) -> None:
    """Plots the accuracy of every task, with bars of one standard error."""
    cells = sorted(cells, key=_place)
    with picture(path) as axes:
        axes.bar(
            [f"{tick(cell['length'])}\n{_name(cell)}" for cell in cells],
            [cell["accuracy"] for cell in cells],
            yerr=[cell["standard_error"] or 0.0 for cell in cells],
            color=BLUE,
        )
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(False, axis="x")
        axes.set_xlabel("length and task")
        axes.set_ylabel("accuracy")


def _name(cell: Cell) -> str:
    return f"{cell['pairs']:,} pairs" if "pairs" in cell else cell["task"]


def _place(cell: Cell) -> tuple[str, int, int]:
    return cell.get("task", ""), cell["length"], cell.get("pairs", 0)
