"""`transxssm demo`: trains and measures a model, generates text, and prints where the files are."""

import json
import lzma
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers.utils import logging

from transxssm.data import EMBEDDED_CORPORA, DataArguments, load_corpus
from transxssm.models import load_model, load_tokenizer
from transxssm.serving import GenerationSettings, encode_prompt, generate_text
from transxssm.training import Recipe, load_recipe, run_folder, train
from transxssm.training.run_folder import read_summary
from transxssm_cli.training import opening_words, quiet_progress_bars

XZ_PRESET = 9
# The promised time. On a slower machine the run is shortened to it.
TRAINING_MINUTES = 5
SHORTENED = ("training.max_steps", "training.eval_steps", "training.save_steps")
# Prompts and seeds, which are fixed so that a demonstration can be repeated. The prompt for a user's own text is its first words.
COMPLETIONS = (("def fibonacci(", 0), ("import os\n\n\nclass ", 1))
NEW_TOKENS = 120

Point = tuple[float, float]


def run_demo(recipe_name: str, overrides: list[str]) -> None:
    """Trains a recipe, or resumes it, unless it has finished. Then it shows the result."""
    recipe = _within_the_time(load_recipe(recipe_name, overrides), overrides)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    run_dir = recipe.output_dir
    finished = read_summary(run_dir) is not None
    if not finished:
        console.print(f"Training the recipe {recipe.name} on {recipe.data.corpus}, into {run_dir}.")
        console.print("Ctrl-C stops it; the same command goes on from there.\n")
    quiet_progress_bars()
    try:
        summary = train(recipe, resume=run_folder.holds_run(run_dir))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from the last checkpoint") from None
    recipe = run_folder.stored_recipe(run_dir) or recipe  # with the settings that were chosen for this machine
    _show_loss(console, run_dir)
    _show_bits_per_byte(console, recipe.data, summary)
    _show_completions(console, run_dir, _prompts(recipe))
    _show_places(console, recipe)
    if finished:
        console.print(f"\nThis run had finished before. To train it again: rm -r {run_dir}, then the same command.")


def _within_the_time(recipe: Recipe, overrides: list[str]) -> Recipe:
    """The recipe, marked to be shortened to `TRAINING_MINUTES` on a slow machine, unless the user has set its length."""
    asked_for = any(override.partition("=")[0].strip() in SHORTENED for override in overrides)
    if asked_for or recipe.fit or recipe.training.get("max_steps", -1) < 1:
        return recipe
    fit = {"minutes": TRAINING_MINUTES}
    begun = run_folder.stored_recipe(recipe.output_dir)
    if begun is not None and begun.fit != fit:  # the user has set its length
        return recipe
    return replace(recipe, fit=fit, open_settings=frozenset(SHORTENED))


def _prompts(recipe: Recipe) -> list[tuple[str, int]]:
    """Prompts, which are beginnings of documents like those of the corpus, and seeds."""
    if recipe.data.corpus in EMBEDDED_CORPORA:
        return list(COMPLETIONS)
    return [(opening_words(recipe.data), seed) for _, seed in COMPLETIONS]


def xz_bits_per_byte(texts: Iterator[str]) -> tuple[float, int]:
    """Bits per byte of the concatenated texts under `xz -9`, and their number of bytes."""
    content = "".join(texts).encode("utf-8")
    return 8 * len(lzma.compress(content, preset=XZ_PRESET)) / len(content), len(content)


def loss_points(metrics: Path, key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows of metrics.jsonl that have the key."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row[key]) for row in rows if key in row]


def _show_loss(console: Console, run_dir: Path) -> None:
    metrics = run_dir / run_folder.METRICS
    console.print("\nLoss in nats per token over steps: · training, o held out")
    for line in chart({"·": loss_points(metrics, "loss"), "o": loss_points(metrics, "eval_loss")}):
        console.print(line)
    if (run_dir / run_folder.LOSS_PLOT).exists():  # drawn if matplotlib is installed
        console.print(f"The same as a picture: {run_dir / run_folder.LOSS_PLOT}")


def _show_bits_per_byte(console: Console, data: DataArguments, summary: dict[str, Any]) -> None:
    held_out = load_corpus(data).held_out
    xz, num_bytes = xz_bits_per_byte(held_out["text"])
    model = (
        f"{summary['parameters'] / 1e6:.1f}M parameters after {summary['train_tokens'] / 1e6:.2f}M tokens "
        f"and {summary['train_seconds'] / 60:.1f} minutes"
    )
    console.print(f"\nBits per byte on {len(held_out)} held-out files, {num_bytes:,} bytes that it was not trained on:")
    console.print(f"  {summary['bits_per_byte']:.3f}  this model, {model}")
    console.print(f"  {xz:.3f}  xz -{XZ_PRESET}, on the same files concatenated")


def _show_completions(console: Console, run_dir: Path, prompts: list[tuple[str, int]]) -> None:
    logging.disable_progress_bar()  # hides the bar for the loading of weights
    model = load_model(run_dir, dtype=None, device=torch.device("cpu"))
    tokenizer = load_tokenizer(run_dir, model.config)
    for prompt, seed in prompts:
        pieces: list[str] = []
        input_ids = encode_prompt(tokenizer, prompt, model.config.vocab_size)
        settings = GenerationSettings(max_new_tokens=NEW_TOKENS, seed=seed)
        generate_text(model, tokenizer, input_ids, pieces.append, settings)
        console.print(f"\nIt continues {prompt!r} (seed {seed}):")
        console.print(Text.assemble((prompt, "dim"), "".join(pieces)))


def _show_places(console: Console, recipe: Recipe) -> None:
    run_dir = recipe.output_dir
    # In a virtual environment that is not active, the bare name would not be found.
    command = "transxssm" if shutil.which("transxssm") else sys.argv[0]
    console.print(
        f"""
Everything lies in {run_dir}: the model (model.safetensors, config.json, tokenizer.json), {run_folder.RECIPE},
{run_folder.METRICS}, summary.json, {run_folder.TENSORBOARD}/ and the last checkpoints.

In Python:
  import transxssm
  from transformers import AutoModelForCausalLM, AutoTokenizer
  model = AutoModelForCausalLM.from_pretrained("{run_dir}")
  tokenizer = AutoTokenizer.from_pretrained("{run_dir}")

Next:
  {command} generate {run_dir} --prompt {shlex.quote(_prompts(recipe)[0][0])}
  {command} info {run_dir}
  {command} train laptop data.corpus=my_texts/   # a text, JSONL, CSV or Parquet file of your own, or a folder of them: ten minutes"""
    )


def chart(series: Mapping[str, Sequence[Point]], *, width: int = 64, height: int = 12) -> list[str]:
    """Draws points over common axes as lines of text.

    Args:
        series: points (x, y), by the character with which they are drawn. Later ones cover earlier ones.
        width, height: size of the area for points, in characters.

    Raises:
        ValueError: there is no point.
    """
    points = [point for line in series.values() for point in line]
    if not points:
        raise ValueError("a chart needs at least one point: got none")
    (left, right), (bottom, top) = ((min(values), max(values)) for values in zip(*points, strict=True))
    rows = [[" "] * width for _ in range(height)]
    for mark, line in series.items():
        for x, y in line:
            column = _place(x, left, right, width)
            row = _place(y, top, bottom, height)
            rows[row][column] = mark
    labels = {0: f"{top:.2f}", height - 1: f"{bottom:.2f}"}
    margin = max(map(len, labels.values()))
    lines = [f"{labels.get(index, ''):>{margin}} ┤{''.join(row).rstrip()}" for index, row in enumerate(rows)]
    lines.append(f"{'':{margin}} └{'─' * width}")
    lines.append(f"{'':{margin}}  {left:<{width // 2},.0f}{right:>{width - width // 2},.0f}")
    return lines


def _place(value: float, first: float, last: float, size: int) -> int:
    """Index of the cell that contains a value, among `size` cells from `first` to `last`."""
    return round((value - first) / (last - first) * (size - 1)) if last != first else 0
