"""Recall scores an oracle 100 %, a random model at chance, and the questions only."""

import math

import pytest
import torch

from tests.apple_gpu import OnAppleGPU
from tests.evaluation.models import Oracle
from tests.models.tiny import tiny_model
from transxssm.data import AlgorithmicTask, RecallTask
from transxssm.evaluation import TokenScorer, key_of, plot_recall, recall_plans, recall_table
from transxssm.evaluation.recall import measure_recall
from transxssm.evaluation.scoring import TokenScores

TASK = RecallTask(64, 8, vocab_size=96)


def measure(model, num_examples=20, batch_tokens=640):
    return measure_recall(TokenScorer(model), TASK, num_examples, 0, batch_tokens, lambda steps: None)


def value_of_key(ids):
    """What followed the last token where it stood first."""
    first = ids.index(ids[-1])
    return ids[first + 1] if first + 1 < len(ids) else None


def test_an_oracle_knows_everything():
    cell = measure(Oracle(96, value_of_key, last=64))
    assert (cell["accuracy"], cell["standard_error"]) == (1.0, 0.0)
    assert cell["nats_per_answer"] < 1e-6


def test_one_that_knows_every_other_key_knows_half():
    cell = measure(Oracle(96, lambda ids: value_of_key(ids) if ids.index(ids[-1]) % 4 == 0 else 0, last=64))
    assert cell["accuracy"] == 0.5
    assert cell["nats_per_answer"] == pytest.approx(15.0, abs=1e-3)


def test_a_random_model_is_at_chance():
    model = tiny_model(vocab_size=96, initializer_range=0.02)
    cell = measure(model, num_examples=100)
    chance, num_answers = 1 / 96, 800
    assert abs(cell["accuracy"] - chance) < 4 * math.sqrt(chance / num_answers)
    assert cell["nats_per_answer"] == pytest.approx(math.log(96), abs=0.05)


def test_batches_change_nothing():
    model = tiny_model(vocab_size=96)
    one, many = measure(model, batch_tokens=1), measure(model, batch_tokens=10_000)
    assert one["accuracy"] == many["accuracy"]
    assert one["nats_per_answer"] == pytest.approx(many["nats_per_answer"], abs=1e-9)


def test_plans_and_table():
    tasks = [TASK, RecallTask(16, 2, vocab_size=96)]
    plans = recall_plans(TokenScorer(tiny_model(vocab_size=96)), tasks, num_examples=3, seed=0, batch_tokens=64)
    assert [(plan.key, plan.num_steps) for plan in plans] == [("64/8", 3), ("16/2", 3)]
    steps: list[int] = []
    table = recall_table([plan.measure(steps.append) for plan in plans])
    assert sum(steps) == 6
    assert [row[:3] for row in table.rows] == [["2 pairs", "16", "3"], ["8 pairs", "64", "3"]]


def test_a_vocabulary_that_the_model_has_not():
    with pytest.raises(ValueError, match="vocabulary of 98 does not fit the model's of 97"):
        recall_plans(
            TokenScorer(tiny_model()), [RecallTask(16, 2, vocab_size=98)], num_examples=1, seed=0, batch_tokens=1
        )


def parity_so_far(ids):
    return sum(ids[1:]) % 2


def test_the_last_state_is_what_counts():
    """An oracle that loses count after 20 of 40 elements knows the state at 20, and half of those at 40."""
    for length, least, most in ((20, 1.0, 1.0), (40, 0.3, 0.7)):
        task = AlgorithmicTask("parity", length)
        oracle = Oracle(3, lambda ids: parity_so_far(ids[:21]), last=length + 2)
        cell = measure_recall(TokenScorer(oracle), task, 100, 0, 1000, lambda steps: None)
        assert least <= cell["accuracy"] <= most
        assert (cell["task"], cell["length"]) == ("parity", length)


def test_all_copied_letters_count():
    task = AlgorithmicTask("copying", 10)
    oracle = Oracle(27, lambda ids: ids[len(ids) - ids.index(26) - 1] if 26 in ids else 0, last=21)
    cell = measure_recall(TokenScorer(oracle), task, 20, 0, 100, lambda steps: None)
    assert cell["accuracy"] == 1.0
    assert key_of(task) == "copying/10"


def test_a_model_of_another_task_is_refused():
    with pytest.raises(ValueError, match="vocabulary of 121 does not fit the model's of 97: choose the task"):
        recall_plans(TokenScorer(tiny_model()), [AlgorithmicTask("s5", 2)], num_examples=1, seed=0, batch_tokens=1)


def test_scores_that_cannot_be_float64_where_they_are(monkeypatch):
    """On an Apple GPU."""
    model = tiny_model(vocab_size=96, dtype=torch.float32)
    expected, score = measure(model), TokenScorer.__call__
    monkeypatch.setattr(
        TokenScorer, "__call__", lambda *given: TokenScores(*(t.as_subclass(OnAppleGPU) for t in score(*given)))
    )
    assert measure(model) == expected


RECALL = [
    {"length": 64, "pairs": 8, "accuracy": 0.25, "standard_error": None},
    {"length": 64, "pairs": 4, "accuracy": 0.5, "standard_error": 0.1},
]


def test_recall_has_a_bar_a_task(drawn):
    axes = drawn(plot_recall, RECALL)
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0.25]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64\n4 pairs", "64\n8 pairs"]


def test_a_picture_of_recall_is_a_png(tmp_path):
    plot_recall(tmp_path / "picture.png", RECALL)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
