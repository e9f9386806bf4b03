"""`transxssm train`."""

import os
import re
import shlex
import sys
from collections.abc import Sequence

import datasets
import typer

from transxssm.data import DataArguments, load_corpus
from transxssm.training import Recipe, load_recipe, run_folder, train
from transxssm_cli.launch import launch, number_of_processes
from transxssm_cli.places import setting

LONGEST_PROMPT = 40  # characters


def train_recipe(name: str, overrides: Sequence[str], *, resume: bool) -> None:
    """Trains the recipe that a command line names, and prints the result."""
    recipe = load_recipe(name, overrides)
    quiet_progress_bars()
    try:
        summary = train(recipe, resume=resume)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(str(stop) or "continue with the same command and --resume") from None
    except (ImportError, RuntimeError) as error:  # a package of an optimizer, a kernel or a tracker is missing
        if not isinstance(error, ImportError) and "install" not in str(error):
            raise
        raise ValueError(f"the training section asks for what is not installed here: {error}") from error
    if int(os.environ.get("RANK", "0")) == 0:  # of several processes, as torchrun starts them, only the first prints
        typer.echo(result_line(run_folder.stored_recipe(recipe.output_dir) or recipe, summary))


def train_recipe_on(gpus: str, name: str, overrides: Sequence[str], *, resume: bool) -> None:
    """Trains a recipe in one process for each GPU, after a check of the recipe, so that errors in it are reported once.

    Raises:
        ValueError: the recipe is invalid, or there are fewer GPUs.
    """
    recipe = load_recipe(name, overrides)
    processes = number_of_processes(gpus, on_cpu=setting(name, overrides, "training.use_cpu") is True)
    recipe.check_processes(processes)
    if not resume:
        run_folder.check_empty(recipe.output_dir)
    launch(["train", name, *overrides, *(["--resume"] if resume else [])], processes)


def quiet_progress_bars() -> None:
    """Hides the bars of data preparation outside a terminal, since in a log each of their steps would be a line."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def result_line(recipe: Recipe, summary: dict[str, float]) -> str:
    """Two lines on a finished run: the quality of the model, and the command that generates text."""
    words = opening_words(recipe.data)
    prompt = f" --prompt {shlex.quote(words)}" if words else ""
    return (
        f"{recipe.output_dir}: held-out loss {summary['eval_loss']:.4f}, perplexity {summary['perplexity']:.2f}, "
        f"{summary['bits_per_byte']:.4f} bits per byte after {summary['train_tokens']:,} tokens\n"
        f"try it: transxssm generate {shlex.quote(str(recipe.output_dir))}{prompt}"
    )


def opening_words(data: DataArguments) -> str:
    """The first words of a held-out document, as a prompt like the model's training text. Empty if they are not available."""
    if data.streaming:  # its documents would be downloaded again
        return ""
    try:
        text = load_corpus(data).held_out[0]["text"]
    except (ValueError, OSError):
        return ""
    found = re.search(r"\w\S*(?:[ \t]+\S+){0,2}", text)
    words = found.group() if found else ""
    while len(words) > LONGEST_PROMPT and len(words.split()) > 1:
        words = words.rsplit(maxsplit=1)[0]
    return words[:LONGEST_PROMPT]
