"""Batches of packed rows. Letters: b batch, t time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from transxssm.data.labels import IGNORED_LABEL


class PackedCollator:
    """Stacks packed rows and derives what follows from them.

    Args:
        tokenizer: its pad token fills rows that are shorter than the longest of a batch; its eos token where it has none.

    Raises:
        ValueError: the tokenizer has neither.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if pad is None:
            raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no pad_token and no eos_token; set one of them")
        self.pad_token_id: int = pad

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch, every tensor (b, t) int64, t the longest row.

        Args:
            rows: `input_ids` and `seq_idx`, each (t,) integers. Other columns are left out.

        Returns:
            `input_ids`; `seq_idx`, the segment of each token, pads being a last one of their own; `position_ids`, from 0 in
            every segment; `labels`, the token itself (the model shifts them), -100 at pads and at each segment's first
            token, which no neighbour may predict.
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
        labels = np.where(first | padding, IGNORED_LABEL, input_ids)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
            "seq_idx": torch.from_numpy(seq_idx),
        }
