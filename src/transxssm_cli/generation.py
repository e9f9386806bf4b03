"""`transxssm generate`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from transxssm.inspection import activation_bytes, available_bytes, cache_bytes
from transxssm.models import TransXSSMForCausalLM, load_causal_lm, load_tokenizer, read_device
from transxssm.models.checkpoint import read_dtype
from transxssm.serving import Generation, GenerationSettings, encode_prompt, generate_text
from transxssm.training import run_folder


def generate_to_stdout(
    checkpoint: Path, prompt: str, settings: GenerationSettings, *, dtype_name: str, device_name: str
) -> None:
    """Writes the completion to standard output as it comes, and its timing to standard error."""
    model, tokenizer, [input_ids] = _ready(checkpoint, [prompt], settings, dtype_name, device_name)
    console = Console(highlight=False, soft_wrap=True)
    if console.is_terminal:
        console.out(prompt, style="dim", end="", highlight=False)
    generation = generate_text(model, tokenizer, input_ids, write_now, settings)
    if console.is_terminal:
        write_now("\n")
    typer.echo(timing_line(generation, settings, model.device), err=True)


def generate_each_to_stdout(
    checkpoint: Path, prompts: Sequence[str], settings: GenerationSettings, *, dtype_name: str, device_name: str
) -> None:
    """Writes a line of JSON for each prompt, in order and as soon as it is done. Each is continued as if it were alone."""
    model, tokenizer, encoded = _ready(checkpoint, prompts, settings, dtype_name, device_name)
    for prompt, input_ids in zip(prompts, encoded, strict=True):
        pieces: list[str] = []
        generation = generate_text(model, tokenizer, input_ids, pieces.append, settings)
        write_now(json.dumps({"prompt": prompt, "completion": "".join(pieces)}, ensure_ascii=False) + "\n")
        typer.echo(timing_line(generation, settings, model.device), err=True)


def _ready(
    checkpoint: Path, prompts: Sequence[str], settings: GenerationSettings, dtype_name: str, device_name: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Tensor]]:
    """Loads model and tokenizer, and encodes the prompts, after a check that the longest of them fits."""
    dtype = None if dtype_name == "auto" else read_dtype(dtype_name, "auto")
    device = read_device(device_name)
    logging.disable_progress_bar()  # hides the bar for the loading of weights
    model = load_causal_lm(checkpoint, dtype=dtype, device=device)
    tokenizer = load_tokenizer(checkpoint, model.config)
    is_ours = isinstance(model, TransXSSMForCausalLM)
    trained_here = is_ours or (checkpoint / run_folder.RECIPE).is_file()
    vocab_size = model.config.get_text_config().vocab_size
    encoded = [encode_prompt(tokenizer, prompt, vocab_size, trained_here=trained_here) for prompt in prompts]
    longest = max(input_ids.shape[1] for input_ids in encoded)
    if is_ours:
        check_memory(model, longest, settings.max_new_tokens)
    else:  # the memory of other models is not known
        check_positions(model.config, longest, settings.max_new_tokens)
    return model, tokenizer, encoded


def check_memory(model: TransXSSMForCausalLM, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """Checks that generation fits into memory.

    Raises:
        ValueError: the prompt's activations and the final cache need more memory than the device has left.
    """
    config, dtype = model.config, model.dtype
    cache = cache_bytes(config, num_prompt_tokens + max_new_tokens, dtype).total
    activations = activation_bytes(config, num_prompt_tokens, dtype)
    available = available_bytes(model.device)
    if cache + activations > available:
        raise ValueError(
            f"a prompt of {num_prompt_tokens:,} tokens and {max_new_tokens:,} new ones need about {megabytes(cache + activations)} "
            f"(activations {megabytes(activations)}, cache {megabytes(cache)}), but {model.device} has {megabytes(available)} left: "
            "shorten the prompt, or choose a smaller --dtype"
        )


def check_positions(config: PreTrainedConfig, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """Checks that the text fits into a table of learned positions.

    Raises:
        ValueError: the text would be longer than the table.
    """
    config = config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None or getattr(config, "rope_parameters", None):
        return
    if num_prompt_tokens + max_new_tokens > longest:
        raise ValueError(
            f"the model has {longest:,} positions: got a prompt of {num_prompt_tokens:,} tokens and {max_new_tokens:,} new ones; "
            "shorten the prompt, or give a smaller --max-new-tokens"
        )


def megabytes(num_bytes: int) -> str:
    """Formats bytes, such as "1,234.5 MB"."""
    return f"{num_bytes / 1e6:,.1f} MB"


def write_now(text: str) -> None:
    """Writes to standard output, without waiting for a full line."""
    sys.stdout.write(text)
    sys.stdout.flush()


def timing_line(generation: Generation, settings: GenerationSettings, device: torch.device) -> str:
    """A line with tokens, speed, and the settings that reproduce the text."""
    prompt_speed = generation.num_prompt_tokens / generation.prompt_seconds
    line = f"{generation.num_prompt_tokens} prompt tokens in {generation.prompt_seconds:.2f} s ({prompt_speed:,.0f}/s)"
    line += f", {generation.num_new_tokens} new tokens"
    if generation.decode_seconds and generation.num_new_tokens > 1:
        line += f" ({(generation.num_new_tokens - 1) / generation.decode_seconds:,.1f}/s)"
    choice = "greedy" if settings.temperature == 0 else f"seed {settings.seed}"
    return f"{line}, {choice}, {device}"
