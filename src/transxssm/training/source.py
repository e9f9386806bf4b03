"""What a run trains on and is measured by: the rows of both splits, and how they become batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from transxssm.data import PackedCollator, build_datasets, build_tokenizer, load_corpus
from transxssm.training.recipe import Recipe

Collate = Callable[[Sequence[Any]], dict[str, Tensor]]


@dataclass(frozen=True)
class TrainingData:
    """Rows and what belongs to them.

    Args:
        train, held_out: what `Trainer` takes for a data set.
        collate: rows to a batch: `input_ids` and `labels`, (b, t) int64, and what else a model may take. What the model's
            `forward` does not name is left out.
        held_out_bytes: UTF-8 bytes that the labelled tokens of `held_out` stand for; None: they are no text.
        tokenizer: goes into the run folder, and gives the model its vocabulary; None: the recipe gives it.
        description: what is trained on and what is held out, in a line.
    """

    train: Dataset
    held_out: Dataset
    collate: Collate
    held_out_bytes: int | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    description: str = ""


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
        rows.train, rows.held_out, PackedCollator(tokenizer), rows.held_out_bytes, tokenizer, description
    )
