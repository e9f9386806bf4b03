"""Recall as training data: labels that models shift back to the questions, and sequences that no two splits share."""

import numpy as np
import torch

from transxssm.data import RecallTask
from transxssm.training import recipe_of
from transxssm_lab.studies.definition import Recall
from transxssm_lab.studies.recall_data import RecallBatches, recall_data

TASKS = [RecallTask(16, 2, 64), RecallTask(32, 4, 64)]


def test_the_shifted_label_is_the_target():
    batch = RecallBatches(TASKS, tokens=64, count=4, seed=3)[1]
    task = TASKS[1].sequences(3, 0, 2)
    np.testing.assert_array_equal(batch["input_ids"], task.input_ids)
    np.testing.assert_array_equal(batch["labels"][:, 1:], task.targets[:, :-1])
    assert (task.targets[:, -1] == -100).all()  # nothing is lost by the shift
    assert (batch["labels"] != -100).sum() == 2 * 4


def test_tasks_take_turns_over_equally_many_tokens():
    batches = RecallBatches(TASKS, tokens=64, count=4, seed=3)
    assert [batches[index]["input_ids"].shape for index in range(4)] == [(4, 16), (2, 32), (4, 16), (2, 32)]
    assert not np.array_equal(batches[0]["input_ids"], batches[2]["input_ids"])


def test_the_held_out_sequences_are_the_same_for_every_run_and_in_none():
    recall = Recall(sizes=[[16, 2]], vocab_size=64, tokens_per_step=64, held_out_steps=2)
    of_seed = [
        recall_data(recall, recipe_of("recall", {"training": {"max_steps": 3, "seed": seed, "use_cpu": True}}))
        for seed in (0, 1)
    ]
    held_out = [np.stack([data.held_out[index]["input_ids"] for index in range(2)]) for data in of_seed]
    np.testing.assert_array_equal(*held_out)
    trained = [np.stack([data.train[index]["input_ids"] for index in range(2)]) for data in of_seed]
    assert not np.array_equal(*trained)
    assert not np.array_equal(trained[0], held_out[0])
    batch = of_seed[0].collate([of_seed[0].train[0]])
    assert batch["labels"].dtype == torch.int64
