"""Multi-query associative recall: accuracy and loss at the questions, over lengths and numbers of pairs."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from transxssm.data import RecallTask
from transxssm.evaluation.processes import in_turn
from transxssm.evaluation.results import Advance, Cell, CellPlan, ResultTable
from transxssm.evaluation.scoring import TokenScorer
from transxssm.plotting import BLUE, picture, tick

# Length and number of pairs as in Zoology.
STANDARD_SIZES = ((64, 4), (128, 8), (256, 16), (512, 64))


def recall_plans(
    scorer: TokenScorer, tasks: Sequence[RecallTask], *, num_examples: int, seed: int, batch_tokens: int
) -> list[CellPlan]:
    """One cell a task.

    Raises:
        ValueError: a vocabulary that the model has no embeddings for.
    """
    for task in tasks:
        if task.vocab_size > scorer.vocab_size:
            raise ValueError(
                f"the task's vocabulary of {task.vocab_size} does not fit the model's of {scorer.vocab_size}: choose a smaller "
                "--vocab-size, that of the training"
            )
    return [
        CellPlan(
            key=f"{task.length}/{task.num_pairs}",
            num_steps=num_examples,
            measure=partial(measure_recall, scorer, task, num_examples, seed, batch_tokens),
        )
        for task in tasks
    ]


def measure_recall(
    scorer: TokenScorer, task: RecallTask, num_examples: int, seed: int, batch_tokens: int, advance: Advance
) -> Cell:
    """Accuracy (the value is the likeliest of all tokens) and loss over the questions of `num_examples` sequences.

    Returns:
        with them the accuracy's standard error, from the spread between sequences.
    """
    rows = max(1, batch_tokens // task.length)

    def answered(first: int) -> tuple[float, Tensor]:
        count = min(rows, num_examples - first)
        batch = task.sequences(seed, first, count)
        scores = scorer(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets))
        accuracies = scores.hits.reshape(count, task.num_pairs).cpu().double().mean(1)  # (count,)
        return float(scores.losses.cpu().double().sum()), accuracies

    nats, parts = 0.0, []
    for batch_nats, accuracies in in_turn(answered, range(0, num_examples, rows)):
        nats += batch_nats
        parts.append(accuracies)
        advance(len(accuracies))
    accuracy = torch.cat(parts)
    return {
        "length": task.length,
        "pairs": task.num_pairs,
        "examples": num_examples,
        "accuracy": float(accuracy.mean()),
        "standard_error": float(accuracy.std()) / math.sqrt(num_examples) if num_examples > 1 else None,
        "nats_per_answer": nats / (num_examples * task.num_pairs),
    }


def recall_table(cells: Iterable[Cell]) -> ResultTable:
    """A row a task, the shortest first."""
    return ResultTable(
        ["length", "pairs", "examples", "accuracy", "± s.e.", "nats per answer"],
        [
            [
                f"{cell['length']:,}",
                f"{cell['pairs']:,}",
                f"{cell['examples']:,}",
                f"{cell['accuracy']:.2%}",
                "–" if cell["standard_error"] is None else f"{cell['standard_error']:.2%}",
                f"{cell['nats_per_answer']:.4f}",
            ]
            for cell in sorted(cells, key=lambda cell: (cell["length"], cell["pairs"]))
        ],
    )


def plot_recall(path: Path, cells: Iterable[Cell]) -> None:
    """Accuracy of every task, with bars of one standard error."""
    cells = sorted(cells, key=lambda cell: (cell["length"], cell["pairs"]))
    with picture(path) as axes:
        axes.bar(
            [f"{tick(cell['length'])}\n{cell['pairs']} pairs" for cell in cells],
            [cell["accuracy"] for cell in cells],
            yerr=[cell["standard_error"] or 0.0 for cell in cells],
            color=BLUE,
        )
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(False, axis="x")
        axes.set_xlabel("length (tokens), pairs of key and value")
        axes.set_ylabel("accuracy")
