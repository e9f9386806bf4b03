"""The commands and their options. `transxssm` and the other modules of this package implement them."""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from transxssm_cli import evaluate
from transxssm_cli.one_line_errors import OneLineErrors
from transxssm_cli.places import (
    DEFAULT_RECIPE,
    checkpoint_folder,
    require_model,
    require_path,
    require_recipe,
    require_run,
    split_arguments,
)
from transxssm_lab.commands import benchmark, study

# transformers and datasets read these when they are imported.
LIBRARY_VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY")
PACKAGES = ("transxssm", "transxssm_lab")  # their log messages are shown as they are
# Loggers of installed packages that log while transformers is imported although nothing is wrong.
CHATTY = ("bitsandbytes", "torchao", "torch.utils._pytree")
# OpenMP's threads wait for one another at the end of every operator, and libgomp, which torch's wheels for Linux bring, lets them spin
# 300,000 times there. If another program preempts one thread, the others then spin at full load: beside one busy loop, two threads trained
# at a quarter of their speed. 1000 is libgomp's own count if there are more threads than processors. On an idle machine it slows down
# decoding of a small model on two threads by a third, so that benchmarks, which need an idle machine, do not set it.
SPIN_VARIABLE, SPIN_COUNT = "GOMP_SPINCOUNT", "1000"

app = typer.Typer(
    name="transxssm",
    cls=OneLineErrors,
    help="Train, run and inspect TransXSSM models: state-space and attention layers under one rotary position embedding.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(benchmark, name="benchmark")
app.add_typer(evaluate.app)


def main() -> None:
    """Runs the command line, and ends the process."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"transxssm {version('transxssm')}")
        raise typer.Exit


@app.callback()
def configure(
    context: typer.Context,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show the libraries' own messages and warnings too.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    # If the user has set OMP_WAIT_POLICY, it is respected, like the variable itself.
    if context.invoked_subcommand != "benchmark" and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(SPIN_VARIABLE, SPIN_COUNT)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO if verbose else logging.WARNING)
        logger.propagate = False
    if verbose:
        return
    for variable in LIBRARY_VERBOSITY:
        os.environ.setdefault(variable, "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@app.command()
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [section.key=value]...",
            help="A YAML file or the name of a bundled recipe (default: tiny), then settings that override it.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its last whole checkpoint.")] = False,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="N|all", help="GPUs to train on, a process for each. Default: one.", show_default=False),
    ] = None,
) -> None:
    """Train a model as a recipe says; everything about the run goes into one folder.

    Examples: [cyan]transxssm train[/], [cyan]transxssm train laptop data.corpus=my_texts/[/],
    [cyan]transxssm train my.yaml --resume[/], [cyan]transxssm train my.yaml --gpus all[/]
    """
    name, overrides = split_arguments(arguments or [])
    require_recipe("recipe", name, overrides)
    if resume:
        require_run(name, overrides)
    if gpus is not None:
        from transxssm_cli.training import train_recipe_on

        train_recipe_on(gpus, name, overrides, resume=resume)
        return
    from transxssm_cli.training import train_recipe

    train_recipe(name, overrides, resume=resume)


@app.command()
def generate(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A run folder, a folder written by save_pretrained, or owner/name on the hub of models."),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="Text to continue; - reads it from standard input. Default: what is piped in, else a new document.",
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A UTF-8 file to continue, in place of --prompt.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='A file of prompts, one a line; of .jsonl a string or {"prompt": …}. Writes {"prompt": …, "completion": …} for each.',
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 always takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Sample from so many of the likeliest tokens; 0: from all.")] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, what prompt and text have had already becomes less likely.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Of the random numbers. Default: a new one, which is shown.", show_default=False)
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this string; may be given several times.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, …")] = "auto",
) -> None:
    """Continue a prompt with a language model of this package or any other causal one, token by token as they come.

    The completion alone goes to standard output (on a terminal, after the prompt), timing to standard error.

    Examples: [cyan]transxssm generate runs/tiny -p "def "[/], [cyan]git diff | transxssm generate runs/tiny[/],
    [cyan]transxssm generate runs/tiny --prompts prompts.jsonl > completions.jsonl[/]
    """
    from transxssm_cli.places import new_seed, read_prompt, read_prompts

    if sum(given is not None for given in (prompt, prompt_file, prompts)) > 1:
        raise ValueError("got several prompts: give one of --prompt, --prompt-file and --prompts")
    for option, path in (("--prompt-file", prompt_file), ("--prompts", prompts)):
        require_path(option, path)
    texts = [read_prompt(prompt, prompt_file)] if prompts is None else read_prompts(prompts)
    folder = checkpoint_folder(checkpoint)
    from transxssm.serving import GenerationSettings
    from transxssm_cli.generation import generate_each_to_stdout, generate_to_stdout

    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=new_seed() if seed is None else seed,
        stop_strings=stop or [],
    )
    if prompts is None:
        generate_to_stdout(folder, texts[0], settings, dtype_name=dtype, device_name=device)
    else:
        generate_each_to_stdout(folder, texts, settings, dtype_name=dtype, device_name=device)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT [vLLM's own flags]",
            help="A run folder, a folder written by save_pretrained, or owner/name on the hub of models.",
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one that the machine has.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
) -> None:
    """Serve a model through vLLM: continuous batching, prefix caching, OpenAI's interface. Needs vLLM (docs/guides/serving.md).

    Examples: [cyan]transxssm serve runs/tiny[/], [cyan]transxssm serve runs/tiny --port 9000 --max-model-len 4096[/]
    """
    folder = checkpoint_folder(checkpoint)
    from transxssm_cli.serve import run_server

    assert context.parent is not None
    verbose = context.parent.params["verbose"]
    run_server(folder, context.args, host=host, port=port, verbose=verbose)


@app.command()
def info(
    model: Annotated[
        str,
        typer.Argument(
            metavar="PRESET|CHECKPOINT",
            help="tiny, small, 320m, 1.3b, a model's folder, or owner/name on the hub of models.",
        ),
    ],
    context: Annotated[int, typer.Option(help="Tokens in the sequence that FLOPs are counted for.")] = 4096,
    dtype: Annotated[str, typer.Option(help="Of keys and values: float32, bfloat16 or float16.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON in place of tables.")] = False,
) -> None:
    """Show what a model is made of and costs: parameters, FLOPs per token, bytes per sequence. Loads no weight."""
    folder = require_model(model)
    from transxssm_cli.information import describe, tables

    description = describe(model, folder, context=context, dtype=dtype)
    if as_json:
        typer.echo(json.dumps(description, indent=2))
        return
    console = Console(highlight=False)
    for part in tables(description):
        console.print(part)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="PRESET|CHECKPOINT", help="tiny, small, 320m, 1.3b, … or a folder.")],
    gpus: Annotated[int, typer.Option(help="GPUs in all, eight a machine.")] = 8,
    tokens: Annotated[str, typer.Option(help="To train on, such as 100B.")] = "100B",
    length: Annotated[int, typer.Option(help="Tokens in a row.")] = 4096,
    rows: Annotated[int, typer.Option(help="Rows in a step of each GPU, or of those that share one.")] = 4,
    cp: Annotated[int, typer.Option(help="GPUs that share each row (context parallelism).")] = 1,
    gpu: Annotated[str, typer.Option(help="h100 or h200.")] = "h100",
    link: Annotated[
        float | None,
        typer.Option(
            help="GB/s that a GPU sends to others of its machine. Default: 300, or as measured.", show_default=False
        ),
    ] = None,
    node_link: Annotated[float, typer.Option(help="GB/s that a GPU sends to other machines.")] = 40.0,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure on this machine's GPUs how fast they compute and exchange.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON in place of a table.")] = False,
) -> None:
    """Show what a training run takes on many GPUs: memory by kind, seconds of a step, days and GPU-hours, for each parallelism.

    Examples: [cyan]transxssm plan 1.3b --gpus 64 --tokens 100B[/], [cyan]transxssm plan 1.3b --gpus 8 --length 524288 --rows 1 --cp 8[/]
    """
    folder = require_model(model)
    from transxssm_cli.plan import describe, tables
    from transxssm_cli.tables import show

    sizes = {"gpus": gpus, "length": length, "rows": rows, "cp": cp, "gpu": gpu}
    links = (link, node_link)
    description = describe(model, folder, tokens=tokens, link_gigabytes=links, is_measured=measure, **sizes)
    if as_json:
        typer.echo(json.dumps(description, indent=2))
        return
    show(*tables(description))


@app.command()
def kernels(
    preset: Annotated[str, typer.Option(help="tiny, small, 320m, 1.3b, …, or a checkpoint's folder.")] = "small",
    dtype: Annotated[str, typer.Option(help="Of weights and activations: float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, …")] = "auto",
    length: Annotated[int, typer.Option(min=2, help="Tokens in a row, or in the cache of a decoded token.")] = 4096,
) -> None:
    """Show which implementation of each op runs on this machine in training, prefill and decoding, and why faster ones do not.

    Examples: [cyan]transxssm kernels[/], [cyan]transxssm kernels --preset 320m --dtype float32 --device cpu[/]
    """
    folder = require_model(preset)
    from transxssm_cli.kernels import show_kernels

    show_kernels(preset, folder, dtype_name=dtype, device_name=device, length=length)


@app.command()
def demo(
    recipe: Annotated[str, typer.Option(help="What to train: a bundled recipe or a YAML file.")] = DEFAULT_RECIPE,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Override it.", show_default=False)
    ] = None,
) -> None:
    """Train a small model on Python's own standard library (five minutes at most), show how well it does and let it write.

    Continues by itself where it was interrupted; shows the result again once it has finished.
    """
    require_recipe("recipe", recipe, overrides or [])
    from transxssm_cli.demo import run_demo

    run_demo(recipe, overrides or [])


app.command()(study)
