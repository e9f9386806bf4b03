"""`transxssm generate`."""

import secrets
import sys
from pathlib import Path

import torch
import typer
from rich.console import Console
from transformers import PreTrainedConfig
from transformers.utils import logging

from transxssm.inspection import activation_bytes, available_bytes, cache_bytes
from transxssm.models import TransXSSMForCausalLM, load_causal_lm, load_tokenizer, read_device
from transxssm.serving import Generation, GenerationSettings, encode_prompt, generate_text
from transxssm.training import run_folder
from transxssm_cli.dtypes import read_dtype

STDIN = "-"


def generate_to_stdout(
    checkpoint: Path, prompt: str, settings: GenerationSettings, *, dtype_name: str, device_name: str
) -> None:
    """Writes the completion to standard output as it comes, and its timing to standard error."""
    dtype = None if dtype_name == "auto" else read_dtype(dtype_name, "auto")
    device = read_device(device_name)
    logging.disable_progress_bar()  # a bar over the loading of weights
    model = load_causal_lm(checkpoint, dtype=dtype, device=device)
    tokenizer = load_tokenizer(checkpoint, model.config)
    is_ours = isinstance(model, TransXSSMForCausalLM)
    trained_here = is_ours or (checkpoint / run_folder.RECIPE).is_file()
    input_ids = encode_prompt(tokenizer, prompt, model.config.get_text_config().vocab_size, trained_here=trained_here)
    if is_ours:
        check_memory(model, input_ids.shape[1], settings.max_new_tokens)
    else:  # whose memory is not known here
        check_positions(model.config, input_ids.shape[1], settings.max_new_tokens)

    console = Console(highlight=False, soft_wrap=True)
    if console.is_terminal:
        console.out(prompt, style="dim", end="", highlight=False)
    generation = generate_text(model, tokenizer, input_ids, write_now, settings)
    if console.is_terminal:
        write_now("\n")
    typer.echo(timing_line(generation, settings, device), err=True)


def new_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbelow(2**32)


def read_prompt(prompt: str, prompt_file: Path | None) -> str:
    """The prompt's text, from the option, a file, or standard input.

    Raises:
        ValueError: two prompts, or one that is no UTF-8 text. OSError: the file can't be read.
    """
    if prompt_file is not None and prompt:
        raise ValueError("got both --prompt and --prompt-file: give one of them")
    if prompt_file is None and prompt != STDIN:
        return prompt
    name, content = (
        ("standard input", sys.stdin.buffer.read()) if prompt_file is None else (prompt_file, prompt_file.read_bytes())
    )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the prompt in {name} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}"
        ) from None


def check_memory(model: TransXSSMForCausalLM, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuses what would not fit, instead of being killed half-way.

    Raises:
        ValueError: the prompt's activations and the cache at the end need more than the device has left.
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
    """Refuses to leave a table of learned positions half-way.

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
    """Such as "1,234.5 MB"."""
    return f"{num_bytes / 1e6:,.1f} MB"


def write_now(text: str) -> None:
    """To standard output, without waiting for a full line."""
    sys.stdout.write(text)
    sys.stdout.flush()


def timing_line(generation: Generation, settings: GenerationSettings, device: torch.device) -> str:
    """Tokens, speed, and what is needed to get the same text again."""
    prompt_speed = generation.num_prompt_tokens / generation.prompt_seconds
    line = f"{generation.num_prompt_tokens} prompt tokens in {generation.prompt_seconds:.2f} s ({prompt_speed:,.0f}/s)"
    line += f", {generation.num_new_tokens} new tokens"
    if generation.decode_seconds and generation.num_new_tokens > 1:
        line += f" ({(generation.num_new_tokens - 1) / generation.decode_seconds:,.1f}/s)"
    choice = "greedy" if settings.temperature == 0 else f"seed {settings.seed}"
    return f"{line}, {choice}, {device}"
