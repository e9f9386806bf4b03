"""A corpus: named documents in two splits that never trade a document, whatever is added to the corpus."""

import difflib
import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, IterableDataset, Value

from transxssm.data.arguments import DataArguments
from transxssm.data.cache import fingerprint, generated_dataset
from transxssm.data.embedded import EMBEDDED_CORPORA, embedded_documents, embedded_files
from transxssm.data.files import TextFile, local_documents, local_files
from transxssm.data.hub import hub_documents, open_hub_dataset

DOCUMENT_FEATURES = Features({"name": Value("string"), "text": Value("large_string")})
# A stream has no end to wait for: its held-out split is drawn from so many documents at its beginning.
STREAM_HELD_OUT_SCAN = 10_000

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_SUFFIXES = frozenset({".txt", ".md", ".py", ".json", ".jsonl", ".ndjson", ".parquet"})


@dataclass(frozen=True)
class Corpus:
    """Documents in two splits, each with the columns `name` and `text`.

    Args:
        train: what is trained on; an `IterableDataset` when streaming.
        held_out: what is evaluated on.
        identity: fingerprint of both splits' content; a stream's says where it comes from.
    """

    train: Dataset | IterableDataset
    held_out: Dataset
    identity: str


def load_corpus(data: DataArguments) -> Corpus:
    """The corpus that `data` names, split by a hash of each document's name.

    A document's side depends on its own name and on `held_out_fraction`, and on no other document.

    Raises:
        ValueError: no such corpus, a file or record that can't be read, or too few documents to fill both splits.
        ConnectionError: a hub data set, and the hub can't be reached.
    """
    path = Path(data.corpus).expanduser()
    if data.corpus in EMBEDDED_CORPORA or path.exists():
        for name in ("streaming", "corpus_config"):
            if getattr(data, name):
                raise ValueError(
                    f"data.{name} is for hub data sets: got corpus {data.corpus!r}, which is on this machine; leave it out"
                )
        return _files_corpus(data, path)
    if not _HUB_NAME.fullmatch(data.corpus) or path.suffix.lower() in _FILE_SUFFIXES:
        raise ValueError(_unknown(data.corpus))
    records = open_hub_dataset(data)
    if isinstance(records, IterableDataset):
        return _streamed_corpus(data, records)
    identity = fingerprint("hub", records._fingerprint, data.text_column)
    documents = generated_dataset(
        hub_documents,
        {"records": records, "text_column": data.text_column},
        features=DOCUMENT_FEATURES,
        split="documents",
        identity=identity,
        cache_dir=data.cache_dir,
        if_empty=_empty(data.corpus),
    )
    return _split(data, documents, identity)


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of this name is held out: its hash, taken as a number in [0, 1), lies below `fraction`."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _files_corpus(data: DataArguments, path: Path) -> Corpus:
    """An embedded or local corpus. Files are known by name, size and time, so that an edited file is read again."""
    embedded = data.corpus in EMBEDDED_CORPORA
    files = embedded_files(data.corpus) if embedded else local_files(path)
    source = [data.corpus if embedded else str(path.resolve()), data.text_column, data.max_documents]
    identity = fingerprint("files", source, [(file.name, *_size_and_time(file.path)) for file in files])
    documents = generated_dataset(
        _first_documents,
        {"corpus": data.corpus if embedded else path, "files": files, "data": data},
        features=DOCUMENT_FEATURES,
        split="documents",
        identity=identity,
        cache_dir=data.cache_dir,
        if_empty=_empty(data.corpus),
    )
    return _split(data, documents, identity)


def _first_documents(corpus: str | Path, files: list[TextFile], data: DataArguments) -> Iterator[dict[str, str]]:
    match corpus:
        case Path():
            documents = local_documents(corpus, files, data.text_column)
        case _:
            documents = embedded_documents(corpus, files)
    return itertools.islice(documents, data.max_documents)


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _split(data: DataArguments, documents: Dataset, identity: str) -> Corpus:
    """Both splits of the documents, as views: the text is stored once."""
    identity = fingerprint("split", identity, data.held_out_fraction)
    held_out = [is_held_out(name, data.held_out_fraction) for name in documents["name"]]
    splits = {
        side: documents.select(
            [index for index, held in enumerate(held_out) if held == (side == "held-out")],
            new_fingerprint=fingerprint(side, identity),
        )
        for side in ("train", "held-out")
    }
    for side, split in splits.items():
        if not len(split):
            raise ValueError(
                f"corpus {data.corpus!r} has {len(documents)} documents, and data.held_out_fraction="
                f"{data.held_out_fraction} leaves none for the {side} split; change the fraction or add documents"
            )
    return Corpus(splits["train"], splits["held-out"], identity)


def _streamed_corpus(data: DataArguments, records: IterableDataset) -> Corpus:
    """Training documents as they come, without any that is held out; held-out ones from the stream's beginning, stored."""
    arguments = {"records": records, "text_column": data.text_column, "fraction": data.held_out_fraction}
    source = [data.corpus, data.corpus_config, data.corpus_split, data.text_column, data.max_documents]
    identity = fingerprint("stream", source, data.held_out_fraction)
    held_out = generated_dataset(
        _streamed_held_out,
        arguments,
        features=DOCUMENT_FEATURES,
        split="held_out",
        identity=fingerprint("held-out", identity, STREAM_HELD_OUT_SCAN),
        cache_dir=data.cache_dir,
        if_empty=(
            f"the first {STREAM_HELD_OUT_SCAN} documents of {data.corpus} have none for the held-out split; raise "
            f"data.held_out_fraction, now {data.held_out_fraction}"
        ),
    )
    train = IterableDataset.from_generator(_streamed_train, features=DOCUMENT_FEATURES, gen_kwargs=arguments)
    return Corpus(train, held_out, identity)


def _streamed_train(records: IterableDataset, text_column: str, fraction: float) -> Iterator[dict[str, str]]:
    return (document for document in hub_documents(records, text_column) if not is_held_out(document["name"], fraction))


def _streamed_held_out(records: IterableDataset, text_column: str, fraction: float) -> Iterator[dict[str, str]]:
    scanned = itertools.islice(hub_documents(records, text_column), STREAM_HELD_OUT_SCAN)
    return (document for document in scanned if is_held_out(document["name"], fraction))


def _empty(corpus: str) -> str:
    return f"corpus {corpus!r} is empty: expected at least two documents with text; name another data.corpus"


def _unknown(corpus: str) -> str:
    nearest = difflib.get_close_matches(corpus, EMBEDDED_CORPORA, n=1)
    suggestion = f"; did you mean {nearest[0]}?" if nearest else ""
    return (
        f"no corpus {corpus!r}: expected {' or '.join(EMBEDDED_CORPORA)} (embedded), a file or folder that exists, or a hub "
        f"data set owner/name{suggestion}"
    )
