import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from transxssm.training import estimate
from transxssm.training.callbacks import LastStep, MetricsFile, ProgressDisplay, rows_of

LOG = {"loss": 2.5, "tokens_per_second": 1000.0, "num_input_tokens_seen": 100}
EVALUATION = {"eval_loss": 2.0, "eval_perplexity": 7.39, "eval_bits_per_byte": 1.5, "num_input_tokens_seen": 100}


def state_at(step, history=(), max_steps=20):
    return TrainerState(
        global_step=step, max_steps=max_steps, log_history=list(history), num_input_tokens_seen=100 * step
    )


def test_loss_and_evaluation_of_a_step_share_a_row():
    history = [{**LOG, "step": 1}, {**LOG, "step": 2}, {**EVALUATION, "step": 2}, {"train_runtime": 3.0, "step": 2}]
    assert [(row["step"], "loss" in row, "eval_loss" in row) for row in rows_of(history)] == [
        (1, True, False),
        (2, True, True),
    ]


def test_metrics_are_on_the_disk_before_the_next_step(tmp_path):
    metrics, control = MetricsFile(tmp_path / "metrics.jsonl"), TrainerControl()
    metrics.on_train_begin(None, state_at(0), control)
    metrics.on_step_begin(None, state_at(1, [{**LOG, "step": 1}]), control)
    assert len(metrics.path.read_text().splitlines()) == 1
    metrics.on_step_begin(None, state_at(1, [{**LOG, "step": 1}]), control)
    assert len(metrics.path.read_text().splitlines()) == 1


def test_resuming_drops_rows_of_steps_to_be_repeated(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')  # cut off in the middle of a line
    metrics.on_train_begin(None, state_at(2, [{**LOG, "step": 1}, {**LOG, "step": 2}]), TrainerControl())
    assert len(metrics.path.read_text().splitlines()) == 2


def test_other_processes_write_no_metrics(tmp_path):
    metrics, state = MetricsFile(tmp_path / "metrics.jsonl"), state_at(1, [{**LOG, "step": 1}])
    state.is_world_process_zero = False
    metrics.on_train_begin(None, state, TrainerControl())
    metrics.on_step_begin(None, state, TrainerControl())
    assert not metrics.path.exists()


def test_every_checkpoint_ends_a_stretch_of_the_log(tmp_path):
    control = TrainerControl(should_save=True)
    MetricsFile(tmp_path / "metrics.jsonl").on_step_end(None, state_at(5), control)
    assert control.should_log


def test_the_last_step_is_logged_and_evaluated():
    control = TrainerControl()
    LastStep().on_step_end(None, state_at(19), control)
    assert not control.should_log
    assert not control.should_evaluate
    LastStep().on_step_end(None, state_at(20), control)
    assert control.should_log
    assert control.should_evaluate


@pytest.fixture
def clock(monkeypatch):
    """The time that `estimate` sees: a list of one number of seconds, to be moved on."""
    now = [0.0]
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now[0])
    return now


ARGUMENTS = SimpleNamespace(eval_strategy="steps")


def run_through(display, clock, seconds_of, *, steps=100, eval_every=25, evaluation=30.0, log_every=1):
    """Drives a display through a run; what remains at each logged step, by the clock."""
    control, ends = TrainerControl(), []
    state = state_at(0, max_steps=steps)
    state.eval_steps = state.save_steps = eval_every
    display.on_train_begin(ARGUMENTS, state, control)
    for step in range(1, steps + 1):
        clock[0] += seconds_of(step)
        state.global_step = step
        control.should_evaluate = step % eval_every == 0
        display.on_step_end(ARGUMENTS, state, control)
        if step % log_every == 0:
            ends.append(clock[0])
            display.on_log(ARGUMENTS, state, control, logs=LOG)
        if control.should_evaluate:
            clock[0] += evaluation
            display.on_log(ARGUMENTS, state, control, logs=EVALUATION)
            display.on_evaluate(ARGUMENTS, state, control)
            clock[0] += 1.0
            display.on_save(ARGUMENTS, state, control)
    display.on_train_end(ARGUMENTS, state, control)
    return [clock[0] - end for end in ends]


def seconds_in(text):
    hours, minutes, seconds = (int(part) for part in text.split(":"))
    return 3600 * hours + 60 * minutes + seconds


@pytest.mark.parametrize("first", [2.0, 200.0], ids=["warm", "compiles"])
def test_the_time_left_is_right_from_its_first_showing(clock, first):
    stream = io.StringIO()
    display = ProgressDisplay(Console(file=stream, force_terminal=False, width=200))
    display.introduce([], evaluation_in_steps=15, quicker=lambda step: "", is_estimated=True)
    left = run_through(display, clock, lambda step: {1: first, 2: first / 4}.get(step, 2.0))
    shown = [re.search(r"([\d:]+) left", line) for line in stream.getvalue().splitlines() if "held-out" not in line]
    assert [match is None for match in shown[:5]] == [True, True, True, True, False]
    for match, true in list(zip(shown, left, strict=True))[4:]:
        assert seconds_in(match.group(1)) == pytest.approx(true, rel=0.05, abs=5)


def test_a_run_that_turns_out_to_be_long_says_so_once_and_what_is_quicker(clock):
    stream = io.StringIO()
    display = ProgressDisplay(Console(file=stream, force_terminal=False, width=200))
    quicker = "training.max_steps={:.0f}".format
    display.introduce(["one line"], evaluation_in_steps=0, quicker=quicker, is_estimated=False)
    run_through(display, clock, lambda step: 60.0, evaluation=60.0)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "one line"
    assert [line for line in lines if "about" in line] == [
        "about 95 minutes on this machine: 95 steps of 60 s. Quicker: training.max_steps=60"
    ]


def show(display):
    control = TrainerControl()
    display.on_train_begin(ARGUMENTS, state_at(0), control)
    display.on_step_end(ARGUMENTS, state_at(5), control)
    display.on_log(ARGUMENTS, state_at(5), control, logs=LOG)
    display.on_log(ARGUMENTS, state_at(5), control, logs=EVALUATION)
    display.on_train_end(ARGUMENTS, state_at(5), control)


def test_without_a_terminal_progress_is_a_line_per_logged_step():
    stream = io.StringIO()
    show(ProgressDisplay(Console(file=stream, force_terminal=False, width=200)))
    assert stream.getvalue().splitlines() == [
        "step 5/20  loss 2.5000  1,000 tokens/s",  # how long a step takes is not known yet
        "step 5/20  held-out loss 2.0000  perplexity 7.39  bits per byte 1.5000",
    ]


def test_on_a_terminal_progress_is_a_bar_with_loss_and_speed():
    stream = io.StringIO()
    display = ProgressDisplay(Console(file=stream, force_terminal=True, highlight=False, width=120))
    show(display)
    output = stream.getvalue()
    for part in ("5/20", "loss 2.5000", "1,000 tokens/s", "left", "held-out loss 2.0000"):
        assert part in output
    assert display.bar is None
