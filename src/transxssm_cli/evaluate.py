"""`transxssm evaluate CHECKPOINT …` and its options. `transxssm_cli.evaluation` implements the commands."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transxssm_cli.places import checkpoint_folder, require_path, require_recipe

if TYPE_CHECKING:
    from transxssm_cli.evaluation import Place

app = typer.Typer(
    name="evaluate",
    help="Measure what a model can do: a table, and JSON, Markdown and a picture in one folder.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Dtype = Annotated[str, typer.Option(help="Of the weights: auto (as saved), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, …")]
OutputDir = Annotated[
    Path | None,
    typer.Option(
        help="Where results go, and go on from. Default: evaluation/ in a run folder, else runs/evaluation/<checkpoint>.",
        show_default=False,
    ),
]
Corpus = Annotated[
    str | None,
    typer.Option(help="Held-out text of this corpus, as in a recipe's data section.", show_default=False),
]
RecipeText = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="Held-out text of this recipe's corpus, of another model's, say.", show_default=False
    ),
]
TextFile = Annotated[
    Path | None, typer.Option(help="One long text: this UTF-8 file, all of it one document.", show_default=False)
]
BatchTokens = Annotated[int, typer.Option(help="Tokens that the model reads at once, at least one sequence.")]
TrainingLength = Annotated[
    int | None,
    typer.Option(
        help="Tokens in a row of the model's training. Default: the recipe's, else the config's.", show_default=False
    ),
]
Gpus = Annotated[
    str | None,
    typer.Option(
        metavar="N|all", help="GPUs that share the work, a process for each. Default: one.", show_default=False
    ),
]
Seed = Annotated[int, typer.Option(help="Of the examples.")]


@app.callback()
def evaluate(
    context: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A run folder, any causal language model in a folder, or owner/name on the hub of models.",
            show_default=False,
        ),
    ],
) -> None:
    """Measure what a model can do: a table, and JSON, Markdown and a picture in one folder.

    Ctrl-C keeps what has been measured; the same command goes on from there. Options come after the command:
    [cyan]transxssm evaluate runs/tiny perplexity --help[/].
    """
    context.obj = checkpoint


@app.command()
def perplexity(
    context: typer.Context,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of the windows, such as 512,1K,64K. Default: 512 … four times the training's.",
            show_default=False,
        ),
    ] = None,
    stride: Annotated[
        str,
        typer.Option(
            help="Tokens from a window to the next: half of its length, rolling (one token shared), or a number."
        ),
    ] = "half",
    min_tokens: Annotated[
        int | None,
        typer.Option(
            help="Leave out shorter documents. Default: those that do not fill the longest window.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of text to take at most.")] = 1_000_000,
    corpus: Corpus = None,
    recipe: RecipeText = None,
    text_file: TextFile = None,
    training_length: TrainingLength = None,
    batch_tokens: BatchTokens = 16_384,
    dtype: Dtype = "auto",
    device: Device = "auto",
    gpus: Gpus = None,
    output_dir: OutputDir = None,
) -> None:
    """Loss per token over windows of growing length, and over the place in the window.

    Every length scores the same tokens: those of held-out documents that fill the longest window.
    """
    _require_text(recipe, text_file)
    place = _place(context.obj, dtype, device, output_dir)
    if _is_launched_on(gpus, device):
        return
    from transxssm_cli.evaluation import TextOptions, evaluate_perplexity

    evaluate_perplexity(
        place,
        TextOptions(corpus, recipe, text_file),
        lengths=lengths,
        stride=stride,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        training_length=training_length,
        batch_tokens=batch_tokens,
    )


@app.command()
def needle(
    context: typer.Context,
    lengths: Annotated[
        str | None,
        typer.Option(help="Tokens of the prompts. Default: 512 … four times the training's.", show_default=False),
    ] = None,
    depths: Annotated[
        str, typer.Option(help="Where the needle is: 0 at the beginning, 1 at the end.")
    ] = "0,0.25,0.5,0.75,1",
    examples: Annotated[int, typer.Option(help="Prompts for each length and depth.")] = 10,
    distractors: Annotated[int, typer.Option(help="Sentences like the needle, about other names.")] = 0,
    decoding: Annotated[str, typer.Option(help="greedy, or teacher-forced (one pass, no cache).")] = "greedy",
    corpus: Corpus = None,
    recipe: RecipeText = None,
    text_file: TextFile = None,
    training_length: TrainingLength = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    gpus: Gpus = None,
    output_dir: OutputDir = None,
) -> None:
    """Find a number again that one sentence in a long text has told: exact answers over length and depth.

    The text around it is the corpus's (without a run: Python's standard library).
    """
    _require_text(recipe, text_file)
    place = _place(context.obj, dtype, device, output_dir)
    if _is_launched_on(gpus, device):
        return
    from transxssm_cli.evaluation import TextOptions, evaluate_needle

    evaluate_needle(
        place,
        TextOptions(corpus, recipe, text_file),
        lengths=lengths,
        depths=depths,
        examples=examples,
        distractors=distractors,
        decoding=decoding,
        training_length=training_length,
        seed=seed,
    )


@app.command()
def recall(
    context: typer.Context,
    sizes: Annotated[str, typer.Option(help="Tokens and pairs of each task.")] = "64/4,128/8,256/16,512/64",
    vocab_size: Annotated[int, typer.Option(help="Token ids of the task are less than this.")] = 8192,
    examples: Annotated[int, typer.Option(help="Sequences for each task.")] = 512,
    seed: Seed = 0,
    batch_tokens: BatchTokens = 16_384,
    dtype: Dtype = "auto",
    device: Device = "auto",
    gpus: Gpus = None,
    output_dir: OutputDir = None,
) -> None:
    """Multi-query associative recall (MQAR, as in Zoology), for models that were trained on it.

    Accuracy and loss at the questions only; token ids are the task's own, no tokenizer is involved.
    """
    place = _place(context.obj, dtype, device, output_dir)
    if _is_launched_on(gpus, device):
        return
    from transxssm_cli.evaluation import evaluate_recall

    evaluate_recall(
        place,
        sizes=sizes,
        vocab_size=vocab_size,
        examples=examples,
        seed=seed,
        batch_tokens=batch_tokens,
    )


@app.command()
def algorithmic(
    context: typer.Context,
    task: Annotated[
        str, typer.Option(help="parity, modular-3, modular-5, s3, s5 (permutations) or copying; that of the training.")
    ],
    lengths: Annotated[str, typer.Option(help="Elements, or letters to copy.")] = "40,64,128,256",
    examples: Annotated[int, typer.Option(help="Sequences for each length.")] = 512,
    seed: Seed = 0,
    batch_tokens: BatchTokens = 16_384,
    dtype: Dtype = "auto",
    device: Device = "auto",
    gpus: Gpus = None,
    output_dir: OutputDir = None,
) -> None:
    """State tracking (the running product in a group) and copying, for models that were trained on them.

    Accuracy of the last state, or of all copied letters; token ids are the task's own, no tokenizer is involved.
    """
    place = _place(context.obj, dtype, device, output_dir)
    if _is_launched_on(gpus, device):
        return
    from transxssm_cli.evaluation import evaluate_algorithmic

    evaluate_algorithmic(place, task=task, lengths=lengths, examples=examples, seed=seed, batch_tokens=batch_tokens)


@app.command()
def harness(
    context: typer.Context,
    tasks: Annotated[str, typer.Option(help="Names of lm-eval's tasks or groups; transxssm-paper: the paper's seven.")],
    include_path: Annotated[
        Path | None, typer.Option(help="A folder of YAML tasks, which go before lm-eval's.", show_default=False)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question. Default: as the task says.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task. Default: all.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences that the model reads at once.")] = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
    output_dir: OutputDir = None,
) -> None:
    r"""Standard tasks, by lm-evaluation-harness (pip install 'transxssm\[eval]')."""
    if not sys.stderr.isatty():  # lm-eval's bars are tqdm's, which reads this when it is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    require_path("--include-path", include_path)
    place = _place(context.obj, dtype, device, output_dir)
    from transxssm_cli.evaluation import evaluate_harness

    evaluate_harness(
        place,
        tasks=tasks,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
    )


def _place(checkpoint: str, dtype: str, device: str, output_dir: Path | None) -> "Place":
    """The model to evaluate, after a check that it exists. Results of a model on the hub go into a folder with its name."""
    folder = checkpoint_folder(checkpoint)
    if output_dir is None and folder != Path(checkpoint).expanduser():
        output_dir = Path("runs", "evaluation", checkpoint.replace("/", "--"))
    from transxssm_cli.evaluation import Place

    return Place(folder, dtype, device, output_dir)


def _is_launched_on(gpus: str | None, device: str) -> bool:
    """Whether `--gpus` was given. If so, processes have then run the command."""
    if gpus is None:
        return False
    if ":" in device:
        raise ValueError(f"--gpus: got --device {device}, which is one; leave out either")
    from transxssm_cli.launch import launch, number_of_processes

    processes = number_of_processes(gpus, on_cpu=device == "cpu", cpu_setting="--device cpu")
    launch(_without_option("--gpus", sys.argv[1:]), processes, go_on="the same command")
    return True


def _without_option(name: str, arguments: list[str]) -> list[str]:
    """A command line without an option and its value, which may be separated by a blank or an equals sign."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == name:
            next(rest)
        elif not argument.startswith(f"{name}="):
            kept.append(argument)
    return kept


def _require_text(recipe: str | None, text_file: Path | None) -> None:
    require_path("--text-file", text_file)
    if recipe is not None:
        require_recipe("recipe", recipe, [])
