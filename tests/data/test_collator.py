import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from transxssm.data import PackedCollator

VOCABULARY = {"a": 0, "<end>": 1, "<pad>": 2}


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=VOCABULARY, merges=[])), **special)


@pytest.fixture
def collator() -> PackedCollator:
    return PackedCollator(tokenizer(eos_token="<end>", pad_token="<pad>"))


def row(ids: list[int], segments: list[int]) -> dict[str, np.ndarray]:
    return {"input_ids": np.array(ids, dtype=np.int32), "seq_idx": np.array(segments, dtype=np.int32)}


def test_labels_and_positions_restart_with_every_segment(collator):
    batch = collator([row([7, 8, 9, 7, 9, 5], [0, 0, 0, 1, 1, 2])])
    assert batch["input_ids"].tolist() == [[7, 8, 9, 7, 9, 5]]
    assert batch["labels"].tolist() == [[-100, 8, 9, -100, 9, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_pads_are_a_segment_of_their_own(collator):
    batch = collator([row([7, 8, 9, 9], [0, 0, 1, 1]), row([7, 2], [0, 0]), row([5], [0])])
    assert batch["input_ids"].tolist() == [[7, 8, 9, 9], [7, 2, 2, 2], [5, 2, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 8, -100, 9], [-100, 2, -100, -100], [-100] * 4]
    assert batch["seq_idx"].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 1, 2]]


def test_lists_do_as_well_as_arrays(collator):
    lists = collator([{"input_ids": [7, 8], "seq_idx": [0, 0]}])
    assert all(torch.equal(tensor, collator([row([7, 8], [0, 0])])[name]) for name, tensor in lists.items())


def test_without_a_pad_token_the_end_pads():
    batch = PackedCollator(tokenizer(eos_token="<end>"))([row([7, 8], [0, 0]), row([7], [0])])
    assert batch["input_ids"].tolist() == [[7, 8], [7, 1]]
    assert batch["labels"].tolist() == [[-100, 8], [-100, -100]]


def test_a_tokenizer_without_either_is_refused():
    with pytest.raises(ValueError, match="no pad_token and no eos_token"):
        PackedCollator(tokenizer())
