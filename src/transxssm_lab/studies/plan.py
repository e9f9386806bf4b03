"""The runs of a study in the order in which they are made, and how long each may take."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transxssm_lab.studies.contenders import Contender, expected_config, sequence_length, size_of, tokens_per_step
from transxssm_lab.studies.definition import Study


@dataclass(frozen=True)
class PlannedRun:
    """One training run.

    Args:
        contender: what is trained.
        phase: "tuning" is a short run that compares learning rates, "full" a whole one.
        seed: of weights and data order.
        learning_rate: None: the one that tuning, or the first seed's whole runs, will find, or that of the training section.
        steps, tokens: that the run takes.
        seconds: that it is thought to take.
    """

    contender: Contender
    phase: Literal["tuning", "full"]
    seed: int
    learning_rate: float | None
    steps: int
    tokens: int
    seconds: float

    @property
    def folder(self) -> Path:
        """Of the run, below that of the study."""
        rate = "" if self.learning_rate is None else f"lr-{self.learning_rate:g}-"
        phase = "tuning-" if self.phase == "tuning" else ""
        return Path(self.contender.name) / f"{phase}{rate}seed-{self.seed}"


@dataclass(frozen=True)
class Schedule:
    """The runs: first all that tune, then the whole ones, a seed and a rate at a time: a budget that ends early leaves comparable ones."""

    tuning: list[PlannedRun]
    full: list[PlannedRun]

    @property
    def runs(self) -> list[PlannedRun]:
        """All of them, in order."""
        return [*self.tuning, *self.full]

    @property
    def seconds(self) -> float:
        """That all of them are thought to take."""
        return sum(run.seconds for run in self.runs)


def duration(seconds: float) -> str:
    """Such as "1 h 05 min"."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"


def plan_of(study: Study, contenders: Sequence[Contender]) -> Schedule:
    """The runs of these contenders, and an estimate of their time out of FLOPs and `grid.flops_per_second`.

    Evaluation and the preparation of data are not in the estimate.
    """
    trained = [contender for contender in contenders if contender.weights_of is None]
    speed = {contender.name: _tokens_per_second(study, contender) for contender in trained}

    def planned(
        contender: Contender, phase: Literal["tuning", "full"], seed: int, rate: float | None, steps: int
    ) -> PlannedRun:
        tokens = steps * tokens_per_step(study, contender)
        return PlannedRun(contender, phase, seed, rate, steps, tokens, tokens / speed[contender.name])

    tuning = study.tuning
    whole_rates: list[float | None] = [*study.grid.learning_rates] or [None]
    repeated: list[float | None] = [None] if study.grid.repeat_rates == "best" else whole_rates
    return Schedule(
        tuning=[
            planned(contender, "tuning", tuning.seed, rate, tuning.max_steps)
            for contender in trained
            for rate in tuning.learning_rates
        ]
        if tuning
        else [],
        full=[
            planned(contender, "full", seed, rate, contender.training["max_steps"])
            for seed in study.grid.seeds
            for rate in (whole_rates if seed == study.grid.seeds[0] else repeated)
            for contender in trained
        ],
    )


def _tokens_per_second(study: Study, contender: Contender) -> float:
    _, flops_per_token = size_of(expected_config(study, contender), sequence_length(study))
    return study.grid.flops_per_second / flops_per_token / contender.slowdown
