"""Documents from local files: a text file, a line of JSONL, an item of a JSON array, or a row of CSV or Parquet is a document.

All but Parquet files may be compressed with gzip (`.jsonl.gz`).
"""

import csv
import gzip
import hashlib
import io
import json
import logging
import re
import sys
import unicodedata
import zlib
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from transxssm.data.arguments import MESSAGES
from transxssm.data.chat import conversation_text

logger = logging.getLogger(__name__)

GZIP_SUFFIX = ".gz"
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
DELIMITERS = {".csv": ",", ".tsv": "\t"}
# A text file of at least twice this length becomes several documents of about this length, so that none fills the memory.
PART_CHARACTERS = 256 * 1024
_PARQUET_BATCH_ROWS = 1024
_READ_BYTES = 2**20
_PLACES_NAMED = 3

Advance = Callable[[int], object]  # called with the number of bytes that were read


class TextFile(NamedTuple):
    """A file and the name of its documents."""

    name: str
    path: Path


class Oddities:
    """What was left out or changed while a corpus was read: the number of cases and the places of the first of each kind."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, kind: str, where: str) -> None:
        """Counts a case, and keeps its place if it is one of the first."""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        places = self._places.setdefault(kind, [])
        if len(places) < _PLACES_NAMED:
            places.append(where)

    def warn(self) -> None:
        """Logs one line for each kind."""
        for kind, count in self._counts.items():
            places = "; ".join(self._places[kind])
            logger.warning("%d %s: %s%s", count, kind, places, "; …" if count > _PLACES_NAMED else "")


def decode(content: bytes) -> str:
    """Decodes a file's content as UTF-8, without any changes.

    Raises:
        ValueError: the content has NUL bytes or is not UTF-8.
    """
    position = content.find(b"\0")
    if position >= 0:
        raise ValueError(f"NUL byte at offset {position}")
    return content.decode("utf-8")


def content_name(text: str) -> str:
    """The name of a document without one: a digest of its text, so that copies are in one split."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# Places where a text may be cut, the best first: after a sentence, after white space. The end of a line is better than both.
_BREAKS = (re.compile(r"[.!?…][\"'”’»)\]]*\s|[。！？]"), re.compile(r"\s"))
_JOINERS = frozenset("\u200d\ufe0e\ufe0f")  # zero-width joiner and variation selectors: they belong to their neighbour


def cut_end(text: str, begin: int, end: int) -> int:
    """The end of a piece of a text that begins at `begin` and should end by `end`.

    It is after the last line, else sentence, else word that ends in the second half of the piece. In a text without these it is at `end`,
    or a little later, to keep a character together with its accents.
    """
    if end >= len(text):
        return len(text)
    middle = begin + (end - begin) // 2
    position = text.rfind("\n", middle, end) + 1
    for pattern in _BREAKS if not position else ():
        position = max((match.end() for match in pattern.finditer(text, middle, end)), default=0)
        if position:
            break
    position = position or end
    while position < len(text) and _belong_together(text[position - 1], text[position]):
        position += 1
    return position


def _belong_together(before: str, after: str) -> bool:
    is_line_end = before == "\r" and after == "\n"
    return is_line_end or after in _JOINERS or before == "\u200d" or unicodedata.combining(after) != 0


def local_files(path: Path, *, excluded: Path | None = None) -> list[TextFile]:
    """The file itself, or all files below a folder except hidden ones and bytecode, named by their path below it.

    Args:
        path: a file or a folder.
        excluded: a file or folder that is also left out.

    Raises:
        ValueError: the folder has no files.
    """
    if path.is_file():
        return [TextFile(_encodable(path.name), path)]
    left_out = None if excluded is None else excluded.resolve()
    files = []
    for found in path.rglob("*"):
        relative = found.relative_to(path)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if left_out is not None and found.resolve().is_relative_to(left_out):
            continue
        if not hidden and found.is_file():
            files.append(TextFile(_encodable(relative.as_posix()), found))
    if not files:
        raise ValueError(
            f"{path} holds no files, expected text, JSONL, JSON, CSV or Parquet files; name another data.corpus"
        )
    return sorted(files)


def _encodable(name: str) -> str:
    """A file's name as text that can be stored, even if its bytes are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def local_documents(
    path: Path, files: Sequence[TextFile], text_column: str, advance: Advance = lambda num_bytes: None
) -> Iterator[dict[str, str]]:
    """Name and text of every document that is not empty.

    Args:
        path: path that the user named. If it is a file that cannot be read as text or records, this is an error. In a folder such a
            file is skipped, counted and reported.
        files: `local_files(path)`.
        text_column: column with the text in JSONL, JSON, CSV and Parquet files. A column `name` names the documents.
        advance: called with the number of bytes that were read.

    Raises:
        ValueError: the named file, or every file of a folder, cannot be read; or a line, row or column is invalid.
    """
    oddities, skipped, num_documents = Oddities(), [], 0
    for file in files:
        try:
            documents = _documents_of(file, text_column, oddities, advance)
        except _OtherContentError as error:
            if path.is_file():
                raise ValueError(f"{file.path} {error}") from None
            skipped.append(f"{file.name}, which {error}")
            continue
        except OSError as error:
            if path.is_file():
                raise
            skipped.append(f"{file.name}, which cannot be read: {error.strerror or error}")
            continue
        for document in documents:
            if document["text"].strip():
                num_documents += 1
                yield document
    oddities.warn()
    if skipped and not num_documents:
        raise ValueError(f"{path} has no file to train on: skipped {len(skipped)}, such as {skipped[0]}")
    if skipped:
        logger.warning("%s: skipped %d of %d files, such as %s", path, len(skipped), len(files), skipped[0])


class _OtherContentError(Exception):
    """A file's content does not match its name or place. This is an error only if the user named the file."""


def _documents_of(file: TextFile, text_column: str, oddities: Oddities, advance: Advance) -> Iterator[dict[str, str]]:
    """The documents of a file. Its name and its beginning are checked at once, before the first document is read."""
    suffix = file.path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_documents(file, text_column, oddities, advance)
    if suffix == GZIP_SUFFIX:
        suffix = file.path.with_suffix("").suffix.lower()
    if suffix in JSONL_SUFFIXES:
        return _jsonl_documents(file, text_column, oddities, advance)
    if suffix == ".json":
        return _json_documents(file, _json_items(file, text_column, advance), text_column, oddities)
    if suffix in DELIMITERS:
        _check_header(file, text_column, DELIMITERS[suffix])
        return _csv_documents(file, text_column, DELIMITERS[suffix], oddities, advance)
    _check_text(file)
    return _text_documents(file, advance)


class _CountedFile(io.FileIO):
    """A file that reports how much of it has been read."""

    def __init__(self, path: Path, advance: Advance) -> None:
        super().__init__(path)
        self._advance = advance

    def readinto(self, buffer: Any, /) -> int:
        count = super().readinto(buffer) or 0
        self._advance(count)
        return count


@contextmanager
def _opened(file: TextFile, advance: Advance = lambda num_bytes: None) -> Iterator[BinaryIO]:
    """Opens the uncompressed content of a file.

    Raises:
        ValueError: the name ends in .gz, and the file is not complete gzip.
    """
    with io.BufferedReader(_CountedFile(file.path, advance), _READ_BYTES) as packed:
        if file.path.suffix.lower() != GZIP_SUFFIX:
            yield packed
            return
        try:
            with gzip.GzipFile(fileobj=packed) as content:
                yield content  # type: ignore[misc]
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"{file.path} is not a whole gzip file ({error}); write it again or leave it out"
            ) from None


def _check_text(file: TextFile) -> None:
    decoder, offset = getincrementaldecoder("utf-8")(), 0
    with _opened(file) as content:
        while chunk := content.read(_READ_BYTES):
            nul = chunk.find(b"\0")
            pending = len(decoder.getstate()[0])
            try:
                if nul >= 0:
                    raise ValueError(f"NUL byte at offset {offset + nul}")
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                raise _not_text(
                    f"byte {error.object[error.start]:#04x} at offset {offset - pending + error.start}"
                ) from None
            except ValueError as error:
                raise _not_text(str(error)) from None
            offset += len(chunk)
        if decoder.getstate()[0]:
            raise _not_text("its last character is cut off")


def _not_text(reason: str) -> _OtherContentError:
    return _OtherContentError(
        f"is not text ({reason}); expected UTF-8: convert it, or name .txt, .jsonl, .json, .csv or .parquet files"
    )


def _text_documents(file: TextFile, advance: Advance) -> Iterator[dict[str, str]]:
    """The text as one document, or in parts of about `PART_CHARACTERS` that together are the file."""
    decoder, text, number = getincrementaldecoder("utf-8")(), "", 0
    with _opened(file, advance) as content:
        while chunk := content.read(_READ_BYTES):
            text += decoder.decode(chunk)
            begin = 0
            while len(text) - begin >= 2 * PART_CHARACTERS:
                end = cut_end(text, begin, begin + PART_CHARACTERS)
                yield {"name": f"{file.name}#{number}", "text": text[begin:end]}
                begin, number = end, number + 1
            text = text[begin:]
    yield {"name": f"{file.name}#{number}" if number else file.name, "text": text}


def _jsonl_documents(
    file: TextFile, text_column: str, oddities: Oddities, advance: Advance
) -> Iterator[dict[str, str]]:
    with _opened(file, advance) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file.path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON ({error}); expected one JSON object a line") from None
            yield _record_document(record, text_column, where, oddities)


def _json_items(file: TextFile, text_column: str, advance: Advance) -> Iterator[tuple[str, Any]]:
    """The records of a JSON file and their places: the items of an array, a single object, or lines as in JSONL.

    Raises:
        _OtherContentError: the file is JSON of another form, or not JSON.
    """
    with _opened(file, advance) as content:
        source = content.read()
    try:
        value = json.loads(source)
    except ValueError as error:
        lines = [(number, line) for number, line in enumerate(source.splitlines(), start=1) if line.strip()]
        try:
            return iter([(f"line {number}", json.loads(line)) for number, line in lines])
        except ValueError:
            raise _OtherContentError(f"is not JSON ({error}); mend it or leave it out") from None
    records = value if isinstance(value, list) else [value]
    if not all(isinstance(record, dict) for record in records) or not any(text_column in record for record in records):
        keys = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise _OtherContentError(
            f"is no array of objects with a {text_column!r}: got {keys}; set data.text_column to where the text is, "
            f"or name it .txt to read it as it stands"
        )
    return ((f"item {number}", record) for number, record in enumerate(records, start=1))


def _json_documents(
    file: TextFile, items: Iterator[tuple[str, Any]], text_column: str, oddities: Oddities
) -> Iterator[dict[str, str]]:
    for place, record in items:
        yield _record_document(record, text_column, f"{file.path}, {place}", oddities)


def _record_document(record: Any, text_column: str, where: str, oddities: Oddities) -> dict[str, str]:
    if not isinstance(record, dict) or text_column not in record:
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where} has no {text_column!r}: got {found}; set data.text_column to where the text is")
    return named_document(text_in(record[text_column], text_column, where), record.get("name"), where, oddities)


@contextmanager
def _csv_rows(file: TextFile, delimiter: str, advance: Advance = lambda num_bytes: None) -> Iterator[Any]:
    """A reader of the rows of a CSV file, whose fields may be of any length."""
    csv.field_size_limit(
        sys.maxsize
    )  # a setting of the whole process, whose default of 128 KiB is too low for long texts
    with _opened(file, advance) as content, io.TextIOWrapper(content, "utf-8-sig", newline="") as lines:
        yield csv.reader(lines, delimiter=delimiter, strict=True)


def _check_header(file: TextFile, text_column: str, delimiter: str) -> None:
    with _csv_rows(file, delimiter) as rows:
        try:
            columns: list[str] = next(rows, [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise _OtherContentError(f"is not CSV in UTF-8 ({error}); mend it or leave it out") from None
    if text_column not in columns:
        raise _OtherContentError(
            f"has no column {text_column!r}: got {columns}; set data.text_column to one of them, or name it .txt to read "
            f"it as it stands"
        )


def _csv_documents(
    file: TextFile, text_column: str, delimiter: str, oddities: Oddities, advance: Advance
) -> Iterator[dict[str, str]]:
    with _csv_rows(file, delimiter, advance) as rows:
        columns = next(rows)
        while True:
            where = f"{file.path}, line {rows.line_num + 1}"
            try:
                row = next(rows, None)
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{where} is not CSV in UTF-8 ({error}); mend it or leave it out") from None
            if row is None:
                return
            if len(row) > len(columns):
                raise ValueError(
                    f"{where} has {len(row)} fields, expected {len(columns)}: quote a text with {delimiter!r} in it"
                )
            if row:
                record = dict(zip(columns, row, strict=False))
                yield named_document(record.get(text_column), record.get("name"), where, oddities)


def _parquet_documents(
    file: TextFile, text_column: str, oddities: Oddities, advance: Advance
) -> Iterator[dict[str, str]]:
    with io.BufferedReader(_CountedFile(file.path, advance)) as content:
        try:
            table = pq.ParquetFile(content)
        except (pa.ArrowInvalid, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file.path} is not a Parquet file ({reason}); convert it or leave it out") from None
        columns = table.schema_arrow.names
        if text_column not in columns:
            raise ValueError(
                f"{file.path} has no column {text_column!r}: got {columns}; set data.text_column to one of them"
            )
        wanted = [text_column, *({"name"} & set(columns) - {text_column})]
        row = 0
        for batch in table.iter_batches(_PARQUET_BATCH_ROWS, columns=wanted):
            for record in batch.to_pylist():
                row += 1
                where = f"{file.path}, row {row}"
                yield named_document(
                    text_in(record[text_column], text_column, where), record.get("name"), where, oddities
                )


def text_in(value: Any, text_column: str, where: str) -> Any:
    """The value of a record's column, with conversations as JSON text.

    Raises:
        ValueError: see `conversation_text`.
    """
    return conversation_text(value, where) if text_column == MESSAGES and value is not None else value


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def named_document(text: Any, name: Any, where: str, oddities: Oddities) -> dict[str, str]:
    """Makes a document of a record's fields. Without a text it is empty, and without a name it is named by its content.

    A lone surrogate, as in a text that was cut by UTF-16 units, becomes U+FFFD.

    Raises:
        ValueError: the text is not a string. `where` is its place.
    """
    if text is None:
        oddities.add("records without a text (null) are left out", where)
        text = ""
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: the text must be a string, got {type(text).__name__}; set data.text_column to another column"
        )
    if not text.isascii():
        text, num_halves = _LONE_SURROGATE.subn("\ufffd", text)
        if num_halves:
            oddities.add("texts have half a character (a lone surrogate), replaced by U+FFFD", where)
    is_named = isinstance(name, str) and name
    return {"name": _LONE_SURROGATE.sub("\ufffd", name) if is_named else content_name(text), "text": text}
