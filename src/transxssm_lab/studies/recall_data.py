"""Associative recall to train on: a data set whose items are whole batches, the tasks taking turns."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from transxssm.data import RecallTask
from transxssm.data.labels import IGNORED_LABEL
from transxssm.training import Recipe, TrainingData
from transxssm_lab.studies.definition import Recall

# Seeds of sequences: training adds the run's own seed, so that neither the held-out ones nor the last ones occur in it.
HELD_OUT_SEED, MEASURED_SEED, TRAINING_SEED = 0, 1, 2


class RecallBatches(Dataset):
    """Batches of equally many tokens, generated when they are asked for.

    Args:
        tasks: one a batch, in turn.
        tokens: of a batch: as many sequences as fit, at least one.
        count: of batches.
        seed: of the sequences.
    """

    def __init__(self, tasks: Sequence[RecallTask], tokens: int, count: int, seed: int) -> None:
        self.tasks, self.tokens, self.count, self.seed = tasks, tokens, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Batch number `index`: `input_ids` and `labels`, (b, t) int64; a label stands one to the right, as models shift it back."""
        task = self.tasks[index % len(self.tasks)]
        rows = max(1, self.tokens // task.length)
        batch = task.sequences(self.seed, index // len(self.tasks) * rows, rows)
        # The last position asks for nothing: a question's place is two tokens wide.
        labels = np.pad(batch.targets[:, :-1], ((0, 0), (1, 0)), constant_values=IGNORED_LABEL)
        return {"input_ids": batch.input_ids, "labels": labels}


def tasks_of(recall: Recall) -> list[RecallTask]:
    """The tasks of a study.

    Raises:
        ValueError: too many pairs for a length or the vocabulary.
    """
    return [RecallTask(length, num_pairs, recall.vocab_size) for length, num_pairs in recall.sizes]


def recall_data(recall: Recall, recipe: Recipe) -> TrainingData:
    """Sequences for every step of a run, new ones each time, and the held-out ones, which all runs share."""
    tasks = tasks_of(recall)
    batches = partial(RecallBatches, tasks, recall.tokens_per_step)
    steps = recipe.training["max_steps"] * recipe.training.get("gradient_accumulation_steps", 1)
    return TrainingData(
        train=batches(count=steps, seed=TRAINING_SEED + recipe.training["seed"]),
        held_out=batches(count=recall.held_out_steps, seed=HELD_OUT_SEED),
        collate=only_batch,
    )


def only_batch(items: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """The tensors of a batch that is one item."""
    (batch,) = items
    return {name: torch.from_numpy(array) for name, array in batch.items()}
