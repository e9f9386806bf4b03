"""Contenders: cells at every size, and the recipe of each of their runs. All share data, batches and schedule."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from transxssm.models.baselines import count_baseline_parameters
from transxssm.training import Recipe, recipe_of
from transxssm.training.loop import VOCABULARY_MULTIPLE
from transxssm_lab.benchmarking.flops import step_flops
from transxssm_lab.studies.definition import Study, nearest

# What a run of a study does otherwise than a run alone: many folders, none of which is watched.
RUN_DEFAULTS = {"report_to": "none", "save_total_limit": 1}
BYTES_VOCABULARY = 320  # of data.tokenizer=bytes, padded as the training loop does


@dataclass(frozen=True)
class Contender:
    """A cell at a size.

    Args:
        name: of its folder and its row in the tables.
        cell, size: what it was made of; no size where the study has none.
        model, training: sections of its recipes.
        weights_of: the contender whose weights it evaluates; None: it is trained.
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
    """Every contender of a study, checked, in the order of its cells, the sizes one after the other.

    Args:
        study: from `load_study`.
        only: cells, or contenders, to take; empty: all.

    Raises:
        ValueError: an unknown name in `only`; a model or training settings that cannot be.
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
            raise ValueError(f"no cell {name!r} in study {study.name}: {nearest(name, known)}")
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
        study, contender: of the run.
        folder: of the run.
        seed: of weights and data order.
        learning_rate: None: that of the training section.
        max_steps: of a short run, which is evaluated at its end only; None: a whole one.

    Raises:
        ValueError: settings that cannot be.
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
    if study.task is not None:  # one item of the data set is a whole batch
        training |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
        data = {**data, "sequence_length": max(study.task.train_lengths)}
    if study.recall is not None:
        model = {**model, "vocab_size": study.recall.vocab_size}
        data = {"corpus": "associative-recall", "sequence_length": data["sequence_length"]}
    return recipe_of(study.name, {"model": model, "data": data, "training": training})


def expected_config(study: Study, contender: Contender) -> PreTrainedConfig:
    """The model's configuration, its vocabulary as large as the tokenizer is thought to be.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    recipe = recipe_for(study, contender, Path(), seed=0, learning_rate=None, max_steps=None)
    defaults: dict[str, Any] = {}
    if recipe.data.tokenizer == "bytes":
        defaults["vocab_size"] = BYTES_VOCABULARY
    elif recipe.data.tokenizer == "bpe":
        defaults["vocab_size"] = -(-recipe.data.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return recipe.language_model_config(**defaults)


def tokens_per_step(study: Study, contender: Contender) -> int:
    """Tokens that a step of the optimiser reads, on one process."""
    training = contender.training
    accumulated = training.get("gradient_accumulation_steps", 1)
    if study.task is not None:
        return accumulated * study.task.tokens_per_step
    return accumulated * training.get("per_device_train_batch_size", 8) * sequence_length(study)


def sequence_length(study: Study) -> int:
    """Tokens in a row; of several lengths the mean."""
    if study.task is not None:
        return sum(study.task.train_lengths) // len(study.task.train_lengths)
    return study.data.get("sequence_length", 1024)


def size_of(config: PreTrainedConfig, length: int) -> tuple[int, float]:
    """Parameters, and FLOPs of training per token in rows of `length` tokens."""
    return count_baseline_parameters(config), step_flops(config, "train", length, 1).total / length


def _name(cell: str, size: str | None) -> str:
    return cell if size is None else f"{cell}-{size}"
