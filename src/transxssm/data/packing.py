"""Packs documents into rows of one length, which are cached as int32 columns with their document boundaries, and makes batches.

A document is `[bos] + tokens + [eos]`. Rows are full: if a row ends inside a document, the next row continues it and repeats the last
token as context, so that every token except bos is predicted exactly once.

Letters: b batch, t time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from transxssm.data.arguments import DataArguments
from transxssm.data.cache import fingerprint, generated_dataset
from transxssm.data.chat import said, tokenize_conversations
from transxssm.data.corpus import Corpus
from transxssm.data.progress import progress
from transxssm.data.tokenizer import document_bounds, tokenizer_identity

ROW_FEATURES = Features({"input_ids": List(Value("int32")), "seq_idx": List(Value("int32"))})
_TOKEN_FEATURES = Features({"input_ids": List(Value("int32"))})
_TARGETS = {"is_target": List(Value("bool"))}  # for conversations
# Tokenizers need about a hundred bytes for each token of a batch, which small batches limit for long documents.
_TOKENIZER_BATCH_DOCUMENTS = 64
_TOKENIZER_BATCH_CHARACTERS = 2**21
_READ_BATCH_DOCUMENTS = 256
_SHUFFLE_BUFFER_DOCUMENTS = 10_000

IGNORED_LABEL = -100


@dataclass(frozen=True)
class PackedDatasets:
    """Packed rows with the columns `input_ids` and `seq_idx`, the document of each token, counted from 0 in every row.

    Rows of conversations also have `is_target`, which marks the assistant's tokens.

    Args:
        train: documents in seeded random order in full rows. It is an `IterableDataset` when streaming.
        held_out: documents in their own order. The last row may be shorter.
        held_out_bytes: UTF-8 bytes of the held-out documents, for which the labelled tokens of `held_out` stand.
    """

    train: Dataset | IterableDataset
    held_out: Dataset
    held_out_bytes: int


def build_datasets(data: DataArguments, corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> PackedDatasets:
    """Tokenises and packs both splits, or takes them from the cache.

    Tokens are cached by corpus and tokenizer, and rows also by `sequence_length` and `seed`.

    Raises:
        ValueError: the training split does not fill one row.
    """
    held_out = _pack_split(data, corpus.held_out, "held_out", corpus.identity, tokenizer)
    if isinstance(corpus.train, IterableDataset):
        train = IterableDataset.from_generator(
            _streamed_rows,
            features=_with_targets(ROW_FEATURES, data),
            gen_kwargs={
                "documents": corpus.train.shuffle(seed=data.seed, buffer_size=_SHUFFLE_BUFFER_DOCUMENTS),
                "tokenizer": tokenizer,
                "sequence_length": data.sequence_length,
                "tokenize": _tokenize_of(data),
            },
        )
    else:
        train = _pack_split(data, corpus.train, "train", corpus.identity, tokenizer)
    read = partial(said, roles=("assistant",)) if data.format == "chat" else str
    held_out_bytes = sum(
        len(read(text).encode()) for batch in corpus.held_out.iter(_READ_BATCH_DOCUMENTS) for text in batch["text"]
    )
    return PackedDatasets(train, held_out, held_out_bytes)


def pack(documents: Iterable[np.ndarray], sequence_length: int) -> Iterator[dict[str, np.ndarray]]:
    """Rows of `sequence_length` tokens, the last one shorter if the documents end before it is full.

    Args:
        documents: token ids (tokens,), bos and eos included. For conversations (2, tokens), ids and whether they are targets.
        sequence_length: tokens in a row, at least 2.

    Yields:
        `input_ids` and `seq_idx`, each (sequence_length,) int32. For conversations also `is_target`, (sequence_length,) bool.
    """
    row: dict[str, np.ndarray] = {}
    filled = segment = 0
    for document in documents:
        columns = dict(zip(("input_ids", "is_target"), np.atleast_2d(document), strict=False))
        size = document.shape[-1]
        begin, end = 0, 0
        while end < size:
            row = row or _empty_row(columns, sequence_length)
            end = min(size, begin + sequence_length - filled)
            piece = slice(filled, filled + end - begin)
            for name, column in columns.items():
                row[name][piece] = column[begin:end]
            row["seq_idx"][piece] = segment
            filled, segment = piece.stop, segment + 1
            if filled == sequence_length:
                yield row
                row = {}
                filled = segment = 0
            begin = end - 1  # the continuation repeats its context
    if filled:
        yield {name: column[:filled] for name, column in row.items()}


def _empty_row(columns: Iterable[str], sequence_length: int) -> dict[str, np.ndarray]:
    kinds = {name: np.bool_ if name == "is_target" else np.int32 for name in (*columns, "seq_idx")}
    return {name: np.empty(sequence_length, dtype=kind) for name, kind in kinds.items()}


def _with_targets(features: Features, data: DataArguments) -> Features:
    return Features({**features, **_TARGETS}) if data.format == "chat" else features


def _tokenize_of(data: DataArguments) -> Callable[[list[str], PreTrainedTokenizerFast], list[np.ndarray]]:
    return tokenize_conversations if data.format == "chat" else tokenize_documents


def tokenize_documents(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    """Each text as `[bos] + tokens + [eos]`, (tokens + 2,) int32.

    Text that spells a special token is tokenised as text, since only packing ends a document.
    """
    begin, end = document_bounds(tokenizer)
    documents: list[np.ndarray] = []
    for batch in _batches(texts):
        encoded = tokenizer(
            batch, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        documents += [np.array([begin, *ids, end], dtype=np.int32) for ids in encoded["input_ids"]]
    return documents


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """The texts in order, in lists with at most `_TOKENIZER_BATCH_CHARACTERS` characters or one text."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > _TOKENIZER_BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _pack_split(
    data: DataArguments, documents: Dataset, split: str, corpus_identity: str, tokenizer: PreTrainedTokenizerFast
) -> Dataset:
    layout = (tokenizer.chat_template,) if data.format == "chat" else ()
    tokens_identity = fingerprint("tokens", split, corpus_identity, tokenizer_identity(tokenizer), *layout)
    spoken = split.replace("_", "-")
    with progress(f"Tokenizing the {spoken} split", len(documents), "documents") as advance:
        tokens = documents.map(
            _tokenized_batch,
            batched=True,
            batch_size=_TOKENIZER_BATCH_DOCUMENTS,
            remove_columns=documents.column_names,
            features=_with_targets(_TOKEN_FEATURES, data),
            fn_kwargs={"tokenizer": tokenizer, "tokenize": _tokenize_of(data), "advance": advance},
            new_fingerprint=tokens_identity,
        )
    rows_identity = fingerprint("rows", tokens_identity, data.sequence_length, data.seed if split == "train" else None)
    arguments: dict[str, Any] = {"tokens": tokens, "sequence_length": data.sequence_length}
    if split == "train":
        arguments["seed"] = data.seed
    with progress(f"Packing the {spoken} split", len(tokens), "documents") as advance:
        rows = generated_dataset(
            _training_rows if split == "train" else _held_out_rows,
            {**arguments, "advance": advance},
            features=_with_targets(ROW_FEATURES, data),
            split=split,
            identity=rows_identity,
            cache_dir=data.cache_dir,
            if_empty=(
                f"the {split} split of corpus {data.corpus!r} does not fill one row of data.sequence_length="
                f"{data.sequence_length} tokens; lower it or add text"
            ),
        )
    return rows.with_format("numpy")


def _tokenized_batch(
    batch: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerFast,
    tokenize: Callable[[list[str], PreTrainedTokenizerFast], list[np.ndarray]],
    advance: Callable[[int], object],
) -> dict[str, list[np.ndarray]]:
    documents = [np.atleast_2d(document) for document in tokenize(batch["text"], tokenizer)]
    advance(len(documents))
    columns = {"input_ids": [document[0] for document in documents]}
    if tokenize is tokenize_conversations:
        columns["is_target"] = [document[1].astype(bool) for document in documents]
    return columns


def _training_rows(
    tokens: Dataset, sequence_length: int, seed: int, advance: Callable[[int], object]
) -> Iterator[dict[str, np.ndarray]]:
    order = np.random.default_rng(seed).permutation(len(tokens))
    rows = pack(_arrays(tokens.select(order), advance), sequence_length)
    return (row for row in rows if len(row["input_ids"]) == sequence_length)


def _held_out_rows(
    tokens: Dataset, sequence_length: int, advance: Callable[[int], object]
) -> Iterator[dict[str, np.ndarray]]:
    return pack(_arrays(tokens, advance), sequence_length)


def _streamed_rows(
    documents: IterableDataset,
    tokenizer: PreTrainedTokenizerFast,
    sequence_length: int,
    tokenize: Callable[[list[str], PreTrainedTokenizerFast], list[np.ndarray]],
) -> Iterator[dict[str, np.ndarray]]:
    tokens = (
        array for batch in documents.iter(_TOKENIZER_BATCH_DOCUMENTS) for array in tokenize(batch["text"], tokenizer)
    )
    return (row for row in pack(tokens, sequence_length) if len(row["input_ids"]) == sequence_length)


def _arrays(tokens: Dataset, advance: Callable[[int], object]) -> Iterator[np.ndarray]:
    for batch in tokens.with_format("numpy").iter(_READ_BATCH_DOCUMENTS):
        for ids, *targets in zip(*(batch[name] for name in tokens.column_names), strict=True):
            advance(1)
            yield np.stack([ids, *targets]) if targets else ids


class PackedCollator:
    """Stacks packed rows and derives positions and labels.

    Args:
        tokenizer: its pad token, or else its eos token, fills rows that are shorter than the longest of a batch.

    Raises:
        ValueError: the tokenizer has neither.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if pad is None:
            raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no pad_token and no eos_token; set one of them")
        self.pad_token_id: int = pad

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Makes a batch, in which every tensor is (b, t) int64 and t is the length of the longest row.

        Args:
            rows: `input_ids` and `seq_idx`, each (t,) integers. With `is_target`, (t,) booleans, only those tokens have labels. Other
                columns are left out.

        Returns:
            `input_ids`; `seq_idx`, the segment of each token, where pads form a last segment of their own; `position_ids`, from 0 in
            every segment; `labels`, the token itself (the model shifts them), or -100 at pads and at each segment's first
            token, which must not be predicted from another segment.
        """
        length = max(len(row["input_ids"]) for row in rows)
        input_ids = np.full((len(rows), length), self.pad_token_id, dtype=np.int64)
        seq_idx = np.empty((len(rows), length), dtype=np.int64)
        padding = np.zeros((len(rows), length), dtype=bool)
        for index, row in enumerate(rows):
            size = len(row["input_ids"])
            input_ids[index, :size] = row["input_ids"]
            seq_idx[index, :size] = row["seq_idx"]
            seq_idx[index, size:] = row["seq_idx"][-1] + 1
            padding[index, size:] = True

        first = np.ones_like(padding)  # (b, t): where a segment begins
        first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        time = np.arange(length)
        position_ids = time - np.maximum.accumulate(np.where(first, time, 0), axis=1)
        is_target = ~(first | padding)
        for index, row in enumerate(rows):
            if "is_target" in row:
                is_target[index, : len(row["input_ids"])] &= row["is_target"]
        labels = np.where(is_target, input_ids, IGNORED_LABEL)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
            "seq_idx": torch.from_numpy(seq_idx),
        }
