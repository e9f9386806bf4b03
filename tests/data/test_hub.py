"""Hub data sets, on a Parquet data set on this disk: `load_dataset` is the real one, its name is redirected."""

import itertools

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transxssm.data import PackedCollator, build_datasets, build_tokenizer, hub, load_corpus
from transxssm.data import corpus as corpus_module

TEXTS = [f"document {n}: " + "some words " * (n % 7) for n in range(60)]


@pytest.fixture
def hub_dataset(tmp_path, monkeypatch):
    """`owner/name` on the hub is a Parquet file; returns the calls that were made for it."""
    pq.write_table(pa.table({"body": [*TEXTS, "", None], "score": range(62)}), tmp_path / "hub.parquet")
    calls = []

    def load_dataset(name, configuration, *, split, streaming, cache_dir):
        calls.append((name, configuration, split, streaming))
        files = {"train": str(tmp_path / "hub.parquet")}
        return datasets.load_dataset("parquet", data_files=files, split=split, streaming=streaming, cache_dir=cache_dir)

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    return calls


def hub_arguments(arguments, **fields):
    return arguments("owner/name", corpus_config="small", text_column="body", tokenizer="bytes", **fields)


def test_a_hub_data_set_is_split_like_files(hub_dataset, arguments):
    corpus = load_corpus(hub_arguments(arguments))
    assert hub_dataset == [("owner/name", "small", "train", False)]
    assert sorted([*corpus.train["text"], *corpus.held_out["text"]]) == sorted(TEXTS)
    assert len(corpus.held_out) > 5
    again = load_corpus(hub_arguments(arguments))
    assert again.identity == corpus.identity
    assert again.train.cache_files == corpus.train.cache_files


def test_a_stream_has_the_splits_of_the_download(hub_dataset, arguments):
    stored = load_corpus(hub_arguments(arguments))
    streamed = load_corpus(hub_arguments(arguments, streaming=True))
    assert isinstance(streamed.train, datasets.IterableDataset)
    assert isinstance(streamed.held_out, datasets.Dataset)
    assert list(streamed.train) == list(stored.train)
    assert list(streamed.held_out) == list(stored.held_out)


def test_the_held_out_documents_of_a_stream_come_from_its_beginning(hub_dataset, arguments, monkeypatch):
    monkeypatch.setattr(corpus_module, "STREAM_HELD_OUT_SCAN", 20)
    corpus = load_corpus(hub_arguments(arguments, streaming=True))
    assert set(corpus.held_out["text"]) < set(TEXTS[:20])
    later = set(TEXTS[20:]) - {document["text"] for document in corpus.train}
    assert later, "a document that hashes to the held-out side must not be trained on, wherever it stands"


def test_a_stream_is_packed_as_it_comes(hub_dataset, arguments):
    data = hub_arguments(arguments, streaming=True, sequence_length=32)
    corpus = load_corpus(data)
    tokenizer = build_tokenizer(data, corpus)
    packed = build_datasets(data, corpus, tokenizer)
    rows = list(packed.train)
    assert rows
    assert all(len(row["input_ids"]) == len(row["seq_idx"]) == 32 for row in rows)
    assert [list(row["input_ids"]) for row in packed.train] == [list(row["input_ids"]) for row in rows]
    stored_data = hub_arguments(arguments, sequence_length=32)
    stored = build_datasets(stored_data, load_corpus(stored_data), tokenizer)
    assert len(rows) == len(stored.train)
    assert packed.held_out_bytes == stored.held_out_bytes
    assert PackedCollator(tokenizer)(list(itertools.islice(packed.train, 2)))["input_ids"].shape == (2, 32)
    other = build_datasets(hub_arguments(arguments, streaming=True, sequence_length=32, seed=1), corpus, tokenizer)
    assert [list(row["input_ids"]) for row in other.train] != [list(row["input_ids"]) for row in rows]


def test_bpe_trains_on_a_stream(hub_dataset, arguments):
    data = arguments("owner/name", text_column="body", streaming=True, vocab_size=280)
    tokenizer = build_tokenizer(data, load_corpus(data))
    assert len(tokenizer) == 280


@pytest.mark.parametrize("streaming", [False, True])
def test_max_documents_caps_a_hub_data_set(hub_dataset, arguments, streaming):
    corpus = load_corpus(hub_arguments(arguments, max_documents=30, streaming=streaming))
    assert sorted([d["text"] for d in [*corpus.train, *corpus.held_out]]) == sorted(TEXTS[:30])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_or_wrong_column_is_refused(hub_dataset, arguments, streaming):
    with pytest.raises(ValueError, match=r"has no column 'text': got \['body', 'score'\]"):
        load_corpus(arguments("owner/name", streaming=streaming))
    with pytest.raises(ValueError, match="the text must be a string, got int"):
        load_corpus(arguments("owner/name", text_column="score", streaming=streaming))


def test_without_a_connection_the_user_is_told(arguments):
    with pytest.raises(ConnectionError, match="cannot reach the hub for owner/name") as refusal:
        load_corpus(arguments("owner/name"))
    assert "local path" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("BuilderConfig 'small' not found.\nAvailable: ['large']"),
        datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist"),
    ],
)
def test_a_wrong_name_is_told_in_one_line(arguments, monkeypatch, error):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="cannot load owner/name small") as refusal:
        load_corpus(hub_arguments(arguments))
    assert "check data.corpus" in str(refusal.value)
    assert "\n" not in str(refusal.value)
