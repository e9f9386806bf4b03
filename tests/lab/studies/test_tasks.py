"""Needles as training data: labels on the answers alone, lengths in turn, and the same held-out ones for every run."""

import numpy as np
import pytest
import torch

from transxssm.data import Haystack, RecallTask
from transxssm.training import recipe_of
from transxssm_lab.studies.definition import Needle, Recall
from transxssm_lab.studies.tasks import NeedleBatches, TaskBatches, needle_data, task_data

LENGTHS = [160, 224]

TASKS = [RecallTask(16, 2, 64), RecallTask(32, 4, 64)]


@pytest.fixture
def recipe(corpus, tmp_path):
    def with_seed(seed: int):
        data = {"corpus": str(corpus), "tokenizer": "bytes", "held_out_fraction": 0.25, "cache_dir": str(tmp_path)}
        return recipe_of("needle", {"data": data, "training": {"max_steps": 3, "seed": seed, "use_cpu": True}})

    return with_seed


def test_the_labels_are_the_answers(recipe):
    needle = Needle(train_lengths=LENGTHS, lengths=[160], tokens_per_step=448, held_out_steps=2)
    data = needle_data(needle, recipe(0))
    for index, (rows, length) in enumerate([(2, 160), (2, 224), (2, 160)]):
        batch = data.train[index]
        assert batch["input_ids"].shape == batch["labels"].shape == (rows, length)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            answered = labels != -100
            np.testing.assert_array_equal(ids[answered], labels[answered])
            answer = data.tokenizer.decode(labels[answered])
            assert answer[0] == " "
            assert len(answer) == 6
            assert int(answer) >= 10000
            prompt = data.tokenizer.decode(ids[: np.flatnonzero(answered)[0]])
            assert prompt.count(answer.strip()) == 1  # in the needle, which says it once
            assert not ids[np.flatnonzero(answered)[-1] + 1 :].any()


def test_a_text_may_hold_many_needles_and_ask_for_each(recipe):
    needle = Needle(
        train_lengths=[160, 640], lengths=[160], tokens_per_step=640, tokens_per_needle=160, held_out_steps=2
    )
    data = needle_data(needle, recipe(0))
    for index, num_needles in [(0, 1), (1, 4)]:
        batch = data.train[index]
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            answers = data.tokenizer.decode(labels[labels != -100]).split()
            assert len(answers) == num_needles
            text = data.tokenizer.decode(ids)
            assert all(text.count(answer) == 2 for answer in answers)  # in the needle and behind its question


def test_the_held_out_needles_are_the_same_for_every_run_and_in_none(recipe):
    needle = Needle(train_lengths=LENGTHS, lengths=[160], tokens_per_step=448, held_out_steps=2)
    of_seed = [needle_data(needle, recipe(seed)) for seed in (0, 1)]
    held_out = [data.held_out[0]["input_ids"] for data in of_seed]
    np.testing.assert_array_equal(*held_out)
    trained = [data.train[0]["input_ids"] for data in of_seed]
    assert not np.array_equal(*trained)
    assert not np.array_equal(trained[0], held_out[0])


def test_depths_are_spread(recipe):
    needle = Needle(train_lengths=[512], lengths=[512], tokens_per_step=512 * 32, held_out_steps=1)
    data = needle_data(needle, recipe(0))
    assert isinstance(data.train, NeedleBatches)
    assert isinstance(data.train.haystack, Haystack)
    batch = data.train[0]
    places = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        answer = data.tokenizer.decode(labels[labels != -100]).strip()
        places.append(data.tokenizer.decode(ids).index(answer) / 512)
    assert min(places) < 0.25
    assert max(places) > 0.6


def test_the_shifted_label_is_the_target():
    batch = TaskBatches(TASKS, tokens=64, count=4, seed=3)[1]
    task = TASKS[1].sequences(3, 0, 2)
    np.testing.assert_array_equal(batch["input_ids"], task.input_ids)
    np.testing.assert_array_equal(batch["labels"][:, 1:], task.targets[:, :-1])
    assert (task.targets[:, -1] == -100).all()  # nothing is lost by the shift
    assert (batch["labels"] != -100).sum() == 2 * 4


def test_tasks_take_turns_over_equally_many_tokens():
    batches = TaskBatches(TASKS, tokens=64, count=4, seed=3)
    assert [batches[index]["input_ids"].shape for index in range(4)] == [(4, 16), (2, 32), (4, 16), (2, 32)]
    assert not np.array_equal(batches[0]["input_ids"], batches[2]["input_ids"])


def test_the_held_out_sequences_are_the_same_for_every_run_and_in_none():
    recall = Recall(sizes=[[16, 2]], vocab_size=64, tokens_per_step=64, held_out_steps=2)
    of_seed = [
        task_data(recall, recipe_of("recall", {"training": {"max_steps": 3, "seed": seed, "use_cpu": True}}))
        for seed in (0, 1)
    ]
    held_out = [np.stack([data.held_out[index]["input_ids"] for index in range(2)]) for data in of_seed]
    np.testing.assert_array_equal(*held_out)
    trained = [np.stack([data.train[index]["input_ids"] for index in range(2)]) for data in of_seed]
    assert not np.array_equal(*trained)
    assert not np.array_equal(trained[0], held_out[0])
    batch = of_seed[0].collate([of_seed[0].train[0]])
    assert batch["labels"].dtype == torch.int64
