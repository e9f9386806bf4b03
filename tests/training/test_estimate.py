"""How long a run takes, before it begins."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState, TrainingArguments

from transxssm.models import TransXSSMForCausalLM
from transxssm.training import estimate, train
from transxssm.training.estimate import evaluations_left, in_words, measured_step_seconds, number_of_steps


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("row_seconds", "batch_seconds", "expected"),
    [(0.1, 0.3, 0.6), (3.0, None, 48.0)],
    ids=["a batch is measured", "a row is"],
)
def test_a_step_is_measured_without_its_first_batch(tmp_path, clock, row_seconds, batch_seconds, expected):
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, gradient_accumulation_steps=2, use_cpu=True, report_to="none"
    )
    weight = torch.nn.Parameter(torch.ones(1))
    calls = []

    def loss_of(batch):
        calls.append(len(batch["input_ids"]))
        clock[0] += 100.0 if len(calls) == 1 else row_seconds if calls[-1] == 1 else batch_seconds
        return (weight * batch["input_ids"]).sum()

    model = torch.nn.Module()
    model.weight = weight
    seconds = measured_step_seconds(model, arguments, lambda count: {"input_ids": torch.ones(count, 4)}, loss_of)
    assert seconds == pytest.approx(expected)
    assert max(calls) == (8 if batch_seconds else 1)


def test_measuring_leaves_weights_gradients_and_random_numbers_alone(recipe):
    arguments, config = recipe().training_arguments(), recipe().model_config(vocab_size=320)
    model = TransXSSMForCausalLM(config).eval()
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ids = torch.ones(1, 16, dtype=torch.long)
    seconds = measured_step_seconds(
        model,
        arguments,
        lambda count: {"input_ids": ids.repeat(count, 1), "labels": ids.repeat(count, 1)},
        lambda batch: model(**batch).loss + torch.rand(()) * 0,
    )
    assert seconds > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize(
    ("step", "last", "every", "expected"),
    [(0, 100, 25, 4), (25, 100, 25, 3), (0, 10, 3, 4), (9, 10, 3, 1), (10, 10, 3, 0)],
)
def test_evaluations_that_are_left(step, last, every, expected):
    state = TrainerState(global_step=step, max_steps=last, eval_steps=every)
    assert evaluations_left(SimpleNamespace(eval_strategy="steps"), state) == expected


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"num_train_epochs": 3}, 39),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 2}, 6),
    ],
)
def test_the_number_of_steps(tmp_path, settings, steps):
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, use_cpu=True, report_to="none", **settings
    )
    assert number_of_steps(arguments, range(100)) == steps


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 second"),
        (40, "40 seconds"),
        (540, "9 minutes"),
        (5400, "90 minutes"),
        (105_000, "29 hours"),
        (500_000, "6 days"),
    ],
)
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words


def test_before_a_run_of_hours_one_line_says_so_and_what_is_quicker(recipe, monkeypatch, capsys):
    """Of the recipe `small` on two cores, 29 hours were known only after 200 seconds."""
    monkeypatch.setattr("transxssm.training.loop.measured_step_seconds", lambda *_, **__: 26.0)
    with monkeypatch.context() as patch:
        patch.setattr("transxssm.training.loop._run", lambda *_: (_ for _ in ()).throw(ValueError("enough")))
        patch.setattr("transxssm.training.callbacks.ProgressDisplay.introduce", _print_lines)
        with pytest.raises(ValueError, match="enough"):
            train(recipe("training.max_steps=4000"))
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.match(
        r"about 3\d hours on this machine: 4,000 steps of 26 s\. Quicker: transxssm train laptop data\.corpus=", line
    )
    assert line.endswith("(minutes), training.max_steps=138 (an hour), or a GPU")


def _print_lines(self, lines, **_):
    print(*lines, sep="\n")  # noqa: T201
