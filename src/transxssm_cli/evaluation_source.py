"""What is evaluated, on which text, and where results go: from the command line's words to models, texts and folders."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from transxssm.data import DataArguments, load_corpus
from transxssm.models import TransXSSMConfig, load_causal_lm, read_device
from transxssm.training import Recipe, load_recipe, run_folder
from transxssm.training.report import device_name, versions
from transxssm_cli.dtypes import read_dtype

EVALUATION_FOLDER = "evaluation"
# What the figures depend on in a checkpoint folder.
CHECKPOINT_FILES = ("config.json", "*.safetensors", "*.bin", "tokenizer.json")


@dataclass(frozen=True)
class Place:
    """A model and the folder of its results, as the command line names them."""

    checkpoint: Path
    dtype: str
    device: str
    output_dir: Path | None

    def load_model(self) -> PreTrainedModel:
        """The model.

        Raises:
            ValueError: see `load_causal_lm`, `read_device`, `read_dtype`.
        """
        dtype = None if self.dtype == "auto" else read_dtype(self.dtype, "auto")
        logging.disable_progress_bar()  # a bar over the loading of weights
        return load_causal_lm(self.checkpoint, dtype=dtype, device=read_device(self.device))

    def settings(self, model: PreTrainedModel) -> dict[str, str]:
        """What identifies the model: a digest of its files, the numbers' type, the kind of device."""
        digest = hashlib.sha256()
        for path in sorted(path for pattern in CHECKPOINT_FILES for path in self.checkpoint.glob(pattern)):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return {
            "checkpoint": digest.hexdigest()[:16],
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
        }

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the run that the checkpoint belongs to, if it is one."""
        run = self._run
        return None if run is None else load_recipe(run / run_folder.RECIPE)

    @property
    def results_folder(self) -> Path:
        """Where results go."""
        if self.output_dir is not None:
            return self.output_dir
        checkpoint, run = self.checkpoint.resolve(), self._run
        if run is None:
            return Path("runs") / EVALUATION_FOLDER / checkpoint.name
        if run.resolve() == checkpoint:
            return run / EVALUATION_FOLDER
        return run / EVALUATION_FOLDER / checkpoint.name

    @property
    def _run(self) -> Path | None:
        """The run folder: the checkpoint itself or the folder around it."""
        for folder in (self.checkpoint, self.checkpoint.resolve().parent):
            if (folder / run_folder.RECIPE).is_file():
                return folder
        return None


@dataclass(frozen=True)
class TextOptions:
    """At most one source of text."""

    corpus: str | None
    recipe: str | None
    text_file: Path | None


@dataclass(frozen=True)
class TextSource:
    """Documents, what they are called, and what identifies them."""

    texts: Iterable[str]
    name: str
    identity: str

    @property
    def settings(self) -> dict[str, str]:
        return {"text": self.name, "text_identity": self.identity}


def open_text(options: TextOptions, recipe: Recipe | None, default: str | None) -> TextSource:
    """The text that the options name; the run's own held-out text if they name none; else that of the corpus `default`.

    Raises:
        ValueError: several texts; none; one that cannot be read.
    """
    named = [value for value in (options.corpus, options.recipe, options.text_file) if value is not None]
    if len(named) > 1:
        raise ValueError("got several texts: give one of --corpus, --recipe and --text-file")
    if options.text_file is not None:
        return _file(options.text_file)
    if options.recipe is not None:
        return _held_out(load_recipe(options.recipe).data)
    if options.corpus is not None:
        return _held_out(DataArguments(corpus=options.corpus))
    if recipe is not None:
        return _held_out(recipe.data)
    if default is not None:
        return _held_out(DataArguments(corpus=default))
    raise ValueError(
        "the checkpoint is no run that names a corpus: give --corpus (such as python-stdlib), --recipe, or --text-file"
    )


def training_length_of(given: int | None, recipe: Recipe | None, config: PreTrainedConfig) -> int | None:
    """The number of tokens in a row of the model's training: given, from the recipe, or from another model's configuration.

    Returns None if none of them says it.
    """
    if given is not None:
        return given
    if recipe is not None:
        return recipe.data.sequence_length
    if isinstance(
        config, TransXSSMConfig
    ):  # whose max_position_embeddings is a default that training need not have met
        return None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def context_of_run(model: PreTrainedModel) -> dict[str, Any]:
    """Where a measurement ran."""
    return {"device": device_name(torch.device(model.device)), "versions": versions()}


def _file(path: Path) -> TextSource:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: expected a text to evaluate on")
    return TextSource([text], path.name, hashlib.sha256(content).hexdigest()[:16])


def _held_out(data: DataArguments) -> TextSource:
    corpus = load_corpus(data)
    return TextSource(_Texts(corpus.held_out), f"held out of {data.corpus}", corpus.identity)


class _Texts:
    """The texts of a data set, read as they are asked for, as often as one likes."""

    def __init__(self, documents: Any) -> None:
        self.documents = documents

    def __iter__(self) -> Iterator[str]:
        return (document["text"] for document in self.documents)
