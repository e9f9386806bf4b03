"""What a run trains on and is measured by: the rows of both splits, and how they become batches."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from transxssm.data import PackedCollator, build_datasets, build_tokenizer, load_corpus
from transxssm.training.recipe import Recipe

_HASHED_ROWS = 4096  # at once; in whole batches of so many the hash is defined, and reads little memory

Collate = Callable[[Sequence[Any]], dict[str, Tensor]]


@dataclass(frozen=True)
class TrainingData:
    """Rows and what belongs to them.

    Args:
        train, held_out: what `Trainer` takes for a data set.
        collate: rows to a batch: `input_ids` and `labels`, (b, t) int64, and what else a model may take. What the model's
            `forward` does not name is left out.
        held_out_bytes: UTF-8 bytes that the labelled tokens of `held_out` stand for, or None if the data is not text.
        tokenizer: goes into the run folder, and gives the model its vocabulary. Defaults to what the recipe says.
        description: what is trained on and what is held out, in a line.
        contents: by the name of a split, its number of rows and a hash of its tokens, by which a run that is resumed knows its
            data again. Streams and data that a recipe alone determines have no entry.
    """

    train: Dataset
    held_out: Dataset
    collate: Collate
    held_out_bytes: int | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    description: str = ""
    contents: Mapping[str, str] = field(default_factory=dict)


def text_data(recipe: Recipe) -> TrainingData:
    """The packed text that a recipe's data section names.

    Raises:
        ValueError: text or tokenizer that cannot be read.
    """
    corpus = load_corpus(recipe.data)
    tokenizer = build_tokenizer(recipe.data, corpus)
    rows = build_datasets(recipe.data, corpus, tokenizer)
    description = f"{recipe.data.corpus}: {corpus.description}"
    return TrainingData(
        rows.train,
        rows.held_out,
        PackedCollator(tokenizer),
        rows.held_out_bytes,
        tokenizer,
        description,
        {
            name: content_of(split)
            for name, split in (("held out", rows.held_out), ("trained on", rows.train))
            if isinstance(split, datasets.Dataset)
        },
    )


def content_of(rows: datasets.Dataset) -> str:
    """The number of packed rows and a hash of their tokens: the same wherever files lie and whenever they were written."""
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(_HASHED_ROWS):
        tokens = batch.column("input_ids").combine_chunks()
        # A row's length tells where it ends, so that the same tokens in other rows are other rows.
        digest.update(tokens.value_lengths().to_numpy(zero_copy_only=False).tobytes())
        digest.update(tokens.flatten().to_numpy(zero_copy_only=False).tobytes())
    return f"{len(rows):,} rows, sha256 {digest.hexdigest()[:16]}"
