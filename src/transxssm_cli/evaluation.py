"""Implements `transxssm evaluate`: reads options, opens model and text, and turns cells into a table and a plot."""

import hashlib
import itertools
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from transxssm.data import AlgorithmicTask, DataArguments, Haystack, RecallTask, load_corpus
from transxssm.evaluation import (
    CellPlan,
    Decoding,
    Results,
    ResultTable,
    TokenScorer,
    expand_groups,
    first_process_first,
    harness_plans,
    harness_table,
    is_first,
    is_shared,
    joined,
    judge_for,
    longest_document,
    needle_plans,
    needle_table,
    perplexity_plans,
    perplexity_table,
    plot_harness,
    plot_needle,
    plot_perplexity,
    plot_recall,
    recall_plans,
    recall_table,
    require_harness,
    select_documents,
)
from transxssm.machine import device_name, versions
from transxssm.models import TransXSSMConfig, load_causal_lm, load_tokenizer, read_device
from transxssm.models.checkpoint import read_dtype
from transxssm.plotting import reason_without_pictures
from transxssm.training import Recipe, load_recipe, run_folder
from transxssm.whole_files import write_text_whole
from transxssm_cli.tables import show, table_of
from transxssm_cli.training import quiet_progress_bars

EVALUATION_FOLDER = "evaluation"
# Files of a checkpoint folder on which results depend.
CHECKPOINT_FILES = ("config.json", "*.safetensors", "*.bin", "tokenizer.json")


SHORTEST = 512  # shortest default length, or the length in training if that is shorter
EXTRAPOLATION = 4  # longest default length, relative to the length in training
LONGEST_DEFAULT = 65_536


__all__ = [
    "Place",
    "TextOptions",
    "evaluate_algorithmic",
    "evaluate_harness",
    "evaluate_needle",
    "evaluate_perplexity",
    "evaluate_recall",
]

logger = logging.getLogger(__name__)

DEFAULT_HAYSTACK = "python-stdlib"
HAYSTACK_PROMPTS = 8  # length of the haystack in longest prompts, so that prompts differ
SCANNED_DOCUMENTS = 10_000  # documents of a large corpus that are read to find their lengths


@dataclass(frozen=True)
class Place:
    """A model and the folder of its results, as the command line names them."""

    checkpoint: Path
    dtype: str
    device: str
    output_dir: Path | None

    def load_model(self) -> PreTrainedModel:
        """Loads the model.

        Raises:
            ValueError: see `load_causal_lm`, `read_device`, `read_dtype`.
        """
        dtype = None if self.dtype == "auto" else read_dtype(self.dtype, "auto")
        device = read_device(self.device)
        if device.type == "cuda" and is_shared():
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)  # the device on which kernels are launched
        transformers_logging.disable_progress_bar()  # hides the bar for the loading of weights
        return load_causal_lm(self.checkpoint, dtype=dtype, device=device)

    def settings(self, model: PreTrainedModel) -> dict[str, str]:
        """The settings that identify the model: a digest of its files, the dtype and the kind of device."""
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
        """The recipe of the run to which the checkpoint belongs, if there is one."""
        run = self._run
        return None if run is None else load_recipe(run / run_folder.RECIPE)

    @property
    def results_folder(self) -> Path:
        """The folder for results."""
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
    """Options that name a source of text. At most one may be given."""

    corpus: str | None
    recipe: str | None
    text_file: Path | None


@dataclass(frozen=True)
class TextSource:
    """Documents, with a name and an identity."""

    texts: Iterable[str]
    name: str
    identity: str

    @property
    def settings(self) -> dict[str, str]:
        return {"text": self.name, "text_identity": self.identity}


def open_text(options: TextOptions, recipe: Recipe | None, default: str | None) -> TextSource:
    """Opens the text that the options name. It defaults to the run's held-out text, or else to that of the corpus `default`.

    Raises:
        ValueError: several texts are named, there is no text, or it cannot be read.
    """
    named = [value for value in (options.corpus, options.recipe, options.text_file) if value is not None]
    if len(named) > 1:
        raise ValueError("got several texts: give one of --corpus, --recipe and --text-file")
    if options.text_file is not None:
        return _text_of_file(options.text_file)
    if options.recipe is not None:
        return _held_out_text(load_recipe(options.recipe).data)
    if options.corpus is not None:
        return _held_out_text(DataArguments(corpus=options.corpus))
    if recipe is not None:
        return _held_out_text(recipe.data)
    if default is not None:
        return _held_out_text(DataArguments(corpus=default))
    raise ValueError(
        "the checkpoint is no run that names a corpus: give --corpus (such as python-stdlib), --recipe, or --text-file"
    )


def training_length_of(given: int | None, recipe: Recipe | None, config: PreTrainedConfig) -> int | None:
    """The number of tokens in a row of the model's training: given, from the recipe, or from another model's configuration.

    None if none of them has it.
    """
    if given is not None:
        return given
    if recipe is not None:
        return recipe.data.sequence_length
    if isinstance(
        config, TransXSSMConfig
    ):  # its max_position_embeddings may be a default that was not used in training
        return None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def context_of_run(model: PreTrainedModel) -> dict[str, Any]:
    """The environment of a measurement."""
    return {"device": device_name(torch.device(model.device)), "versions": versions()}


def _text_of_file(path: Path) -> TextSource:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: expected a text to evaluate on")
    return TextSource([text], path.name, hashlib.sha256(content).hexdigest()[:16])


def _held_out_text(data: DataArguments) -> TextSource:
    with first_process_first():
        corpus = load_corpus(data)
    return TextSource(_Texts(corpus.held_out), f"held out of {data.corpus}", corpus.identity)


class _Texts:
    """The texts of a data set, which are read lazily and can be read repeatedly."""

    def __init__(self, documents: Any) -> None:
        self.documents = documents

    def __iter__(self) -> Iterator[str]:
        return (document["text"] for document in self.documents)


def default_lengths(training_length: int | None, longest: int) -> list[int]:
    """Powers of two from 512 up to four times the training's length (64K if that is unknown), at most `longest`.

    Raises:
        ValueError: no length fits.
    """
    first = SHORTEST if training_length is None else min(SHORTEST, training_length)
    limit = LONGEST_DEFAULT if training_length is None else min(EXTRAPOLATION * training_length, LONGEST_DEFAULT)
    lengths = [length for power in range(17) if (length := first * 2**power) <= min(limit, longest)]
    if not lengths:
        raise ValueError(
            f"no text is as long as the shortest default window of {first} tokens: the longest has {longest}; choose --lengths"
        )
    return lengths


def read_numbers(option: str, text: str) -> list[int]:
    """Reads comma-separated whole numbers, in ascending order. K means 1024.

    Raises:
        ValueError: the text is something else, or a number is below 1.
    """
    return sorted({_number(option, part) for part in text.split(",")})


def read_shares(option: str, text: str) -> list[float]:
    """Reads comma-separated numbers from 0 to 1, in ascending order.

    Raises:
        ValueError: the text is something else.
    """
    try:
        shares = sorted({float(part) for part in text.split(",")})
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"{option}: got {text!r}, expected numbers from 0 to 1, such as 0,0.5,1")
    return shares


def read_sizes(text: str) -> list[tuple[int, int]]:
    """Reads lengths and numbers of pairs, such as 64/4,128/8.

    Raises:
        ValueError: the text is something else.
    """
    sizes = []
    for part in text.split(","):
        length, slash, pairs = part.partition("/")
        if not slash:
            raise ValueError(f"--sizes: got {part!r}, expected tokens/pairs, such as 64/4,128/8")
        sizes.append((_number("--sizes", length), _number("--sizes", pairs)))
    return sizes


def read_stride(text: str, length: int) -> int:
    """Reads the stride of windows of a length, in tokens.

    Raises:
        ValueError: the text is neither half, nor rolling, nor a number.
    """
    match text:
        case "half":
            return max(1, length // 2)
        case "rolling":
            return length - 1
        case _:
            try:
                return _number("--stride", text)
            except ValueError:
                raise ValueError(f"--stride: got {text!r}, expected half, rolling or a number of tokens") from None


def require_positive(**options: int | None) -> None:
    """Checks the numbers of options, by their names in Python. None stands for an option that was not given.

    Raises:
        ValueError: one is below 1.
    """
    for name, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1: got {value}")


def _number(option: str, text: str) -> int:
    digits = text.strip().upper()
    factor = 1024 if digits.endswith("K") else 1
    digits = digits.removesuffix("K")
    if not digits.isdecimal() or int(digits) < 1:
        raise ValueError(f"{option}: got {text.strip()!r}, expected whole numbers from 1 on, such as 512,1K,64K")
    return int(digits) * factor


@joined()
def evaluate_perplexity(
    place: Place,
    text: TextOptions,
    *,
    lengths: str | None,
    stride: str,
    min_tokens: int | None,
    max_tokens: int,
    training_length: int | None,
    batch_tokens: int,
) -> None:
    """`transxssm evaluate CHECKPOINT perplexity`."""
    chosen = None if lengths is None else read_numbers("--lengths", lengths)
    require_positive(max_tokens=max_tokens, batch_tokens=batch_tokens, training_length=training_length)
    quiet_progress_bars()
    recipe = place.recipe
    model = (
        place.load_model()
    )  # loaded first, so that the error for a mistyped folder is about the model and not about text
    source = open_text(text, recipe, default=None)
    tokenizer = load_tokenizer(place.checkpoint, model.config)
    trained = training_length_of(training_length, recipe, model.config)
    if chosen is None:
        longest = longest_document(itertools.islice(source.texts, SCANNED_DOCUMENTS), tokenizer)
        chosen = default_lengths(trained, min(longest, max_tokens))
    strides = {length: read_stride(stride, length) for length in chosen}
    min_tokens = max(chosen) if min_tokens is None else min_tokens
    documents = select_documents(source.texts, tokenizer, min_tokens=min_tokens, max_tokens=max_tokens)
    settings = source.settings | {"stride": stride, "min_tokens": min_tokens, "max_tokens": max_tokens}
    plans = perplexity_plans(TokenScorer(model), documents, strides=strides, batch_tokens=batch_tokens)
    results = _measure(place, model, "perplexity", settings, plans)
    cells = results.cells.values()
    _publish(results, perplexity_table(cells), lambda path: plot_perplexity(path, cells, trained))


@joined()
def evaluate_needle(
    place: Place,
    text: TextOptions,
    *,
    lengths: str | None,
    depths: str,
    examples: int,
    distractors: int,
    decoding: str,
    training_length: int | None,
    seed: int,
) -> None:
    """`transxssm evaluate CHECKPOINT needle`."""
    chosen = None if lengths is None else read_numbers("--lengths", lengths)
    shares = read_shares("--depths", depths)
    kinds = [str(kind) for kind in Decoding]
    if decoding not in kinds:
        raise ValueError(f"unknown decoding {decoding!r}: expected {' or '.join(kinds)}")
    require_positive(examples=examples, training_length=training_length)
    if distractors < 0 or seed < 0:
        raise ValueError(f"--distractors and --seed must not be negative: got {distractors} and {seed}")
    quiet_progress_bars()
    recipe = place.recipe
    source = open_text(text, recipe, default=DEFAULT_HAYSTACK)
    model = place.load_model()
    tokenizer = load_tokenizer(place.checkpoint, model.config)
    if chosen is None:
        chosen = default_lengths(training_length_of(training_length, recipe, model.config), LONGEST_DEFAULT)
    # Independent of the lengths of this call, so that a later one with longer prompts uses the same text.
    haystack = Haystack(source.texts, tokenizer, max_tokens=HAYSTACK_PROMPTS * max(LONGEST_DEFAULT, *chosen))
    settings = source.settings | {
        "examples": examples,
        "distractors": distractors,
        "decoding": decoding,
        "seed": seed,
        "haystack_lines": len(haystack.lines),
    }
    plans = needle_plans(
        judge_for(Decoding(decoding), TokenScorer(model), haystack),
        haystack,
        lengths=chosen,
        depths=shares,
        num_examples=examples,
        num_distractors=distractors,
        seed=seed,
    )
    results = _measure(place, model, "needle", settings, plans)
    cells = results.cells.values()
    _publish(results, needle_table(cells), lambda path: plot_needle(path, cells))


@joined()
def evaluate_recall(place: Place, *, sizes: str, vocab_size: int, examples: int, seed: int, batch_tokens: int) -> None:
    """`transxssm evaluate CHECKPOINT recall`."""
    tasks = [RecallTask(length, num_pairs, vocab_size) for length, num_pairs in read_sizes(sizes)]
    require_positive(examples=examples, batch_tokens=batch_tokens)
    if seed < 0:
        raise ValueError(f"--seed must not be negative: got {seed}")
    model = place.load_model()
    plans = recall_plans(TokenScorer(model), tasks, num_examples=examples, seed=seed, batch_tokens=batch_tokens)
    results = _measure(place, model, "recall", {"vocab_size": vocab_size, "examples": examples, "seed": seed}, plans)
    cells = results.cells.values()
    _publish(results, recall_table(cells), lambda path: plot_recall(path, cells))


@joined()
def evaluate_algorithmic(place: Place, *, task: str, lengths: str, examples: int, seed: int, batch_tokens: int) -> None:
    """`transxssm evaluate CHECKPOINT algorithmic`."""
    tasks = [AlgorithmicTask(task, length) for length in read_numbers("--lengths", lengths)]
    require_positive(examples=examples, batch_tokens=batch_tokens)
    if seed < 0:
        raise ValueError(f"--seed must not be negative: got {seed}")
    model = place.load_model()
    plans = recall_plans(TokenScorer(model), tasks, num_examples=examples, seed=seed, batch_tokens=batch_tokens)
    results = _measure(place, model, "algorithmic", {"examples": examples, "seed": seed}, plans)
    cells = results.cells.values()
    _publish(results, recall_table(cells), lambda path: plot_recall(path, cells))


def evaluate_harness(
    place: Place,
    *,
    tasks: str,
    include_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
) -> None:
    """`transxssm evaluate CHECKPOINT harness`."""
    release = require_harness()
    require_positive(limit=limit, batch_size=batch_size)
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"--num-fewshot must not be negative: got {num_fewshot}")
    quiet_progress_bars()
    names = expand_groups([name.strip() for name in tasks.split(",") if name.strip()])
    if not names:
        raise ValueError("--tasks is empty: expected names such as piqa,winogrande or transxssm-paper")
    if not logging.getLogger("transxssm").isEnabledFor(logging.INFO):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it would warn of every default
    model = place.load_model()
    tokenizer = load_tokenizer(place.checkpoint, model.config)
    plans = harness_plans(
        model,
        tokenizer,
        names,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
    )
    results = _measure(place, model, "harness", {"lm_eval": release, "num_fewshot": num_fewshot, "limit": limit}, plans)
    _publish(results, harness_table(results.cells), lambda path: plot_harness(path, results.cells))


def _measure(
    place: Place, model: PreTrainedModel, evaluation: str, settings: dict[str, Any], plans: Sequence[CellPlan]
) -> Results:
    """Measures the missing cells, with a bar on a terminal and elsewhere a line for each cell."""
    path = place.results_folder / f"{evaluation}.json"
    context = {"command": shlex.join(["transxssm", *sys.argv[1:]])} | context_of_run(model)
    _say_how_many_gpus(model, evaluation)
    results = Results.open(path, evaluation, place.settings(model) | settings, context)
    with _progress(evaluation, sum(plan.num_steps for plan in plans)) as (console, advance):

        def finished(key: str) -> None:
            if is_first() and not console.is_terminal:
                console.print(f"{evaluation} {key}: {sum(plan.key in results.cells for plan in plans)} of {len(plans)}")

        try:
            results.measure(plans, advance, finished)
        except KeyboardInterrupt:
            done = sum(plan.key in results.cells for plan in plans)
            kept = f"; {done} of {len(plans)} cells are in {path}" if done else ""
            raise KeyboardInterrupt(f"the same command goes on from here{kept}") from None
    return results


def _say_how_many_gpus(model: PreTrainedModel, evaluation: str) -> None:
    if model.device.type == "cuda" and not is_shared() and torch.cuda.device_count() > 1 and evaluation != "harness":
        logger.warning("%d GPUs are here and this evaluation takes one; on all: --gpus all", torch.cuda.device_count())


@contextmanager
def _progress(evaluation: str, num_steps: int) -> Iterator[tuple[Console, Callable[[int], object]]]:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    bar = Progress(
        TextColumn(evaluation),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (is_first() and console.is_terminal),
    )
    with bar:
        task = bar.add_task("", total=num_steps)
        yield console, lambda steps: bar.advance(task, steps)


def _publish(results: Results, table: ResultTable, plot: Callable[[Path], None]) -> None:
    """Shows the table and writes it next to the JSON file, with a plot. Only the first process does so."""
    if not is_first():
        return
    picture, page = results.path.with_suffix(".png"), results.path.with_suffix(".md")
    reason = reason_without_pictures()
    if reason is None:
        plot(picture)
    else:
        picture.unlink(missing_ok=True)  # it shows earlier cells
        typer.echo(f"{picture.name} is not drawn: {reason}", err=True)
    shown = f"![{results.evaluation}]({picture.name})\n\n" if reason is None else ""
    settings = "".join(f"- {key}: {value}\n" for key, value in results.settings.items())
    write_text_whole(
        page,
        f"# {results.evaluation}\n\n{table.to_markdown()}\n{shown}{settings}"
        f"\n`{results.context['command']}` on {results.context['device']}\n",
    )
    show(table_of(table.headings, table.rows))
    written = [str(results.path), page.name, *([picture.name] if reason is None else [])]
    typer.echo(", ".join(written), err=True)
