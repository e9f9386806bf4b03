"""The contenders of a study, their runs in the order in which they are made, and how long each may take."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig

from transxssm.data import AlgorithmicTask
from transxssm.inspection.costs import step_flops
from transxssm.models.baselines import count_baseline_parameters
from transxssm.training import Recipe, recipe_of
from transxssm.training.loop import VOCABULARY_MULTIPLE
from transxssm_lab.studies.definition import Study, meant

# Defaults of a study's runs that differ from those of a single run: no reports to dashboards, and only the latest checkpoint.
RUN_DEFAULTS = {"report_to": "none", "save_total_limit": 1}
BYTES_VOCABULARY = 320  # vocabulary size under data.tokenizer=bytes, padded as by the training loop


@dataclass(frozen=True)
class Contender:
    """A cell at a size.

    Args:
        name: name of its folder and of its row in the tables.
        cell, size: the cell and the size of which it is made. The size is None if the study has none.
        model, training: sections of its recipes.
        weights_of: the contender whose weights it evaluates, or None if it is trained itself.
        slowdown: see `Cell`.
    """

    name: str
    cell: str
    size: str | None
    model: dict[str, Any]
    training: dict[str, Any]
    weights_of: str | None
    slowdown: float


def contenders_of(study: Study, only: Sequence[str] = ()) -> list[Contender]:
    """The checked contenders of a study, size by size, in the order of the cells.

    Args:
        study: a study from `load_study`.
        only: names of cells or contenders. Defaults to all.

    Raises:
        ValueError: a name in `only` is unknown, or model or training settings are invalid.
    """
    found = [
        Contender(
            name=_name(cell_name, size_name),
            cell=cell_name,
            size=size_name,
            model={**study.model, **(size.model if size else {}), **cell.model},
            training={**study.training, **(size.training if size else {})},
            weights_of=None if cell.weights_of is None else _name(cell.weights_of, size_name),
            slowdown=cell.slowdown,
        )
        for size_name, size in study.sizes.items() or [(None, None)]
        for cell_name, cell in study.cells.items()
    ]
    known = list(dict.fromkeys(name for contender in found for name in (contender.cell, contender.name)))
    for name in only:
        if name not in known:
            raise ValueError(f"no cell {name!r} in study {study.name}: {meant(name, known)}")
    chosen = [contender for contender in found if not only or {contender.cell, contender.name} & set(only)]
    names = {contender.name for contender in chosen}
    for contender in chosen:
        if contender.weights_of is not None and contender.weights_of not in names:
            raise ValueError(f"{contender.name} evaluates the weights of {contender.weights_of}: name that cell too")
        expected_config(study, contender)
    return chosen


def recipe_for(
    study: Study, contender: Contender, folder: Path, *, seed: int, learning_rate: float | None, max_steps: int | None
) -> Recipe:
    """The recipe of one run.

    Args:
        study, contender: the study and the contender of the run.
        folder: folder of the run.
        seed: seed of weights and data order.
        learning_rate: Defaults to that of the training section.
        max_steps: number of steps of a short run, which is evaluated only at its end. Defaults to a full run.

    Raises:
        ValueError: the settings are invalid.
    """
    training = {**RUN_DEFAULTS, **contender.training, "seed": seed, "data_seed": seed, "output_dir": str(folder)}
    if learning_rate is not None:
        training["learning_rate"] = learning_rate
    if max_steps is not None:
        training |= {"max_steps": max_steps, "eval_strategy": "no", "save_strategy": "no"}
    if training.get("max_steps", -1) < 1:
        raise ValueError(
            f"training.max_steps: got {training.get('max_steps')}, expected at least 1: a study's runs all take so many"
        )
    model, data = contender.model, study.data
    if study.task is not None:  # each item of the data set is a whole batch
        training |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
        data = {**data, "sequence_length": max(study.task.train_lengths)}
    if study.recall is not None:
        model = {**model, "vocab_size": study.recall.vocab_size}
        data = {"corpus": "associative-recall", "sequence_length": data["sequence_length"]}
    if study.algorithmic is not None:
        task = AlgorithmicTask(study.algorithmic.task, 1)
        model = {**model, "vocab_size": task.vocab_size}
        data = {"corpus": task.name, "sequence_length": data["sequence_length"]}
    return recipe_of(study.name, {"model": model, "data": data, "training": training})


def expected_config(study: Study, contender: Contender) -> PreTrainedConfig:
    """The model's configuration, with the expected size of the tokenizer's vocabulary.

    Raises:
        ValueError: sizes do not fit each other.
    """
    recipe = recipe_for(study, contender, Path(), seed=0, learning_rate=None, max_steps=None)
    defaults: dict[str, Any] = {}
    if recipe.data.tokenizer == "bytes":
        defaults["vocab_size"] = BYTES_VOCABULARY
    elif recipe.data.tokenizer == "bpe":
        defaults["vocab_size"] = -(-recipe.data.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return recipe.language_model_config(**defaults)


def tokens_per_step(study: Study, contender: Contender) -> int:
    """Tokens in an optimizer step on one process."""
    training = contender.training
    accumulated = training.get("gradient_accumulation_steps", 1)
    if study.task is not None:
        return accumulated * study.task.tokens_per_step
    return accumulated * training.get("per_device_train_batch_size", 8) * sequence_length(study)


def sequence_length(study: Study) -> int:
    """Tokens in a row: the mean, if there are several lengths."""
    if study.task is not None:
        return sum(study.task.train_lengths) // len(study.task.train_lengths)
    return study.data.get("sequence_length", 1024)


def size_of(config: PreTrainedConfig, length: int) -> tuple[int, float]:
    """Parameters, and FLOPs of training per token in rows of `length` tokens."""
    return count_baseline_parameters(config), step_flops(config, "train", length, 1).total / length


def _name(cell: str, size: str | None) -> str:
    return cell if size is None else f"{cell}-{size}"


@dataclass(frozen=True)
class PlannedRun:
    """One training run.

    Args:
        contender: the contender that is trained.
        phase: "tuning" for a short run that compares learning rates, "full" for a full run.
        seed: seed of weights and data order.
        learning_rate: the rate, or None for the one that tuning or the first seed's full runs will find, or else that of the training
            section.
        steps, tokens: steps and tokens of the run.
        seconds: expected time of the run.
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
        """The folder of the run, below that of the study."""
        rate = "" if self.learning_rate is None else f"lr-{self.learning_rate:g}-"
        phase = "tuning-" if self.phase == "tuning" else ""
        return Path(self.contender.name) / f"{phase}{rate}seed-{self.seed}"


@dataclass(frozen=True)
class Schedule:
    """The runs: all that tune, then the full ones, by seed and rate, so that runs are comparable if the budget ends early."""

    tuning: list[PlannedRun]
    full: list[PlannedRun]

    @property
    def runs(self) -> list[PlannedRun]:
        """All runs, in order."""
        return [*self.tuning, *self.full]

    @property
    def seconds(self) -> float:
        """The expected time of all runs."""
        return sum(run.seconds for run in self.runs)


def duration(seconds: float) -> str:
    """Formats seconds, such as "1 h 05 min"."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"


def plan_of(study: Study, contenders: Sequence[Contender]) -> Schedule:
    """Plans the runs of these contenders, and estimates their time from FLOPs and `grid.flops_per_second`.

    The estimate leaves out evaluation and the preparation of data.
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
