"""How a run ended: what counts as divergence, and the curve of its held-out loss over time."""

import json
import math

import pytest

from transxssm_lab.studies.outcome import Outcome, read_outcome, write_divergence


def row(step, **values):
    return {"step": step, "tokens": 100 * step, **values}


@pytest.mark.parametrize(
    ("eval_loss", "diverged"), [(3.0, False), (5.1, False), (5.6, True), (math.nan, True), (math.inf, True)], ids=str
)
def test_a_loss_that_ends_well_above_its_beginning_has_diverged(eval_loss, diverged):
    outcome = Outcome({"eval_loss": eval_loss}, [row(1, loss=5.0), row(2, loss=4.9)])
    assert outcome.has_diverged == diverged
    assert outcome.eval_loss == (math.inf if diverged else eval_loss)


@pytest.mark.parametrize(("lowest", "eval_loss", "diverged"), [(3.0, 3.9, False), (3.0, 4.1, True), (4.6, 5.0, False)])
def test_a_run_that_loses_half_of_what_it_had_gained_has_diverged(lowest, eval_loss, diverged):
    rows = [row(1, loss=5.0), row(2, loss=lowest), row(3, loss=5.0)]
    assert Outcome({"eval_loss": eval_loss}, rows).has_diverged == diverged


def test_evaluations_between_two_lines_of_the_log_get_the_time_between():
    rows = [
        row(1, loss=5.0, train_seconds=2.0),
        row(2, eval_loss=4.5),
        row(3, loss=4.0, train_seconds=6.0, eval_loss=4.1),
    ]
    assert Outcome({"eval_loss": 4.1}, rows).held_out_curve() == [(200, 4.0, 4.5), (300, 6.0, 4.1)]


def test_an_unfinished_run_has_no_outcome(tmp_path):
    assert read_outcome(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(7, loss=5.0)) + "\n")
    assert read_outcome(tmp_path) is None
    write_divergence(tmp_path, "step 8 is not finite")
    outcome = read_outcome(tmp_path)
    assert outcome.has_diverged
    assert outcome.last_step == 7
