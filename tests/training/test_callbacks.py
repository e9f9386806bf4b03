import io

from rich.console import Console
from transformers import TrainerControl, TrainerState

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


def show(display):
    control = TrainerControl()
    display.on_train_begin(None, state_at(0), control)
    display.on_step_end(None, state_at(5), control)
    display.on_log(None, state_at(5), control, logs=LOG)
    display.on_log(None, state_at(5), control, logs=EVALUATION)
    display.on_train_end(None, state_at(5), control)


def test_without_a_terminal_progress_is_a_line_per_logged_step():
    stream = io.StringIO()
    show(ProgressDisplay(console=Console(file=stream, force_terminal=False, width=200)))
    assert stream.getvalue().splitlines() == [
        "step 5/20  loss 2.5000  1,000 tokens/s  0:00:01 left",  # 15 steps of 100 tokens
        "step 5/20  held-out loss 2.0000  perplexity 7.39  bits per byte 1.5000",
    ]


def test_on_a_terminal_progress_is_a_bar_with_loss_and_speed():
    stream = io.StringIO()
    display = ProgressDisplay(console=Console(file=stream, force_terminal=True, highlight=False, width=120))
    show(display)
    output = stream.getvalue()
    for part in ("5/20", "loss 2.5000", "1,000 tokens/s", "left", "held-out loss 2.0000"):
        assert part in output
    assert display.bar is None
