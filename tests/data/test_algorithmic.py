"""State tracking and copying: every answer follows from the tokens, and what is judged stands at the end."""

import itertools

import numpy as np
import pytest

from transxssm.data import ALGORITHMIC_TASKS, AlgorithmicTask
from transxssm.data.packing import IGNORED_LABEL


@pytest.mark.parametrize(("name", "order"), [("parity", 2), ("modular-3", 3), ("modular-5", 5)])
def test_sums(name, order):
    batch = AlgorithmicTask(name, 17).sequences(seed=1, first=0, count=4)
    assert batch.input_ids.shape == batch.targets.shape == (4, 19)
    assert (batch.input_ids[:, 0] == order).all()  # what begins
    elements = batch.input_ids[:, 1:-1]
    assert set(elements.flatten()) == set(range(order))
    np.testing.assert_array_equal(batch.targets[:, 1:-1], elements.cumsum(1) % order)
    assert (batch.targets[:, [0, -1]] == IGNORED_LABEL).all()


@pytest.mark.parametrize(("name", "size"), [("s3", 3), ("s5", 5)])
def test_permutations(name, size):
    """Moves things about one permutation after the other."""
    task = AlgorithmicTask(name, 12)
    permutations = list(itertools.permutations(range(size)))
    assert task.vocab_size == len(permutations) + 1
    batch = task.sequences(seed=1, first=0, count=3)
    for ids, targets in zip(batch.input_ids, batch.targets, strict=True):
        things = tuple(range(size))
        for element, answer in zip(ids[1:-1], targets[1:-1], strict=True):
            things = tuple(permutations[element][thing] for thing in things)
            assert permutations[answer] == things


def test_the_order_of_permutations_counts():
    products = AlgorithmicTask("s3", 1)._products
    assert (products != products.T).any()


def test_copying():
    task = AlgorithmicTask("copying", 9)
    batch = task.sequences(seed=1, first=0, count=3)
    assert batch.input_ids.shape == (3, task.num_tokens) == (3, 19)
    assert (batch.input_ids[:, 9] == 26).all()
    np.testing.assert_array_equal(batch.targets[:, 9:-1], batch.input_ids[:, :9])
    np.testing.assert_array_equal(batch.input_ids[:, 10:], batch.input_ids[:, :9])
    assert (batch.targets != IGNORED_LABEL).sum() == 3 * task.num_judged


@pytest.mark.parametrize("name", ALGORITHMIC_TASKS)
def test_a_sequence_depends_on_seed_and_number_alone(name):
    task = AlgorithmicTask(name, 8)
    all_at_once = task.sequences(seed=5, first=0, count=6)
    later = task.sequences(seed=5, first=4, count=2)
    np.testing.assert_array_equal(all_at_once.input_ids[4:], later.input_ids)
    np.testing.assert_array_equal(all_at_once.targets[4:], later.targets)
    assert (task.sequences(seed=6, first=0, count=6).input_ids != all_at_once.input_ids).any()
    assert all_at_once.input_ids.max() < task.vocab_size


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("s4", 3, "unknown task 's4': expected one of parity"),
        ("parity", 0, "at least 1 element or letter: got length 0"),
    ],
)
def test_refuses(name, length, message):
    with pytest.raises(ValueError, match=message):
        AlgorithmicTask(name, length)
