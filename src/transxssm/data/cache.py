"""Data sets that are generated once and then memory-mapped out of the Arrow cache of `datasets`.

Every fingerprint is made here, of plain values. Left to itself, `datasets` pickles the function and all it refers to; a
tokenizer changes its own state when it is used, so a second run would not find what the first one stored.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, NamedSplit
from datasets import config as datasets_config
from datasets.exceptions import DatasetGenerationError

# Part of every fingerprint: raise it whenever the code would store something else for the same arguments.
CACHE_VERSION = 1


def fingerprint(*parts: Any) -> str:
    """16 hex digits that stand for JSON-able values (and for this version of the cache)."""
    text = json.dumps([CACHE_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cache_folder(cache_dir: str | None) -> Path:
    """Where prepared data is kept: `cache_dir`, or the cache of `datasets`."""
    return Path(cache_dir or datasets_config.HF_DATASETS_CACHE).expanduser()


def generated_dataset(
    generator: Callable[..., Iterator[dict[str, Any]]],
    arguments: dict[str, Any],
    *,
    features: Features,
    split: str,
    identity: str,
    cache_dir: str | None,
    if_empty: str,
) -> Dataset:
    """The data set of `generator(**arguments)`: out of the cache where `identity` is known, else generated into it.

    Args:
        generator: yields one dict a row.
        arguments: for `generator`. Not looked at for caching.
        features: columns of the rows.
        split: name for the progress bar and the cache's file.
        identity: fingerprint of everything that the rows depend on.
        cache_dir: see `cache_folder`.
        if_empty: what is wrong, and what to do, where `generator` yields nothing (which the cache could not hold).

    Raises:
        ValueError: no rows: `if_empty`.
        ValueError, OSError: as raised by `generator`. Either way nothing stays in the cache.
    """
    try:
        return Dataset.from_generator(
            _at_least_one,
            features=features,
            cache_dir=str(cache_folder(cache_dir)),
            gen_kwargs={"generator": generator, "arguments": arguments, "if_empty": if_empty},
            split=NamedSplit(split),
            fingerprint=identity,
        )
    except DatasetGenerationError as error:
        # `datasets` wraps what the generator raised; the cause is what says what is wrong, and where.
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise


def _at_least_one(
    generator: Callable[..., Iterator[dict[str, Any]]], arguments: dict[str, Any], if_empty: str
) -> Iterator[dict[str, Any]]:
    row = None
    for row in generator(**arguments):
        yield row
    if row is None:
        raise ValueError(if_empty)
