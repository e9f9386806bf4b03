"""A corpus: named documents in two splits, one for training and one that is held out.

Two corpora are embedded, since every machine with Python has their text. `python-stdlib` is the source of the standard library without
its tests, about 10 MB. `python-environment` is everything installed in site-packages, hundreds of MB with a machine-learning stack.
Generated tables are left out of both.

Whole documents are held out by a hash of their names, or pieces of documents if these are too few or too long for that.
"""

import hashlib
import itertools
import logging
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Value

from transxssm.data.arguments import DataArguments
from transxssm.data.cache import fingerprint, generated_dataset
from transxssm.data.files import JSONL_SUFFIXES, Advance, TextFile, cut_end, decode, local_documents, local_files
from transxssm.data.hub import hub_documents, open_hub_dataset
from transxssm.data.progress import progress
from transxssm.wording import nearest

logger = logging.getLogger(__name__)

EMBEDDED_CORPORA = ("python-stdlib", "python-environment")

_STDLIB_EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_ENVIRONMENT_EXCLUDED = frozenset({"__pycache__"})

# A line of data begins, after brackets, with a number or a string (not a docstring's triple quote), or is too long to be written by hand.
_TABLE_LINE = re.compile(
    rb"""^[ \t]*+[\[({]*+(?:[-+]?\d|[bBuUrRfF]{0,2}(?:'(?!'')|"(?!"")))[^\n]*+ | ^[^\n]{500,}+""",
    re.MULTILINE | re.VERBOSE,
)


# Several pieces that are spread over a text represent it better than its end. Pieces that are too short would leave a model no context.
PIECES = 4
SHORTEST_PIECE, LONGEST_PIECE = 4 * 1024, 32 * 1024  # characters, if that many are to be held out
# Documents are cut if the hash of names holds out more than `FAR` times the requested share, or less than the share divided by `FAR`.
FAR = 2


DOCUMENT_FEATURES = Features({"name": Value("string"), "text": Value("large_string")})
# The held-out split of a stream is drawn from this many documents at its beginning, since a stream may not end.
STREAM_HELD_OUT_SCAN = 10_000

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_SUFFIXES = JSONL_SUFFIXES | {".txt", ".md", ".py", ".json", ".csv", ".tsv", ".parquet", ".gz"}
# Part of a local corpus's fingerprint. Increase it whenever its files would be read as other documents.
_LOCAL_VERSION = 2


def is_table(source: bytes) -> bool:
    """Whether more than half of a Python file's bytes are lines of data: codec and Unicode tables, colour maps, word lists.

    Such files are mostly generated, and a model learns little from them.
    """
    return sum(match.end() - match.start() for match in _TABLE_LINE.finditer(source)) > len(source) / 2


def embedded_files(corpus: str) -> list[TextFile]:
    """The .py files of an embedded corpus, named and ordered by their path below its root, including tables."""
    if corpus == "python-stdlib":
        roots, excluded = {sysconfig.get_path("stdlib")}, _STDLIB_EXCLUDED
    else:
        roots, excluded = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}, _ENVIRONMENT_EXCLUDED
    files = []
    for root in map(Path, sorted(roots)):
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            if excluded.isdisjoint(relative.parts) and path.is_file():
                files.append(TextFile(relative.as_posix(), path))
    return sorted(files)


def embedded_documents(
    corpus: str, files: Sequence[TextFile], advance: Advance = lambda num_bytes: None
) -> Iterator[dict[str, str]]:
    """Name and text of each file that is text, is not a table, and is not a copy of an earlier file.

    Copies (vendored packages) would put the same text into both splits.
    """
    seen: set[bytes] = set()
    skipped: Counter[str] = Counter()
    for file in files:
        try:
            source = file.path.read_bytes()
            text = decode(source)
        except (OSError, ValueError):
            skipped["unreadable"] += 1
            continue
        advance(len(source))
        digest = hashlib.sha256(source).digest()
        if not text.strip():
            skipped["empty"] += 1
        elif digest in seen:
            skipped["copies"] += 1
        elif is_table(source):
            skipped["tables"] += 1
        else:
            seen.add(digest)
            yield {"name": file.name, "text": text}
    logger.info("%s: left out of %d files: %s", corpus, len(files), dict(skipped))


class Run(NamedTuple):
    """Characters `begin` to `end` of a document, on one side of the split."""

    document: int
    begin: int
    end: int
    is_held_out: bool


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of this name is held out: whether its hash, scaled to [0, 1), is below `fraction`."""
    return hash_of(name) < fraction * 2**64


def hash_of(name: str) -> int:
    """A 64-bit hash of the name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def is_near(held_out: int, total: int, fraction: float) -> bool:
    """Whether `held_out` of `total` characters are about the requested `fraction`, and leave about the rest for training."""
    shares = ((held_out, fraction * total), (total - held_out, (1 - fraction) * total))
    return all(expected / FAR <= share <= expected * FAR for share, expected in shares)


def cut_and_chosen(names: Sequence[str], texts: Iterable[str], num_characters: int, fraction: float) -> list[Run]:
    """Cuts documents as little as necessary to hold out about `fraction` of their characters. Returns all of them.

    Long documents are divided into pieces, at the ends of lines or sentences if there are any. Pieces and short documents are held out in
    the order of their names' hashes until the share is closest to `fraction`. At least one is held out, and at least one is not. The rest
    of a document between two held-out pieces is not cut further.

    Args:
        names: names of the documents.
        texts: texts of the same documents, in the same order.
        num_characters: number of characters in all texts.
        fraction: share of the characters, between 0 and 1.

    Raises:
        ValueError: all the text is a single character.
    """
    wanted = fraction * num_characters
    smaller = min(wanted, num_characters - wanted)
    size = max(1, round(min(smaller, max(SHORTEST_PIECE, min(LONGEST_PIECE, smaller / PIECES)))))
    # Copies and their pieces have the same names, and all text of one name goes to one side.
    lengths: dict[str, int] = {}
    pieces: list[tuple[str, int, int, int]] = []
    for index, (name, text) in enumerate(zip(names, texts, strict=True)):
        bounds = piece_bounds(text, size)
        for number, (begin, end) in enumerate(bounds):
            piece = name if len(bounds) == 1 else f"{name}@{number}"
            lengths[piece] = lengths.get(piece, 0) + end - begin
            pieces.append((piece, index, begin, end))
    if len(lengths) < 2:
        raise ValueError("it is one character")
    chosen = _nearest_in_order(lengths, wanted)

    runs: list[Run] = []
    for piece, index, begin, end in pieces:
        side = piece in chosen
        if runs and runs[-1].document == index and runs[-1].is_held_out == side:
            runs[-1] = runs[-1]._replace(end=end)
        else:
            runs.append(Run(index, begin, end, side))
    return runs


def piece_bounds(text: str, size: int) -> list[tuple[int, int]]:
    """The bounds of the pieces of a text, of about `size` characters each. No piece is blank unless the text is."""
    bounds: list[tuple[int, int]] = []
    begin = 0
    while begin < len(text):
        # The last piece is up to half as long again, so that no small rest remains.
        end = len(text) if len(text) - begin < 1.5 * size else cut_end(text, begin, begin + size)
        if bounds and not text[begin:end].strip():
            begin = bounds.pop()[0]
        while end < len(text) and not text[begin:end].strip():
            end = cut_end(text, end, end + size)
        bounds.append((begin, end))
        begin = end
    return bounds


def _nearest_in_order(lengths: dict[str, int], wanted: float) -> set[str]:
    order = sorted(lengths, key=hash_of)
    sums, total = [], 0
    for name in order[:-1]:
        total += lengths[name]
        sums.append(total)
    count = min(range(len(sums)), key=lambda index: abs(sums[index] - wanted)) + 1
    return set(order[:count])


@dataclass(frozen=True)
class Corpus:
    """Documents in two splits, each with the columns `name` and `text`.

    Args:
        train: training documents, an `IterableDataset` when streaming.
        held_out: documents for evaluation.
        identity: fingerprint of both splits' content, or of a stream's source.
        description: a line about the training and the held-out text.
    """

    train: Dataset | IterableDataset
    held_out: Dataset
    identity: str
    description: str = ""


def load_corpus(data: DataArguments) -> Corpus:
    """The corpus that `data` names, split by a hash of each document's name, or with `data.validation` as its held-out split.

    The side of a document depends only on its name and on `held_out_fraction`. If one side would be empty, or a user's own corpus would be
    split far from the fraction, documents are cut instead (`cut_and_chosen`).

    Raises:
        ValueError: there is no such corpus, a file or record cannot be read, or there is not enough text for two splits.
        ConnectionError: the corpus is a hub data set, and the hub cannot be reached.
    """
    path = Path(data.corpus).expanduser()
    if data.format == "chat" and data.corpus in EMBEDDED_CORPORA:
        raise ValueError(
            f"data.format=chat learns from conversations: got corpus {data.corpus!r}, which has none; name a file with data.corpus"
        )
    validation = _validation_path(data, path)
    if data.corpus in EMBEDDED_CORPORA or path.exists():
        for name in ("streaming", "corpus_config"):
            if getattr(data, name):
                raise ValueError(
                    f"data.{name} is for hub data sets: got corpus {data.corpus!r}, which is on this machine; leave it out"
                )
        is_own = data.corpus not in EMBEDDED_CORPORA
        documents, identity = (
            _local(data, path, excluded=validation, limit=data.max_documents) if is_own else _embedded(data)
        )
    elif not _HUB_NAME.fullmatch(data.corpus) or path.suffix.lower() in _FILE_SUFFIXES:
        raise ValueError(_unknown(data.corpus))
    else:
        records = open_hub_dataset(data)
        if isinstance(records, IterableDataset):
            return _streamed_corpus(data, records, validation)
        is_own, identity = False, fingerprint("hub", records._fingerprint, data.text_column)
        documents = _stored(
            hub_documents,
            {"records": records, "text_column": data.text_column},
            identity,
            data,
            data.corpus,
            len(records),
        )
    documents, identity = _sampled(data, documents, identity)
    if validation is not None:
        held_out, held_out_identity = _local(data, validation)
        return Corpus(
            documents,
            held_out,
            fingerprint("validation", identity, held_out_identity),
            f"{len(documents):,} documents to train on; held out: the {len(held_out):,} of {data.validation}",
        )
    if data.format == "chat":
        return _split_whole(data, documents, identity)
    return _split(data, documents, identity, is_own)


def _validation_path(data: DataArguments, corpus: Path) -> Path | None:
    """The path that `data.validation` names."""
    if data.validation is None:
        return None
    path = Path(data.validation).expanduser()
    if not path.exists():
        raise ValueError(f"no data.validation {data.validation!r}: expected a file or folder that exists")
    if data.corpus not in EMBEDDED_CORPORA and corpus.resolve().is_relative_to(path.resolve()):
        raise ValueError(
            f"data.validation {data.validation!r} holds all of data.corpus {data.corpus!r}, which would leave no text to train "
            f"on: name another one"
        )
    return path


def _embedded(data: DataArguments) -> tuple[Dataset, str]:
    """The documents of an embedded corpus. Files are identified by name, size and time, so that an edited one is read again."""
    files = embedded_files(data.corpus)
    states = _states(files)
    identity = fingerprint("files", [data.corpus, data.text_column, data.max_documents], states)
    arguments = {"documents": embedded_documents, "arguments": (data.corpus, files), "limit": data.max_documents}
    num_bytes = sum(size for _, size, _ in states)
    return _stored(_first_documents, arguments, identity, data, data.corpus, num_bytes, "B"), identity


def _local(
    data: DataArguments, path: Path, *, excluded: Path | None = None, limit: int | None = None
) -> tuple[Dataset, str]:
    """The documents of a file or folder, at most `limit`, without those of an excluded file or folder inside it."""
    files = local_files(path, excluded=excluded)
    states = _states(files)
    identity = fingerprint("local", _LOCAL_VERSION, [str(path.resolve()), data.text_column, limit], states)
    arguments = {"documents": local_documents, "arguments": (path, files, data.text_column), "limit": limit}
    num_bytes = sum(size for _, size, _ in states)
    return _stored(_first_documents, arguments, identity, data, str(path), num_bytes, "B"), identity


def _states(files: list[TextFile]) -> list[tuple[str, int, int]]:
    """Name, size and time of each file."""
    states = ((file.name, file.path.stat()) for file in files)
    return [(name, status.st_size, status.st_mtime_ns) for name, status in states]


def _first_documents(
    documents: Callable[..., Iterator[dict[str, str]]],
    arguments: tuple[Any, ...],
    limit: int | None,
    advance: Callable[[int], object],
) -> Iterator[dict[str, str]]:
    return itertools.islice(documents(*arguments, advance=advance), limit)


def _stored(
    generator: Callable[..., Iterator[dict[str, str]]],
    arguments: dict[str, Any],
    identity: str,
    data: DataArguments,
    corpus: str,
    total: int,
    unit: str = "documents",
) -> Dataset:
    """The documents of a generator, or from the cache if they are there."""
    with progress(f"Reading {corpus}", total, unit) as advance:
        return generated_dataset(
            generator,
            {**arguments, "advance": advance},
            features=DOCUMENT_FEATURES,
            split="documents",
            identity=identity,
            cache_dir=data.cache_dir,
            if_empty=f"corpus {corpus!r} is empty: expected documents with text; name another one",
        )


def _sampled(data: DataArguments, documents: Dataset, identity: str) -> tuple[Dataset, str]:
    """About `data.max_bytes` of the documents, drawn by a hash of their names and kept in order."""
    if data.max_bytes is None:
        return documents, identity
    sizes = pc.binary_length(_texts(documents)).to_numpy()
    names = list(documents["name"])
    order = np.array(sorted(range(len(names)), key=lambda index: hash_of(f"sample of {names[index]}")))
    count = int(np.searchsorted(np.cumsum(sizes[order]), data.max_bytes)) + 1
    if count >= len(documents):
        return documents, identity
    identity = fingerprint("sample", identity, data.max_bytes)
    return documents.select(np.sort(order[:count]), new_fingerprint=identity), identity


def _split(data: DataArguments, documents: Dataset, identity: str, is_own: bool) -> Corpus:
    """Splits the documents: by views if the hash of names gives about the fraction, else by cutting documents.

    Args:
        is_own: whether the corpus is a file or folder of the user's own. Other corpora are cut only if a side would be empty.
    """
    fraction = data.held_out_fraction
    identity = fingerprint("split", identity, fraction)
    names, sizes = list(documents["name"]), pc.utf8_length(_texts(documents)).to_numpy()
    held_out = np.array([is_held_out(name, fraction) for name in names])
    taken, total = int(sizes[held_out].sum()), int(sizes.sum())
    if 0 < held_out.sum() < len(names) and (not is_own or is_near(taken, total, fraction)):
        share = f"{int(held_out.sum()):,} of {len(names):,} documents, {taken / total:.1%} of the text, by a hash of their names"
        side = held_out
    else:
        try:
            runs = cut_and_chosen(names, (document["text"] for document in documents), total, fraction)
        except ValueError as error:
            raise ValueError(
                f"corpus {data.corpus!r} cannot be split in two: {error}; add text, or name data.validation"
            ) from None
        identity = fingerprint("cut", identity, runs)
        documents = _stored(_runs_of, {"documents": documents, "runs": runs}, identity, data, data.corpus, len(runs))
        side = np.array([run.is_held_out for run in runs])
        taken = sum(run.end - run.begin for run in runs if run.is_held_out)
        count = int(side.sum())
        share = f"{taken / total:.1%} of the text, {count:,} piece{'s' * (count != 1)} cut at line or sentence ends where there are any"
    train, held_out_documents = (
        documents.select(np.flatnonzero(side == held), new_fingerprint=fingerprint(name, identity))
        for name, held in (("train", False), ("held-out", True))
    )
    return Corpus(train, held_out_documents, identity, f"{total:,} characters; held out: {share}")


def _split_whole(data: DataArguments, documents: Dataset, identity: str) -> Corpus:
    """Splits conversations, which cannot be cut: those with the lowest hashes of names are held out, up to about the fraction."""
    names = list(documents["name"])
    order = sorted(set(names), key=hash_of)
    if len(order) < 2:
        raise ValueError(
            f"corpus {data.corpus!r} cannot be split in two: it is one conversation; add more, or name data.validation"
        )
    count = min(max(1, round(data.held_out_fraction * len(order))), len(order) - 1)
    held_out = set(order[:count])
    side = np.array([name in held_out for name in names])
    identity = fingerprint("whole", identity, data.held_out_fraction)
    train, held_out_documents = (
        documents.select(np.flatnonzero(side == held), new_fingerprint=fingerprint(name, identity))
        for name, held in (("train", False), ("held-out", True))
    )
    share = f"{int(side.sum()):,} of {len(names):,} conversations"
    return Corpus(train, held_out_documents, identity, f"held out: {share}, by a hash of their names")


def text_bytes(documents: Dataset) -> int:
    """Bytes of the documents' texts in UTF-8, without reading them."""
    return pc.sum(pc.binary_length(_texts(documents))).as_py() or 0


def _texts(documents: Dataset) -> Any:
    """The Arrow column of the texts."""
    column = documents.data.column("text")
    return column if documents._indices is None else column.take(documents._indices.column(0))


def _runs_of(documents: Dataset, runs: list[Run], advance: Callable[[int], object]) -> Iterator[dict[str, str]]:
    for run in runs:
        advance(1)
        document = documents[run.document]
        whole = run.begin == 0 and run.end == len(document["text"])
        name = document["name"] if whole else f"{document['name']}@{run.begin}"
        yield {"name": name, "text": document["text"][run.begin : run.end]}


def _streamed_corpus(data: DataArguments, records: IterableDataset, validation: Path | None) -> Corpus:
    """Training documents in the stream's order, without held-out ones, and stored held-out documents from its beginning."""
    fraction = data.held_out_fraction if validation is None else 0.0
    arguments = {"records": records, "text_column": data.text_column, "fraction": fraction}
    train = IterableDataset.from_generator(_streamed_train, features=DOCUMENT_FEATURES, gen_kwargs=arguments)
    source = [data.corpus, data.corpus_config, data.corpus_split, data.text_column, data.max_documents]
    if validation is not None:
        held_out, held_out_identity = _local(data, validation)
        identity = fingerprint("validation", ["stream", *source], held_out_identity)
        return Corpus(
            train, held_out, identity, f"a stream to train on; held out: {len(held_out):,} documents of {validation}"
        )
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
    return Corpus(
        train, held_out, identity, f"a stream to train on; held out: {len(held_out):,} documents from its beginning"
    )


def _streamed_train(records: IterableDataset, text_column: str, fraction: float) -> Iterator[dict[str, str]]:
    return (document for document in hub_documents(records, text_column) if not is_held_out(document["name"], fraction))


def _streamed_held_out(records: IterableDataset, text_column: str, fraction: float) -> Iterator[dict[str, str]]:
    scanned = itertools.islice(hub_documents(records, text_column), STREAM_HELD_OUT_SCAN)
    return (document for document in scanned if is_held_out(document["name"], fraction))


def _unknown(corpus: str) -> str:
    close = nearest(corpus, EMBEDDED_CORPORA)
    suggestion = f"; did you mean {close}?" if close else ""
    return (
        f"no corpus {corpus!r}: expected {' or '.join(EMBEDDED_CORPORA)} (embedded), a file or folder that exists, or a hub "
        f"data set owner/name{suggestion}"
    )
