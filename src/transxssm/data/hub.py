"""Documents of a data set on the Hugging Face hub, downloaded or streamed."""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset

from transxssm.data.arguments import DataArguments
from transxssm.data.files import Advance, Oddities, named_document, text_in

_READ_BATCH_DOCUMENTS = 256


def open_hub_dataset(data: DataArguments) -> Dataset | IterableDataset:
    """The hub data set that `data` names, at most `max_documents` of it, with all its columns.

    Raises:
        ConnectionError: the hub cannot be reached.
        ValueError: there is no such data set, configuration, split or column.
    """
    what = " ".join(filter(None, [data.corpus, data.corpus_config, f"(split {data.corpus_split})"]))
    try:
        records = load_dataset(
            data.corpus,
            data.corpus_config,
            split=data.corpus_split,
            streaming=data.streaming,
            cache_dir=data.cache_dir,
        )
    except ConnectionError as error:
        raise ConnectionError(
            f"cannot reach the hub for {what}: {_first_line(error)}; go online, or set data.corpus to a local path or "
            f"python-stdlib"
        ) from error
    except (ValueError, OSError) as error:
        raise ValueError(
            f"cannot load {what} from the hub: {_first_line(error)}; check data.corpus, data.corpus_config and "
            f"data.corpus_split"
        ) from error
    columns = records.column_names or list(
        next(iter(records), {})
    )  # a stream may not know its columns before its first record
    if data.text_column not in columns:
        raise ValueError(
            f"{what} has no column {data.text_column!r}: got {columns}; set data.text_column to one of them"
        )
    if data.max_documents is None:
        return records
    if isinstance(records, IterableDataset):
        return records.take(data.max_documents)
    return records.select(range(min(data.max_documents, len(records))))


def hub_documents(
    records: Dataset | IterableDataset, text_column: str, advance: Advance = lambda num_records: None
) -> Iterator[dict[str, str]]:
    """Name and text of every record that is not empty. A record is named by its `name` or else by its content.

    Args:
        records: records of a data set.
        text_column: column with the text.
        advance: called for every record that is read.

    Raises:
        ValueError: a text is not a string.
    """
    number, oddities = 0, Oddities()
    for batch in records.iter(_READ_BATCH_DOCUMENTS):
        names: list[Any] = (
            batch["name"] if "name" in batch and text_column != "name" else [None] * len(batch[text_column])
        )
        for text, name in zip(batch[text_column], names, strict=True):
            number += 1
            advance(1)
            document = named_document(
                text_in(text, text_column, f"record {number}"), name, f"record {number}", oddities
            )
            if document["text"].strip():
                yield document
    oddities.warn()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
