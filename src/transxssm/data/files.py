"""Documents out of local files: text (a file is a document), JSONL (a line is one), Parquet (a row is one)."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
# A text file that is the whole corpus is cut at line ends into parts of about this size, so that a part can be held out.
PART_BYTES = 32 * 1024
_PARQUET_BATCH_ROWS = 1024


class TextFile(NamedTuple):
    """A file and the name its documents go by."""

    name: str
    path: Path


def decode(content: bytes) -> str:
    """UTF-8 text of a file's content, unchanged to the byte.

    Raises:
        ValueError: NUL bytes, or not UTF-8.
    """
    position = content.find(b"\0")
    if position >= 0:
        raise ValueError(f"NUL byte at offset {position}")
    return content.decode("utf-8")


def content_name(text: str) -> str:
    """The name of a document that has none: a digest of its text, so that copies share a split."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def local_files(path: Path) -> list[TextFile]:
    """The file itself, or every file below a folder, hidden ones and bytecode left out; named by their path below it.

    Raises:
        ValueError: a folder without files.
    """
    if path.is_file():
        return [TextFile(path.name, path)]
    files = []
    for found in path.rglob("*"):
        relative = found.relative_to(path)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if not hidden and found.is_file():
            files.append(TextFile(relative.as_posix(), found))
    if not files:
        raise ValueError(f"{path} holds no files, expected text, JSONL or Parquet files; name another data.corpus")
    return sorted(files)


def local_documents(path: Path, files: Sequence[TextFile], text_column: str) -> Iterator[dict[str, str]]:
    """Name and text of every document that is not empty.

    Args:
        path: what the user named; a binary file is an error where it was named itself, and skipped in a folder.
        files: `local_files(path)`.
        text_column: of JSONL and Parquet files. A `name` column beside it names the documents.

    Raises:
        ValueError: a file that was named and is not UTF-8 text; a line or column that is not what it should be.
    """
    skipped: list[str] = []
    for file in files:
        suffix = file.path.suffix.lower()
        if suffix in JSONL_SUFFIXES:
            documents = _jsonl_documents(file, text_column)
        elif suffix == ".parquet":
            documents = _parquet_documents(file, text_column)
        elif path.is_file():
            documents = _parts(file)
        else:
            try:
                documents = iter([{"name": file.name, "text": decode(file.path.read_bytes())}])
            except (OSError, ValueError):
                skipped.append(file.name)
                continue
        yield from (document for document in documents if document["text"].strip())
    if skipped:
        logger.warning(
            "%s: skipped %d of %d files, not UTF-8 text, such as %s", path, len(skipped), len(files), skipped[0]
        )


def _parts(file: TextFile) -> Iterator[dict[str, str]]:
    """A text file in parts of `PART_BYTES` or a little more, cut at line ends; together they are the file."""
    part, number = bytearray(), 0
    with file.path.open("rb") as lines:
        for line in lines:
            part += line
            if len(part) >= PART_BYTES:
                yield {"name": f"{file.name}#{number}", "text": _decode_named(file, part)}
                part, number = bytearray(), number + 1
    if part:
        yield {"name": f"{file.name}#{number}", "text": _decode_named(file, part)}


def _decode_named(file: TextFile, content: bytearray) -> str:
    try:
        return decode(bytes(content))
    except ValueError as error:
        raise ValueError(
            f"{file.path} is not text ({error}); expected UTF-8: convert it, or name .txt, .jsonl or .parquet files"
        ) from None


def _jsonl_documents(file: TextFile, text_column: str) -> Iterator[dict[str, str]]:
    with file.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file.path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON ({error}); expected one JSON object a line") from None
            if not isinstance(record, dict) or text_column not in record:
                found = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(
                    f"{where} has no {text_column!r}: got {found}; set data.text_column to where the text is"
                )
            yield named_document(record[text_column], record.get("name"), where)


def _parquet_documents(file: TextFile, text_column: str) -> Iterator[dict[str, str]]:
    try:
        table = pq.ParquetFile(file.path)
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
            yield named_document(record[text_column], record.get("name"), f"{file.path}, row {row}")


def named_document(text: Any, name: Any, where: str) -> dict[str, str]:
    """A document of a record's fields; without a text it is empty, without a name it is named by its content.

    Raises:
        ValueError: a text that is no string; `where` says which.
    """
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: the text must be a string, got {type(text).__name__}; set data.text_column to another column"
        )
    return {"name": name if isinstance(name, str) and name else content_name(text), "text": text}
