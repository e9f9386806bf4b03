"""Fits a recipe into a number of minutes: settings that it leaves open are chosen for the text and this machine.

The section is `fit: {minutes: 10}`. Settings of the recipe or the command line are kept. The run folder's recipe.yaml records what was
chosen, and a resumed run keeps it.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from transxssm.data import build_tokenizer, load_corpus, text_bytes
from transxssm.models import TransXSSMForCausalLM
from transxssm.models.baselines import language_model_on_meta, new_language_model
from transxssm.training.estimate import measured_step_seconds, rows_per_step
from transxssm.training.recipe import Recipe

# The smallest first; a larger one is taken if it reads at least as many tokens as it has parameters.
PRESETS = ("tiny-conv", "small-conv")
# Bytes of text for each entry of the vocabulary. Rarer entries occur too seldom to be learnt.
BYTES_PER_ENTRY = 1000
# Vocabulary sizes, and bytes per token of English prose in each. Source code and other scripts differ by about a third.
BYTES_PER_TOKEN = {512: 2.1, 1024: 2.6, 2048: 3.0, 4096: 3.4}
# Number of tokens from which longer rows are used.
MANY_TOKENS = 1_000_000
ROW_TOKENS, SHORT_ROW_TOKENS, SHORTEST_ROW_TOKENS = 512, 256, 16
# In runs of ten to twenty passes the held-out loss was lowest after six on 100 kB of prose and after four on 465 kB, and rose from then on.
MOST_PASSES = 5
FEWEST_STEPS = 50
# Share of the minutes for training, without evaluation and checkpoints.
TRAINING_SHARE = 0.85
# A sample of a long text has this many times what can be read in time, since a part is held out and tokens may be longer than estimated.
SAMPLE_SHARE = 1.25


@dataclasses.dataclass(frozen=True)
class _Choice:
    """A recipe that fits, and the choices in it."""

    recipe: Recipe
    step_seconds: float
    num_steps: int
    tokens_per_step: int
    num_parameters: int

    @property
    def tokens(self) -> int:
        return self.num_steps * self.tokens_per_step


def fitted(recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe with values for all settings that it leaves open, and a line about them.

    If the recipe has a number of steps that is marked as open, that number is lowered to fit into the time, and nothing else is chosen.

    Raises:
        ValueError: there are several processes, which would choose differently, or the corpus cannot be read.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "fit: got several processes, expected one, which measures the machine: start it alone, then start them with the "
            "recipe.yaml of its run folder"
        )
    if "training.max_steps" in recipe.open_settings and "max_steps" in recipe.training:
        return _shortened(recipe)
    corpus = load_corpus(recipe.data)
    num_bytes = text_bytes(corpus.train) if isinstance(corpus.train, Dataset) else math.inf
    vocab_size = next(
        (size for size in BYTES_PER_TOKEN if num_bytes < 1.5 * size * BYTES_PER_ENTRY), max(BYTES_PER_TOKEN)
    )
    num_tokens = num_bytes / BYTES_PER_TOKEN[vocab_size]
    if recipe.data.tokenizer == "bytes":
        num_tokens = num_bytes
    many = num_tokens >= MANY_TOKENS
    row = 2 ** int(math.log2(max(num_tokens / 16, SHORTEST_ROW_TOKENS))) if not many else ROW_TOKENS
    recipe = recipe.with_choices(
        {
            "data.vocab_size": vocab_size,
            "data.sequence_length": row if many else min(row, SHORT_ROW_TOKENS),
            "data.held_out_fraction": 0.05 if many else 0.1,
        },
    )
    if recipe.data.tokenizer != "bpe":
        vocab_size = len(build_tokenizer(recipe.data, corpus))
    choice = _choice(recipe, PRESETS[0], vocab_size, num_tokens)
    for preset in PRESETS[1:] if "model.preset" in recipe.open_settings else ():
        larger = recipe.with_choices({"model.preset": preset})
        # It reads at most as many tokens as the smaller one does, which often saves a measurement.
        if choice.tokens < language_model_on_meta(_config(larger, vocab_size)).num_parameters():
            break
        candidate = _choice(recipe, preset, vocab_size, num_tokens)
        if candidate.tokens < candidate.num_parameters:
            break
        choice = candidate

    sample = min(num_tokens, choice.tokens * SAMPLE_SHARE)
    chosen = choice.recipe.with_choices({"training.max_steps": choice.num_steps})
    size = "a stream" if math.isinf(num_bytes) else f"{num_bytes / 1e6:,.2f} MB of text"
    if sample < num_tokens and "data.max_bytes" in recipe.open_settings and not recipe.data.streaming:
        max_bytes = int(sample * num_bytes / num_tokens)
        share = 0.02 if sample >= 2 * MANY_TOKENS else recipe.data.held_out_fraction
        chosen = chosen.with_choices({"data.max_bytes": max_bytes, "data.held_out_fraction": share})
        size = f"{size}, of which it takes a sample of {max_bytes / 1e6:,.2f} MB"
    line = (
        f"fitted to {size}, and {recipe.fit['minutes']:g} minutes at most: {choice.num_parameters / 1e6:.1f}M parameters, "
        f"vocabulary of {vocab_size:,}, {choice.num_steps:,} steps of {choice.tokens_per_step:,} tokens, "
        f"{choice.tokens / sample:.2g} passes over the text"
    )
    return chosen.closed(), line


def _shortened(recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe with its number of steps lowered to fit into the time."""
    _, step_seconds = _measured(recipe, recipe.data.vocab_size)
    steps, most = recipe.training["max_steps"], max(1, int(recipe.fit["minutes"] * 60 * TRAINING_SHARE / step_seconds))
    if steps <= most:
        return recipe.closed(), ""
    shorter = {"training.max_steps": most}
    for name in ("eval_steps", "save_steps"):
        every = recipe.training[name]
        if every >= 1:  # otherwise it is a share of all steps
            shorter[f"training.{name}"] = max(1, round(every * most / steps))
    line = (
        f"a step takes {step_seconds:,.2f} s on this machine: {most:,} of the recipe's {steps:,} steps fit into "
        f"{recipe.fit['minutes']:g} minutes"
    )
    return recipe.with_choices(shorter).closed(), line


def _choice(recipe: Recipe, preset: str, vocab_size: int, num_tokens: float) -> _Choice:
    recipe = recipe.with_choices({"model.preset": preset})
    model_size, step_seconds = _measured(recipe, vocab_size)
    tokens_per_step = rows_per_step(recipe.training_arguments()) * recipe.data.sequence_length
    if "training.max_steps" in recipe.open_settings:
        affordable = recipe.fit["minutes"] * 60 * TRAINING_SHARE / step_seconds
        steps = min(affordable, max(FEWEST_STEPS, MOST_PASSES * num_tokens / tokens_per_step))
    else:
        epochs = recipe.training.get("num_train_epochs", 1)
        steps = recipe.training.get("max_steps") or epochs * num_tokens / tokens_per_step
    return _Choice(recipe, step_seconds, max(1, int(steps)), tokens_per_step, model_size)


def _measured(recipe: Recipe, vocab_size: int) -> tuple[int, float]:
    """Number of parameters of the recipe's model, and seconds of a step."""
    arguments = recipe.training_arguments()
    with torch.random.fork_rng():
        model = new_language_model(_config(recipe, vocab_size)).to(arguments.device)
        row = torch.randint(vocab_size, (recipe.data.sequence_length,))
        seconds = measured_step_seconds(
            model,
            arguments,
            batch_of=lambda count: {"input_ids": row.repeat(count, 1), "labels": row.repeat(count, 1)},
            loss_of=partial(_loss, model),
        )
    return model.num_parameters(), seconds


def _loss(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch, **({"skip_logits": True} if isinstance(model, TransXSSMForCausalLM) else {})).loss


def _config(recipe: Recipe, vocab_size: int) -> Any:
    return recipe.language_model_config(vocab_size=vocab_size)
