"""`transxssm evaluate`: from options to cells, and from cells to a table, Markdown and a picture."""

import itertools
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from transxssm.data import Haystack, RecallTask
from transxssm.evaluation import (
    CellPlan,
    Decoding,
    Results,
    ResultTable,
    TokenScorer,
    expand_groups,
    harness_plans,
    harness_table,
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
from transxssm.models import load_tokenizer
from transxssm.whole_files import write_text_whole
from transxssm_cli.evaluation_options import (
    LONGEST_DEFAULT,
    default_lengths,
    read_numbers,
    read_shares,
    read_sizes,
    read_stride,
    require_positive,
)
from transxssm_cli.evaluation_source import Place, TextOptions, context_of_run, open_text, training_length_of
from transxssm_cli.tables import show, table_of
from transxssm_cli.training import quiet_progress_bars

__all__ = ["Place", "TextOptions", "evaluate_harness", "evaluate_needle", "evaluate_perplexity", "evaluate_recall"]

DEFAULT_HAYSTACK = "python-stdlib"
HAYSTACK_PROMPTS = 8  # so many of the longest prompts the haystack is long, so that prompts differ
SCANNED_DOCUMENTS = 10_000  # of a large corpus, to see how long its documents are


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
    model = place.load_model()  # first: of a mistyped folder one would hear that it names no text
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
    # Whatever the lengths of this call, so that a later one with longer prompts lays the same text.
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
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default it takes
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
    """Measures what is not measured yet, with a bar on a terminal and else a line a cell."""
    path = place.results_folder / f"{evaluation}.json"
    context = {"command": shlex.join(["transxssm", *sys.argv[1:]])} | context_of_run(model)
    results = Results.open(path, evaluation, place.settings(model) | settings, context)
    with _progress(evaluation, sum(plan.num_steps for plan in plans)) as (console, advance):

        def finished(key: str) -> None:
            if not console.is_terminal:
                console.print(f"{evaluation} {key}: {sum(plan.key in results.cells for plan in plans)} of {len(plans)}")

        try:
            results.measure(plans, advance, finished)
        except KeyboardInterrupt:
            done = sum(plan.key in results.cells for plan in plans)
            kept = f"; {done} of {len(plans)} cells are in {path}" if done else ""
            raise KeyboardInterrupt(f"the same command goes on from here{kept}") from None
    return results


@contextmanager
def _progress(evaluation: str, num_steps: int) -> Iterator[tuple[Console, Callable[[int], object]]]:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    bar = Progress(
        TextColumn(evaluation),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=num_steps)
        yield console, lambda steps: bar.advance(task, steps)


def _publish(results: Results, table: ResultTable, plot: Callable[[Path], None]) -> None:
    """Shows the table and leaves it beside the JSON, with a picture."""
    picture, page = results.path.with_suffix(".png"), results.path.with_suffix(".md")
    plot(picture)
    settings = "".join(f"- {key}: {value}\n" for key, value in results.settings.items())
    write_text_whole(
        page,
        f"# {results.evaluation}\n\n{table.to_markdown()}\n![{results.evaluation}]({picture.name})\n\n{settings}"
        f"\n`{results.context['command']}` on {results.context['device']}\n",
    )
    show(table_of(table.headings, table.rows))
    typer.echo(f"{results.path}, {page.name}, {picture.name}", err=True)
