"""What a report says of a contender, out of runs whose figures are known."""

import dataclasses

import pytest

from transxssm_lab.studies import contenders_of, plan_of
from transxssm_lab.studies.outcome import Outcome
from transxssm_lab.studies.report import Evidence, _contender_report

# Held-out losses by seed and rate. The second seed alone would choose 0.001; the mean would, too.
LOSSES = {(0, 1e-3): 3.1, (0, 1e-2): 3.0, (1, 1e-2): 3.6}


def outcome(loss, evaluations=((16, 4.0), (32, 3.5))):
    summary = {"eval_loss": loss, "perplexity": 20.0, "train_seconds": 8.0, "train_tokens": 64, "parameters": 1000}
    rows = [{"step": 2 * index, "tokens": 16 * index, "train_seconds": 2.0 * index, "loss": 5.0} for index in (1, 2, 4)]
    rows += [{"step": tokens // 8, "tokens": tokens, "eval_loss": value} for tokens, value in evaluations]
    return Outcome(summary, [*rows, {"step": 8, "tokens": 64, "eval_loss": loss}])


@pytest.fixture
def sweep(study):
    """The miniature with two rates and two seeds; `repeat` is `grid.repeat_rates`."""

    def load(repeat):
        grid = {"seeds": [0, 1], "learning_rates": [1e-3, 1e-2], "repeat_rates": repeat}
        return study(tuning=None, grid=grid, cells={"hybrid": {}})

    return load


def report_of(study, outcomes):
    """Of the only contender, with an outcome for each seed and rate."""
    (contender,) = contenders_of(study)
    run = plan_of(study, [contender]).full[0]
    full = [
        (dataclasses.replace(run, seed=seed, learning_rate=rate), one) for (seed, rate), one in sorted(outcomes.items())
    ]
    return _contender_report(study, Evidence(contender, {}, full, {run.folder: {} for run, _ in full}))


def test_the_first_seed_chooses_the_rate_where_it_alone_tries_them_all(sweep):
    report = report_of(sweep("best"), {key: outcome(loss) for key, loss in LOSSES.items()})
    assert report["learning_rate"] == 1e-2
    assert report["mean"]["eval_loss"] == pytest.approx(3.3)
    assert {(run["seed"], run["learning_rate"]): run["eval_loss"] for run in report["runs"]} == LOSSES
    assert report["status"] == "finished"


def test_the_mean_over_seeds_chooses_it_where_all_try_them(sweep):
    losses = LOSSES | {(1, 1e-3): 3.2}
    report = report_of(sweep("all"), {key: outcome(loss) for key, loss in losses.items()})
    assert report["learning_rate"] == 1e-3
    assert report["mean"]["eval_loss"] == pytest.approx(3.15)


def test_a_rate_at_the_edge_of_those_tried_is_said_to_be(sweep, study):
    outcomes = {key: outcome(loss) for key, loss in LOSSES.items()}
    assert report_of(sweep("best"), outcomes)["rate_is_at_edge"]
    grid = {"seeds": [0], "learning_rates": [1e-3, 1e-2, 1e-1]}
    inside = {(0, 1e-3): outcome(3.2), (0, 1e-2): outcome(3.0), (0, 1e-1): outcome(3.3)}
    assert not report_of(study(tuning=None, grid=grid, cells={"hybrid": {}}), inside)["rate_is_at_edge"]
    only = {(0, 1e-2): outcome(3.0)}
    alone = study(tuning=None, grid=grid | {"learning_rates": [1e-2]}, cells={"hybrid": {}})
    assert not report_of(alone, only)["rate_is_at_edge"]


def test_held_out_losses_are_averaged_where_every_run_was_evaluated(sweep):
    """A run may have been evaluated at its end alone."""
    outcomes = {key: outcome(loss) for key, loss in LOSSES.items()} | {(1, 1e-2): outcome(3.6, evaluations=[(16, 4.4)])}
    held_out = report_of(sweep("best"), outcomes)["held_out"]
    assert [point["tokens"] for point in held_out] == [16, 64]
    assert [point["loss"] for point in held_out] == pytest.approx([4.2, 3.3])
    assert [point["seconds"] for point in held_out] == pytest.approx([2.0, 8.0])
