"""Needles in haystacks to train on: a data set whose items are whole batches, the lengths taking turns."""

from collections.abc import Iterable

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from transxssm.data import Haystack, build_tokenizer, load_corpus
from transxssm.data.labels import IGNORED_LABEL
from transxssm.training import Recipe, TrainingData
from transxssm_lab.studies.definition import Needle
from transxssm_lab.studies.recall_data import HELD_OUT_SEED, TRAINING_SEED, only_batch

HAYSTACK_PROMPTS = 64  # as many of the longest prompts fit into the text, or more, before it begins anew


class NeedleBatches(Dataset):
    """Batches of about equally many tokens, generated when they are asked for; only the answers have labels.

    Args:
        haystack: the text around the needles.
        lengths: tokens of an example at most, one a batch, in turn.
        tokens: of a batch: as many examples as fit, at least one.
        tokens_per_needle: a text holds a needle for so many tokens, and a question for each; None: one.
        count: of batches.
        seed: of the examples.
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
        """Batch number `index`: `input_ids` and `labels`, (b, t) int64, shorter examples filled up on the right.

        A label stands at its own token, as models shift it.
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
    """Needles in the training text for every step of a run, and held-out ones in held-out text, which all runs share.

    Raises:
        ValueError: text or tokenizer that cannot be read; a length too short for a needle and its question.
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
    """Text for the needles of a study, enough of it that prompts differ."""
    return Haystack(texts, tokenizer, max_tokens=HAYSTACK_PROMPTS * max(*needle.train_lengths, *needle.lengths))
