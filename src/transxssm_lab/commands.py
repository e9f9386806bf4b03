"""`transxssm benchmark` and `transxssm study`: their options. What they do is in `benchmark_command` and `study_command`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from transxssm_cli.places import require_extra, require_recipe

benchmark = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

Preset = Annotated[str, typer.Option(help="Sizes: tiny, small, 320m or 1.3b.")]
Batch = Annotated[int, typer.Option(help="Sequences at once.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, …")]
Repeats = Annotated[int, typer.Option(help="Timed runs of each contender; they take turns.")]
BudgetMinutes = Annotated[float, typer.Option(help="Wall time for everything; what does not fit is left out and said.")]
MemoryLimit = Annotated[
    float | None,
    typer.Option(
        "--memory-limit-gb",
        help="Memory that a contender may take on the CPU. Default: nine tenths of what is free.",
        show_default=False,
    ),
]
Threads = Annotated[int | None, typer.Option(help="Of the CPU. Default: torch's own choice.", show_default=False)]
Output = Annotated[
    Path | None,
    typer.Option(
        help="Folder for JSON, Markdown and PNG; an unfinished run there is gone on with. Default: under runs/benchmarks.",
        show_default=False,
    ),
]


@benchmark.callback()
def about() -> None:
    """Measure speed and memory here: whole models against matched baselines, or single operators."""
    require_extra("lab")


@benchmark.command()
def throughput(
    preset: Preset = "small",
    contenders: Annotated[
        str,
        typer.Option(
            help="Of transxssm, transxssm-compiled, transxssm-graph, transxssm-ssd, llama, llama-compiled, llama-eager, llama-static, "
            "llama-graph, mamba2, jamba."
        ),
    ] = "transxssm,llama,mamba2,jamba",
    modes: Annotated[
        str, typer.Option(help="Of train, prefill, decode, train-autocast, train-checkpointed, optimizer.")
    ] = "train,prefill,decode",
    lengths: Annotated[str, typer.Option(help="Tokens of a sequence, such as 1K,4096,64K.")] = "1K,4K,16K",
    batch: Batch = 1,
    dtype: Dtype = "float32",
    device: Device = "auto",
    chunk_size: Annotated[
        int | None, typer.Option(help="Of TransXSSM's scan. Default: the preset's.", show_default=False)
    ] = None,
    repeats: Repeats = 5,
    budget_minutes: BudgetMinutes = 20.0,
    memory_limit_gb: MemoryLimit = None,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """TransXSSM against Llama, Mamba-2 and Jamba with as many parameters, over the length (the paper's Figure 4).

    Ctrl-C keeps what was measured; the same command goes on from there.

    Example: [cyan]transxssm benchmark throughput --lengths 1K,4K,16K,64K --modes prefill --budget-minutes 60[/]
    """
    from transxssm_lab.benchmark_command import names_in, run_throughput_command

    run_throughput_command(
        preset=preset,
        contenders=names_in(contenders),
        modes=names_in(modes),
        lengths=names_in(lengths),
        batch=batch,
        dtype=dtype,
        device=device,
        chunk_size=chunk_size,
        repeats=repeats,
        budget_minutes=budget_minutes,
        memory_limit_gb=memory_limit_gb,
        threads=threads,
        output=output,
    )


@benchmark.command()
def decode(
    preset: Preset = "small",
    contenders: Annotated[
        str,
        typer.Option(
            help="Of transxssm, transxssm-compiled, transxssm-graph, transxssm-ssd, llama, llama-eager, llama-static, llama-graph, "
            "mamba2, jamba."
        ),
    ] = "transxssm,llama,llama-static,mamba2,jamba",
    length: Annotated[str, typer.Option(help="Tokens of the prompt, such as 4096 or 4K.")] = "1K",
    batches: Annotated[str, typer.Option(help="Sequences at once, such as 1,8,64; smallest first.")] = "1,2,4,8",
    dtype: Dtype = "float32",
    device: Device = "auto",
    repeats: Annotated[int, typer.Option(help="Timed runs of each contender at each batch.")] = 5,
    budget_minutes: BudgetMinutes = 20.0,
    memory_limit_gb: MemoryLimit = None,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """Decoding over the batch, up to the largest that fits: TransXSSM, Llama, Mamba-2 and Jamba with as many parameters.

    Ctrl-C keeps what was measured; the same command goes on from there.

    Example: [cyan]transxssm benchmark decode --preset 1.3b --device cuda --dtype bfloat16 --length 4K --batches 1,4,16,64,256,1024[/]
    """
    from transxssm_lab.benchmark_command import names_in, run_decode_command

    run_decode_command(
        preset=preset,
        contenders=names_in(contenders),
        length=length,
        batches=names_in(batches),
        dtype=dtype,
        device=device,
        repeats=repeats,
        budget_minutes=budget_minutes,
        memory_limit_gb=memory_limit_gb,
        threads=threads,
        output=output,
    )


@benchmark.command()
def ops(
    preset: Preset = "small",
    lengths: Annotated[str, typer.Option(help="Tokens of a sequence, such as 1K,4096,64K.")] = "1K,4K",
    batch: Batch = 1,
    dtype: Dtype = "float32",
    device: Device = "auto",
    repeats: Repeats = 5,
    budget_minutes: BudgetMinutes = 20.0,
    memory_limit_gb: MemoryLimit = None,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """The scan against attention, its quadratic form and transformers' Mamba-2 scan; the loss with and without logits.

    Ctrl-C keeps what was measured; the same command goes on from there.
    """
    from transxssm_lab.benchmark_command import names_in, run_ops_command

    run_ops_command(
        preset=preset,
        lengths=names_in(lengths),
        batch=batch,
        dtype=dtype,
        device=device,
        repeats=repeats,
        budget_minutes=budget_minutes,
        memory_limit_gb=memory_limit_gb,
        threads=threads,
        output=output,
    )


@benchmark.command()
def serving(
    preset: Preset = "small",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    clients: Annotated[
        str, typer.Option(help="Requests at once with short prompts, such as 1,4,16.")
    ] = "1,2,4,8,16,32,64",
    prompt: Annotated[int, typer.Option(help="Tokens of a short prompt.")] = 64,
    new: Annotated[int, typer.Option(help="Tokens that follow a short prompt.")] = 64,
    long_prompt: Annotated[str, typer.Option(help="Tokens of a long prompt, such as 4K.")] = "4K",
    long_clients: Annotated[int, typer.Option(help="Requests at once with long prompts.")] = 16,
    long_new: Annotated[int, typer.Option(help="Tokens that follow a long prompt.")] = 128,
    repeats: Annotated[int, typer.Option(help="Timed turns of each load; both servers take turns.")] = 3,
    cache_gb: Annotated[float, typer.Option(help="Cache of each server.")] = 2.0,
    budget_minutes: BudgetMinutes = 60.0,
    output: Output = None,
) -> None:
    """Our model and a Llama with as many parameters in vLLM, under the same load: throughput, time to first token, between tokens.

    Needs vLLM (`make serve` builds an environment that has it).

    Example: [cyan]transxssm benchmark serving --clients 1,16 --long-clients 4 --repeats 1[/]
    """
    from transxssm_lab.benchmark_command import names_in, run_serving_command

    run_serving_command(
        preset=preset,
        dtype=dtype,
        clients=names_in(clients),
        prompt=prompt,
        new=new,
        long_prompt=long_prompt,
        long_clients=long_clients,
        long_new=long_new,
        repeats=repeats,
        cache_gb=cache_gb,
        budget_minutes=budget_minutes,
        output=output,
    )


def study(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [section.key=value]...",
            help="A bundled study or a YAML file, then settings that override it. Without one, it lists the bundled studies.",
            show_default=False,
        ),
    ] = None,
    budget_minutes: Annotated[
        float | None,
        typer.Option(
            help="Wall time for everything; a run that is cut off goes on the next time. Default: no limit.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="CELL", help="Run this cell; may be given several times.", show_default=False),
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Show the plan, run nothing.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report", help="Write the tables of what has been run, run nothing.")
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="N|all",
            help="Spread the cells over GPUs, a process each. Default: one after the other.",
            show_default=False,
        ),
    ] = None,
    jobs_per_gpu: Annotated[int, typer.Option(min=1, help="Processes on a GPU at a time, with --gpus.")] = 1,
) -> None:
    """Train and evaluate a grid of models alike: same data in the same order, tuned learning rates, one table.

    Ctrl-C keeps what was run; the same command goes on from there.

    Examples: [cyan]transxssm study[/], [cyan]transxssm study table2-cpu --list[/], [cyan]transxssm study table2-cpu --budget-minutes 60[/],
    [cyan]transxssm study table2-gpu --gpus all --jobs-per-gpu 3[/]
    """
    started = time.monotonic()
    require_extra("lab")
    if arguments:
        require_recipe("study", arguments[0], arguments[1:])
    from transxssm_lab.study_command import (
        list_studies,
        report_command,
        run_study_command,
        show_plan,
        spread_study_command,
    )

    if list_only and report_only:
        raise ValueError("--list shows the plan and --report the tables: leave one out")
    if not arguments:
        list_studies()
    elif list_only:
        show_plan(arguments[0], arguments[1:], only or [])
    elif report_only:
        if only or budget_minutes is not None:
            raise ValueError("--report writes the tables of all that is there: leave out --only and --budget-minutes")
        report_command(arguments[0], arguments[1:])
    elif gpus is not None:
        if budget_minutes is not None:
            raise ValueError("--budget-minutes is for a study in one process: leave out it or --gpus")
        spread_study_command(arguments[0], arguments[1:], only=only or [], gpus=gpus, jobs_per_gpu=jobs_per_gpu)
    else:
        run_study_command(arguments[0], arguments[1:], only=only or [], budget_minutes=budget_minutes, started=started)
