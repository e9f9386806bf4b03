"""Data sets that are generated once and then memory-mapped from the Arrow cache of `datasets`.

Fingerprints are made here, of plain values. By default `datasets` pickles the function and everything it refers to. A tokenizer changes
its state when it is used, so that a second run would not find what the first one stored.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, NamedSplit
from datasets import config as datasets_config
from datasets.exceptions import DatasetGenerationError

# Part of every fingerprint. Increase it whenever the code would store something else for the same arguments.
CACHE_VERSION = 1


def fingerprint(*parts: Any) -> str:
    """A hash of 16 hex digits of JSON-serialisable values and of this version of the cache."""
    text = json.dumps([CACHE_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cache_folder(cache_dir: str | None) -> Path:
    """The folder for prepared data: `cache_dir`, or the cache of `datasets`."""
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
    """The data set of `generator(**arguments)`, read from the cache if `identity` is there, else generated into it.

    Args:
        generator: yields one dict for each row.
        arguments: arguments of `generator`, which do not matter for caching.
        features: columns of the rows.
        split: name for the progress bar and the cache's file.
        identity: fingerprint of everything on which the rows depend.
        cache_dir: see `cache_folder`.
        if_empty: the error message if `generator` yields nothing, which the cache cannot store.

    Raises:
        ValueError: there are no rows. The message is `if_empty`.
        ValueError, OSError: as raised by `generator`. In both cases nothing remains in the cache.
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
        # `datasets` wraps the generator's exception, which is the cause and has the useful message.
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
