import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from transxssm.data import PackedCollator, build_datasets, build_tokenizer, load_corpus, packing, tokenize_documents
from transxssm.data.packing import pack

VOCABULARY = {"a": 0, "<end>": 1, "<pad>": 2}


def documents_back(rows: list[dict]) -> list[list[int]]:
    """The documents of packed rows, joined where a row's first segment goes on with the last one of the row before."""
    documents, expect_continuation = [], False
    for row in rows:
        ids, segments = np.asarray(row["input_ids"]), np.asarray(row["seq_idx"])
        for segment in range(segments[-1] + 1):
            piece = ids[segments == segment].tolist()
            if segment == 0 and expect_continuation:
                assert piece[0] == documents[-1][-1], "a continuation begins with the last token before it"
                documents[-1] += piece[1:]
            else:
                documents.append(piece)
        expect_continuation = documents[-1][-1] >= 0
    return documents


@hypothesis.given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=20), sequence_length=st.integers(2, 17))
def test_every_token_is_predicted_once(lengths, sequence_length):
    # Every token is another number; a document ends with a negative one.
    numbers = iter(range(1, 10_000))
    documents = [[next(numbers) for _ in range(n - 1)] + [-next(numbers)] for n in lengths]
    rows = list(pack([np.array(document, dtype=np.int32) for document in documents], sequence_length))

    assert all(len(row["input_ids"]) == sequence_length for row in rows[:-1])
    assert all(column.dtype == np.int32 for row in rows for column in row.values())
    assert documents_back(rows) == documents
    predicted = [
        int(token)
        for row in rows
        for token, first in zip(row["input_ids"], np.diff(row["seq_idx"], prepend=-1), strict=True)
        if not first
    ]
    assert sorted(predicted) == sorted(token for document in documents for token in document[1:])


def test_segments_count_from_zero_in_every_row():
    rows = list(pack([np.array(d, dtype=np.int32) for d in ([1, 2, 3], [4, 5], [6, 7, 8, 9])], 4))
    assert [row["input_ids"].tolist() for row in rows] == [[1, 2, 3, 4], [4, 5, 6, 7], [7, 8, 9]]
    assert [row["seq_idx"].tolist() for row in rows] == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0]]


@pytest.fixture
def prepare(arguments):
    """Corpus, tokenizer and packed rows of a folder, for the given fields of DataArguments."""

    def make(folder, **fields):
        data = arguments(folder, **({"tokenizer": "bytes", "sequence_length": 64} | fields))
        corpus = load_corpus(data)
        tokenizer = build_tokenizer(data, corpus)
        return corpus, tokenizer, build_datasets(data, corpus, tokenizer)

    return make


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_held_out_bytes_are_those_of_the_labelled_tokens(prepare, folder, name):
    corpus, tokenizer, packed = prepare(folder, tokenizer=name)
    collator = PackedCollator(tokenizer)
    batches = [
        collator([packed.held_out[i] for i in range(k, min(k + 3, len(packed.held_out)))])
        for k in range(0, len(packed.held_out), 3)
    ]
    labels = [label for batch in batches for label in batch["labels"][batch["labels"] >= 0].tolist()]
    text = tokenizer.decode(labels, skip_special_tokens=True)
    assert text == "".join(corpus.held_out["text"])
    assert len(text.encode()) == packed.held_out_bytes
    assert labels.count(tokenizer.eos_token_id) == len(corpus.held_out)


def test_the_training_rows_are_full_and_have_the_documents_in_seeded_order(prepare, folder):
    corpus, tokenizer, packed = prepare(folder)
    rows = list(packed.train)
    assert all(len(row["input_ids"]) == len(row["seq_idx"]) == 64 for row in rows)
    order = np.random.default_rng(0).permutation(len(corpus.train))
    documents = tokenize_documents([corpus.train[int(i)]["text"] for i in order], tokenizer)
    expected = [row for row in pack(documents, 64) if len(row["input_ids"]) == 64]
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert np.array_equal(row["input_ids"], other["input_ids"])
        assert np.array_equal(row["seq_idx"], other["seq_idx"])


def test_long_documents_are_tokenized_a_few_at_a_time_to_the_same_tokens(prepare, folder, monkeypatch):
    corpus, tokenizer, _ = prepare(folder)
    texts = list(corpus.train["text"])
    expected = tokenize_documents(texts, tokenizer)
    monkeypatch.setattr(packing, "_TOKENIZER_BATCH_CHARACTERS", 500)
    batches = list(packing._batches(texts))
    assert [text for batch in batches for text in batch] == texts
    assert len(batches) > 5
    assert all(len(batch) == 1 or sum(map(len, batch)) <= 500 for batch in batches)
    for document, other in zip(tokenize_documents(texts, tokenizer), expected, strict=True):
        assert np.array_equal(document, other)


def cache_file(dataset) -> str:
    (file,) = dataset.cache_files
    return file["filename"]


def test_a_second_run_tokenizes_nothing(prepare, folder, monkeypatch):
    _, _, first = prepare(folder, tokenizer="bpe")

    def tokenized_again(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(packing, "tokenize_documents", tokenized_again)
    _, _, second = prepare(folder, tokenizer="bpe")
    assert cache_file(second.train) == cache_file(first.train)
    assert cache_file(second.held_out) == cache_file(first.held_out)
    with pytest.raises(AssertionError, match="tokenized again"):
        prepare(folder, tokenizer="bytes")


def test_other_arguments_get_other_rows(prepare, folder):
    _, _, first = prepare(folder)
    for fields, held_out_too in [
        ({"seed": 1}, False),
        ({"sequence_length": 65}, True),
        ({"tokenizer": "bpe"}, True),
        ({"held_out_fraction": 0.3}, True),
        ({"max_documents": 39}, True),
    ]:
        _, _, other = prepare(folder, **fields)
        assert cache_file(other.train) != cache_file(first.train), fields
        assert (cache_file(other.held_out) != cache_file(first.held_out)) is held_out_too, fields


def test_another_order_of_the_same_documents(prepare, folder):
    _, _, first = prepare(folder)
    _, _, other = prepare(folder, seed=1)
    assert len(first.train) == pytest.approx(len(other.train), abs=1)
    assert not np.array_equal(first.train[0]["input_ids"], other.train[0]["input_ids"])


def test_rows_of_another_sequence_length_reuse_the_tokens(prepare, folder, monkeypatch):
    prepare(folder)
    monkeypatch.setattr(packing, "tokenize_documents", None)
    prepare(folder, sequence_length=32)


def test_a_training_split_shorter_than_a_row_is_refused(prepare, folder):
    with pytest.raises(
        ValueError, match=r"the train split of .* does not fill one row of data\.sequence_length=100000"
    ):
        prepare(folder, sequence_length=100_000)


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
