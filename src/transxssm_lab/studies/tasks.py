"""The tasks on which a study trains in place of text (recall, algorithmic tasks, needles), and its evaluations besides the held-out loss.

An item of a data set is a whole batch. Tasks or lengths alternate.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from transxssm.data import AlgorithmicTask, Haystack, RecallTask, build_tokenizer, load_corpus
from transxssm.data.packing import IGNORED_LABEL
from transxssm.evaluation import (
    CellPlan,
    Decoding,
    Results,
    TokenScorer,
    judge_for,
    key_of,
    needle_plans,
    perplexity_plans,
    recall_plans,
    select_documents,
)
from transxssm.models import (
    TransXSSMConfig,
    TransXSSMForCausalLM,
    load_causal_lm,
    load_tokenizer,
    read_config,
    read_device,
)
from transxssm.training import Recipe, TrainingData
from transxssm_lab.studies.definition import Algorithmic, Needle, Recall, Study

# Seeds of sequences. Training adds the run's own seed to its seed, so that it reads no sequence of the held-out loss or the evaluation.
HELD_OUT_SEED, MEASURED_SEED, TRAINING_SEED = 0, 1, 2


HAYSTACK_PROMPTS = 64  # at least so many of the longest prompts fit into the text before it repeats

MEASURES = ("perplexity", "recall", "algorithmic", "needle")  # sections of a study, which has at most one of them
BATCH_TOKENS = 16384
# Keys of a recipe's model section that are not fields of a configuration.
_NO_FIELDS = ("preset", "architecture")


class TaskBatches(Dataset):
    """Batches with equal numbers of tokens, which are generated on access.

    Args:
        tasks: each batch is of one task, in turn.
        tokens: tokens in a batch, which has as many sequences as fit, and at least one.
        count: number of batches.
        seed: seed of the sequences.
    """

    def __init__(self, tasks: Sequence[RecallTask | AlgorithmicTask], tokens: int, count: int, seed: int) -> None:
        self.tasks, self.tokens, self.count, self.seed = tasks, tokens, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Batch number `index`: `input_ids` and `labels`, (b, t) int64. Labels are one place to the right, since models shift them back."""
        task = self.tasks[index % len(self.tasks)]
        rows = max(1, self.tokens // task.num_tokens)
        batch = task.sequences(self.seed, index // len(self.tasks) * rows, rows)
        # No question is at the last position, since a question of recall takes two tokens.
        labels = np.pad(batch.targets[:, :-1], ((0, 0), (1, 0)), constant_values=IGNORED_LABEL)
        return {"input_ids": batch.input_ids, "labels": labels}


def trained_tasks(section: Recall | Algorithmic) -> Sequence[RecallTask | AlgorithmicTask]:
    """The tasks that a study trains on.

    Raises:
        ValueError: a task has too many pairs for its length or the vocabulary, or is unknown.
    """
    if isinstance(section, Algorithmic):
        return [AlgorithmicTask(section.task, length) for length in section.train_elements]
    return [RecallTask(length, num_pairs, section.vocab_size) for length, num_pairs in section.sizes]


def measured_tasks(section: Recall | Algorithmic) -> Sequence[RecallTask | AlgorithmicTask]:
    """The tasks on which a study measures its models. In recall they are those of training."""
    if isinstance(section, Algorithmic):
        return [AlgorithmicTask(section.task, length) for length in section.lengths]
    return trained_tasks(section)


def task_data(section: Recall | Algorithmic, recipe: Recipe) -> TrainingData:
    """New sequences for every step of a run, and the held-out ones, which all runs share."""
    batches = partial(TaskBatches, trained_tasks(section), section.tokens_per_step)
    steps = recipe.training["max_steps"] * recipe.training.get("gradient_accumulation_steps", 1)
    return TrainingData(
        train=batches(count=steps, seed=TRAINING_SEED + recipe.training["seed"]),
        held_out=batches(count=section.held_out_steps, seed=HELD_OUT_SEED),
        collate=only_batch,
    )


def only_batch(items: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """The tensors of a batch that is one item."""
    (batch,) = items
    return {name: torch.from_numpy(array) for name, array in batch.items()}


class NeedleBatches(Dataset):
    """Batches with about equal numbers of tokens, which are generated on access. Only the answers have labels.

    Args:
        haystack: the text around the needles.
        lengths: largest numbers of tokens in an example. Each batch has one of them, in turn.
        tokens: tokens in a batch, which has as many examples as fit, and at least one.
        tokens_per_needle: a text holds one needle for every so many tokens, and a question for each, or one needle if None.
        count: number of batches.
        seed: seed of the examples.
    """

    def __init__(
        self,
        haystack: Haystack,
        lengths: list[int],
        tokens: int,
        tokens_per_needle: int | None,
        count: int,
        seed: int,
    ) -> None:
        self.haystack, self.lengths, self.tokens, self.count, self.seed = haystack, lengths, tokens, count, seed
        self.tokens_per_needle = tokens_per_needle

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Batch number `index`: `input_ids` and `labels`, (b, t) int64. Shorter examples are padded on the right.

        A label is at the place of its own token, since models shift labels.
        """
        length = self.lengths[index % len(self.lengths)]
        rows = max(1, self.tokens // length)
        input_ids = np.zeros((rows, length), dtype=np.int64)
        labels = np.full((rows, length), IGNORED_LABEL, dtype=np.int64)
        depths = np.random.default_rng((self.seed, index)).random(rows)
        num_needles = 1 if self.tokens_per_needle is None else max(1, length // self.tokens_per_needle)
        for row, depth in enumerate(depths):
            lesson = self.haystack.lesson(
                length=length, depth=depth, seed=self.seed, number=index * rows + row, num_needles=num_needles
            )
            ids = np.array(lesson.input_ids)
            input_ids[row, : len(ids)] = ids
            labels[row, : len(ids)] = np.where(lesson.is_answer, ids, IGNORED_LABEL)
        return {"input_ids": input_ids, "labels": labels}


def needle_data(needle: Needle, recipe: Recipe) -> TrainingData:
    """Needles in the training text for every step of a run, and held-out needles in held-out text, which all runs share.

    Raises:
        ValueError: text or tokenizer cannot be read, or a length is too short for a needle and its question.
    """
    corpus = load_corpus(recipe.data)
    tokenizer = build_tokenizer(recipe.data, corpus)
    held_out = haystack_of(needle, corpus.held_out["text"], tokenizer)
    shortest, fewest = min(*needle.train_lengths, *needle.lengths), held_out.fewest_tokens()
    if shortest < fewest:
        raise ValueError(
            f"a needle and its question may need {fewest} tokens: got length {shortest}; ask for a longer one"
        )
    steps = recipe.training["max_steps"] * recipe.training.get("gradient_accumulation_steps", 1)

    def batches(haystack: Haystack, count: int, seed: int) -> NeedleBatches:
        return NeedleBatches(
            haystack, needle.train_lengths, needle.tokens_per_step, needle.tokens_per_needle, count, seed
        )

    return TrainingData(
        train=batches(
            haystack_of(needle, corpus.train["text"], tokenizer), steps, TRAINING_SEED + recipe.training["seed"]
        ),
        held_out=batches(held_out, needle.held_out_steps, HELD_OUT_SEED),
        collate=only_batch,
        tokenizer=tokenizer,
    )


def haystack_of(needle: Needle, texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Haystack:
    """Text for the needles of a study, long enough for prompts to differ."""
    return Haystack(texts, tokenizer, max_tokens=HAYSTACK_PROMPTS * max(*needle.train_lengths, *needle.lengths))


def evaluate_run(
    study: Study, run_dir: Path, recipe: Recipe, path: Path, overrides: dict[str, Any] | None
) -> dict[str, Any]:
    """Evaluates the model in a run folder as the study says. Existing measurements are kept.

    Args:
        study: a study, whose `perplexity`, `recall`, `algorithmic` and `needle` sections say what is measured.
        run_dir: folder of the trained model.
        recipe: recipe of the run, which names its text.
        path: path of the JSON file.
        overrides: model keys with which the weights are loaded. None for those of training.

    Returns:
        The cells: by length, by task as "length/pairs" or "task/length", or by place as "length/depth".

    Raises:
        ValueError: no held-out document is as long as the longest window.
    """
    name = next((name for name in MEASURES if getattr(study, name) is not None), None)
    if name is None:
        return {}
    results = Results.open(path, name, {name: study.settings()[name], "model": overrides}, {})
    if wanted_cells(study) <= results.cells.keys():
        return results.cells
    model = _load(run_dir, overrides)
    reads_text = study.recall is None and study.algorithmic is None
    plans = _plans(study, TokenScorer(model), recipe, load_tokenizer(run_dir, model.config) if reads_text else None)
    results.measure(plans, advance=lambda steps: None, finished=lambda key: None)
    return results.cells


def wanted_cells(study: Study) -> set[str]:
    """Keys of the cells that the study measures."""
    if (section := study.recall or study.algorithmic) is not None:
        return set(map(key_of, measured_tasks(section)))
    if study.needle is not None:
        return {f"{length}/{depth:g}" for length in study.needle.lengths for depth in study.needle.depths}
    return set(map(str, study.perplexity.lengths)) if study.perplexity else set()


def _plans(
    study: Study, scorer: TokenScorer, recipe: Recipe, tokenizer: PreTrainedTokenizerFast | None
) -> list[CellPlan]:
    if (section := study.recall or study.algorithmic) is not None:
        return recall_plans(
            scorer,
            measured_tasks(section),
            num_examples=section.num_examples,
            seed=MEASURED_SEED,
            batch_tokens=BATCH_TOKENS,
        )
    assert tokenizer is not None
    texts = load_corpus(recipe.data).held_out["text"]
    if study.needle is not None:
        haystack = haystack_of(study.needle, texts, tokenizer)
        return needle_plans(
            judge_for(Decoding.TEACHER_FORCED, scorer, haystack),
            haystack,
            lengths=study.needle.lengths,
            depths=study.needle.depths,
            num_examples=study.needle.num_examples,
            num_distractors=0,
            seed=MEASURED_SEED,
        )
    assert study.perplexity is not None
    lengths = study.perplexity.lengths
    documents = select_documents(texts, tokenizer, min_tokens=max(lengths), max_tokens=study.perplexity.max_tokens)
    strides = {length: length // 2 for length in lengths}
    return perplexity_plans(scorer, documents, strides=strides, batch_tokens=BATCH_TOKENS)


def _load(run_dir: Path, overrides: dict[str, Any] | None) -> PreTrainedModel:
    device = read_device("auto")
    if overrides is None:
        return load_causal_lm(run_dir, dtype=None, device=device)
    fields = {name: value for name, value in overrides.items() if name not in _NO_FIELDS}
    trained = {
        name: value for name, value in read_config(run_dir).to_dict().items() if name in TransXSSMConfig.__annotations__
    }
    config = TransXSSMConfig(**{**trained, **fields})
    return TransXSSMForCausalLM.from_pretrained(run_dir, config=config, dtype=torch.float32).to(device).eval()
