"""Runs a study: tunes, trains and evaluates. Every run has its own folder, so that nothing is done twice."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from transxssm.training import (
    BudgetSpentError,
    NonFiniteError,
    Recipe,
    TrainingData,
    run_folder,
    stopped_at,
    text_data,
    train,
)
from transxssm.whole_files import write_text_whole
from transxssm_lab.studies.definition import Study
from transxssm_lab.studies.outcome import Outcome, read_outcome, write_divergence
from transxssm_lab.studies.report import Evidence, best_rate, write_report
from transxssm_lab.studies.schedule import Contender, PlannedRun, Schedule, contenders_of, duration, plan_of, recipe_for
from transxssm_lab.studies.tasks import evaluate_run, needle_data, task_data

STUDY = "study.json"
# The part of a budget that is kept for the last checkpoint and the report: seconds, and its largest share.
SECONDS_TO_REPORT, SHARE_TO_REPORT = 10.0, 0.1
# Called with the progress: a text, and the share of the planned time that is done.
Notify = Callable[[str, float], object]


def run_study(
    study: Study,
    *,
    only: Sequence[str] = (),
    budget_minutes: float | None = None,
    notify: Notify = lambda what, done: None,
    started: float | None = None,
) -> dict[str, Any]:
    """Runs what has not been run yet, and writes the report of all runs.

    Args:
        study: a study from `load_study`.
        only: cells or contenders to run. The report includes all that have ever been run.
        budget_minutes: wall time. A run that it interrupts is resumed by the next call.
        notify: called when a run begins and after steps.
        started: when the budget began, in `time.monotonic`'s seconds. Defaults to now.

    Returns:
        The report, as in results.json.

    Raises:
        ValueError: see `contenders_of`; or the folder holds another study, or data cannot be read.
        KeyboardInterrupt: after Ctrl-C. What was done is kept and reported.
    """
    chosen = contenders_of(study, only)
    schedule = plan_of(study, chosen)
    if budget_minutes is not None and budget_minutes <= 0:
        raise ValueError(f"the budget must be more than 0 minutes: got {budget_minutes}")
    _note_study(study)
    deadline = None
    if budget_minutes is not None:
        began, seconds = time.monotonic() if started is None else started, 60 * budget_minutes
        deadline = began + seconds - min(SECONDS_TO_REPORT, SHARE_TO_REPORT * seconds)
    work = _Work(study, schedule, deadline, notify)
    status = "complete"
    try:
        work.run(chosen)
    except BudgetSpentError:
        left = duration(work.seconds_left())
        status = (
            f"the budget of {budget_minutes:g} minutes is spent; the rest takes about {left}, evaluation not counted"
        )
    except KeyboardInterrupt:
        write_report(study, collect_evidence(study), "interrupted")
        raise
    return write_report(study, collect_evidence(study), status)


def report_study(study: Study) -> dict[str, Any]:
    """Writes the report of the runs in the study's folder, for instance after its process was killed.

    Returns:
        The report, as in results.json.

    Raises:
        ValueError: the folder holds no study, or another one.
    """
    if not (study.output_dir / STUDY).is_file():
        raise ValueError(f"{study.output_dir} holds no study (no {STUDY}): run it first, or name its grid.output_dir")
    _noted_study(study)
    return write_report(study, collect_evidence(study), "complete")


def collect_evidence(study: Study) -> list[Evidence]:
    """The evidence in the study's folder for every contender, including those that were not requested this time."""
    contenders = contenders_of(study)
    schedule = plan_of(study, contenders)
    evidence = []
    for contender in contenders:
        source = contender.name if contender.weights_of is None else contender.weights_of
        tuning = {
            run.learning_rate: outcome
            for run in schedule.tuning
            if run.contender.name == source and (outcome := read_outcome(study.output_dir / run.folder)) is not None
        }
        full: list[tuple[PlannedRun, Outcome]] = []
        for planned in schedule.full:
            if planned.contender.name != source:
                continue
            run = _with_rate(study, planned, full)
            if run is not None and (outcome := read_outcome(study.output_dir / run.folder)) is not None:
                full.append((run, outcome))
        measured = {run.folder: _measured(_evaluation_path(study, contender, run)) for run, _ in full}
        evidence.append(Evidence(contender, tuning, full, measured))
    return evidence


class _Work:
    """Makes the runs of a schedule one after the other, until a deadline.

    Args:
        study, schedule: the study and its runs.
        deadline: in `time.monotonic`'s seconds, or None for no deadline.
        notify: see `run_study`.
    """

    def __init__(self, study: Study, schedule: Schedule, deadline: float | None, notify: Notify) -> None:
        self.study, self.schedule, self.deadline, self.notify = study, schedule, deadline, notify
        self.done_seconds = 0.0  # planned seconds of the runs that are finished
        self.reached_seconds = 0.0  # planned seconds of the steps made in the current run
        self.made_seconds = self.took_seconds = 0.0  # planned and measured seconds of the steps made in this call

    def seconds_left(self) -> float:
        """Estimates the seconds for the remaining runs: the plan, scaled by the measured pace if steps were made in this call."""
        pace = self.took_seconds / self.made_seconds if self.made_seconds else 1.0
        return pace * max(self.schedule.seconds - self.done_seconds - self.reached_seconds, 0.0)

    def run(self, contenders: Sequence[Contender]) -> None:
        tuned: dict[str, dict[float | None, Outcome]] = {}
        for short in self.schedule.tuning:
            outcome = self._one(short, short.learning_rate)
            tuned.setdefault(short.contender.name, {})[short.learning_rate] = outcome
        whole: dict[str, list[tuple[PlannedRun, Outcome]]] = {}
        for planned in self.schedule.full:
            name = planned.contender.name
            run = _with_rate(self.study, planned, whole.setdefault(name, []))
            rate = None if run is None else run.learning_rate
            if self.schedule.tuning:
                rate = best_rate(tuned[name])
            if run is None or (self.schedule.tuning and rate is None):  # all of them diverged, which is the result
                self.done_seconds += planned.seconds
                continue
            outcome = self._one(run, rate)
            whole[name].append((run, outcome))
            if not outcome.has_diverged:
                self._evaluate(run, rate, contenders)

    def _one(self, run: PlannedRun, learning_rate: float | None) -> Outcome:
        folder = self.study.output_dir / run.folder
        label = f"{run.contender.name}, {run.phase}, seed {run.seed}"
        label += "" if learning_rate is None else f", rate {learning_rate:g}"
        self._tell(label, 0.0)
        outcome = read_outcome(folder)
        if outcome is None:
            outcome = self._train(run, folder, learning_rate, label)
        self.done_seconds += run.seconds
        self.reached_seconds = 0.0
        return outcome

    def _train(self, run: PlannedRun, folder: Path, learning_rate: float | None, label: str) -> Outcome:
        recipe = self._recipe(run, learning_rate)
        try:
            train(
                recipe,
                resume=run_folder.holds_run(folder),
                source=self._source,
                display=_Steps(lambda step, seconds: self._step(label, run, step, seconds)),
                budget_seconds=self._budget_left(),
            )
        except NonFiniteError as error:
            write_divergence(folder, str(error))
        outcome = read_outcome(folder)
        assert outcome is not None
        return outcome

    def _evaluate(self, run: PlannedRun, learning_rate: float | None, contenders: Sequence[Contender]) -> None:
        """Evaluates the run's model, and its weights again for each cell that uses them."""
        folder = self.study.output_dir / run.folder
        for contender in contenders:
            if run.contender.name in (contender.name, contender.weights_of):
                self._tell(f"{contender.name}, evaluation, seed {run.seed}", 0.0)
                path = _evaluation_path(self.study, contender, run)
                overrides = None if contender.weights_of is None else contender.model
                with stopped_at(self.deadline):
                    evaluate_run(self.study, folder, self._recipe(run, learning_rate), path, overrides)

    def _recipe(self, run: PlannedRun, learning_rate: float | None) -> Recipe:
        return recipe_for(
            self.study,
            run.contender,
            self.study.output_dir / run.folder,
            seed=run.seed,
            learning_rate=learning_rate,
            max_steps=run.steps if run.phase == "tuning" else None,
        )

    def _source(self, recipe: Recipe) -> TrainingData:
        if (section := self.study.recall or self.study.algorithmic) is not None:
            return task_data(section, recipe)
        return text_data(recipe) if self.study.needle is None else needle_data(self.study.needle, recipe)

    def _step(self, label: str, run: PlannedRun, step: int, seconds: float) -> None:
        self.made_seconds += run.seconds / run.steps
        self.took_seconds += seconds
        self.reached_seconds = run.seconds * step / run.steps
        self._tell(
            f"{label} · step {step}/{run.steps} · about {duration(self.seconds_left())} left", self.reached_seconds
        )

    def _budget_left(self) -> float | None:
        if self.deadline is None:
            return None
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise BudgetSpentError("nothing more was begun")
        return left

    def _tell(self, what: str, reached_seconds: float) -> None:
        self.reached_seconds = reached_seconds
        self.notify(what, (self.done_seconds + reached_seconds) / max(self.schedule.seconds, 1e-9))


def _with_rate(study: Study, run: PlannedRun, whole: Sequence[tuple[PlannedRun, Outcome]]) -> PlannedRun | None:
    """A full run, with the first seed's best rate if it needs that. None if some of that seed's runs are unfinished, or all diverged."""
    if study.grid.repeat_rates == "all" or run.seed == study.grid.seeds[0]:
        return run
    first = {other.learning_rate: outcome for other, outcome in whole if other.seed == study.grid.seeds[0]}
    rate = best_rate(first) if len(first) == len(study.grid.learning_rates) else None
    return None if rate is None else dataclasses.replace(run, learning_rate=rate)


class _Steps(TrainerCallback):
    """Reports the number of each step, and the seconds since the step before, including everything in between."""

    def __init__(self, tell: Callable[[int, float], object]) -> None:
        self.tell = tell
        self.last = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        before, self.last = self.last, time.monotonic()
        self.tell(state.global_step, self.last - before)


def _evaluation_path(study: Study, contender: Contender, run: PlannedRun) -> Path:
    run_dir = study.output_dir / run.folder
    return run_dir.parent / f"{run_dir.name}-{contender.cell}.json"


def _measured(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else {}


def _note_study(study: Study) -> None:
    """Records the study's settings in its folder.

    Raises:
        ValueError: see `_noted_study`.
    """
    noted, settings = _noted_study(study), _plain_settings(study)
    if noted != settings:
        study.output_dir.mkdir(parents=True, exist_ok=True)
        write_text_whole(study.output_dir / STUDY, json.dumps(settings, indent=2) + "\n")


def _noted_study(study: Study) -> dict[str, Any] | None:
    """The settings of the runs in the folder: the study's, without seeds and cells that were added. None if there is no run yet.

    Raises:
        ValueError: the folder holds another study. The message names the keys that differ.
    """
    folder, path = study.output_dir, study.output_dir / STUDY
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not path.is_file():
        raise ValueError(f"{folder} holds something other than a study (no {STUDY}): choose another grid.output_dir")
    if not path.is_file() or not any(entry.is_dir() for entry in folder.iterdir()):  # no run has begun
        return None
    noted = json.loads(path.read_text(encoding="utf-8"))
    differing = list(_differences("", noted, _without_additions(_plain_settings(study), noted)))
    if differing:
        raise ValueError(
            f"{folder} holds the study under other settings: {'; '.join(differing)}. Choose another grid.output_dir"
        )
    return noted


def _plain_settings(study: Study) -> dict[str, Any]:
    """The study's settings, as they are after a round trip through JSON."""
    return json.loads(json.dumps(study.settings()))


def _without_additions(settings: dict[str, Any], noted: dict[str, Any]) -> dict[str, Any]:
    """The settings without seeds and cells that were added to the recorded ones, if the recorded ones come first."""
    seeds, cells = noted["grid"]["seeds"], noted["cells"]
    kept = dict(settings, cells={name: cell for name, cell in settings["cells"].items() if name in cells})
    if settings["grid"]["seeds"][: len(seeds)] == seeds:
        kept["grid"] = dict(settings["grid"], seeds=seeds)
    return kept


def _differences(where: str, before: Any, now: Any) -> Any:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _differences(f"{where}.{key}" if where else key, before.get(key), now.get(key))
    elif before != now:
        yield f"{where} was {before!r} and is {now!r}"
