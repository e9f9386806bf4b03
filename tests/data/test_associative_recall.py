"""Associative recall: pairs, then each key once more, with its value as the only thing to be predicted."""

import numpy as np
import pytest

from transxssm.data import RecallTask


@pytest.mark.parametrize(("length", "num_pairs"), [(64, 4), (512, 64), (33, 8)])
def test_the_value_of_each_key_is_asked_for_once(length, num_pairs):
    batch = RecallTask(length, num_pairs).sequences(seed=3, first=0, count=5)
    assert batch.input_ids.shape == batch.targets.shape == (5, length)
    assert batch.input_ids.dtype == batch.targets.dtype == np.int64
    for ids, targets in zip(*batch, strict=True):
        keys, values = ids[0 : 2 * num_pairs : 2], ids[1 : 2 * num_pairs : 2]
        value_of = dict(zip(keys, values, strict=True))
        assert len(value_of) == len(set(values)) == num_pairs
        assert 0 < keys.min() <= keys.max() < 4096 <= values.min() <= values.max() < 8192
        (asked,) = np.nonzero(targets != -100)
        assert asked.min() >= 2 * num_pairs
        assert sorted(ids[asked]) == sorted(keys)
        assert [value_of[key] for key in ids[asked]] == targets[asked].tolist()


def test_a_sequence_depends_on_its_number_alone():
    task = RecallTask(64, 4)
    whole = task.sequences(seed=0, first=0, count=6)
    part = task.sequences(seed=0, first=4, count=2)
    assert np.array_equal(part.input_ids, whole.input_ids[4:])
    assert np.array_equal(part.targets, whole.targets[4:])
    assert not np.array_equal(whole.input_ids[0], whole.input_ids[1])
    assert not np.array_equal(task.sequences(seed=1, first=0, count=1).input_ids[0], whole.input_ids[0])


def test_questions_follow_the_power_law():
    """One question a sequence: place x has probability x^(a − 1) / Σ x^(a − 1)."""
    targets = RecallTask(66, 1, vocab_size=8).sequences(seed=0, first=0, count=4000).targets
    places = (np.nonzero(targets != -100)[1] - 2) // 2
    weights = np.arange(1, 33) ** (0.01 - 1)
    expected = weights / weights.sum()
    counted = np.bincount(places, minlength=32) / 4000
    assert np.abs(counted - expected).max() < 4 * 0.5 / 4000**0.5


def test_what_is_neither_pair_nor_question_is_random():
    batch = RecallTask(512, 4, vocab_size=16).sequences(seed=0, first=0, count=8)
    filler = batch.input_ids[:, 8:][batch.targets[:, 8:] == -100]
    assert np.bincount(filler, minlength=16).min() > 0.5 * len(filler) / 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"length": 15, "num_pairs": 4}, "need at least 16 tokens: got length 15"),
        ({"length": 64, "num_pairs": 0}, "at least 1 pair"),
        ({"length": 64, "num_pairs": 4, "vocab_size": 9}, "a vocabulary of at least 10: got 9"),
        ({"length": 64, "num_pairs": 4, "power": 0.0}, "must be more than 0"),
    ],
    ids=str,
)
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        RecallTask(**arguments)
