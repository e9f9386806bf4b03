"""Standard tasks, measured by the Language Model Evaluation Harness (the package lm-eval) with the loaded model."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transxssm.evaluation.results import Advance, Cell, CellPlan, ResultTable
from transxssm.plotting import BLUE, picture
from transxssm.wording import one_line

# The tasks of the paper's Table 3. The paper does not say which part of ARC it uses, so that both are run.
PAPER_GROUP = "transxssm-paper"
GROUPS = {PAPER_GROUP: ("mmlu", "triviaqa", "piqa", "hellaswag", "openbookqa", "winogrande", "ai2_arc")}
# The metrics that the paper calls accuracy. The first that a task has is used.
ACCURACIES = ("acc", "exact_match")


def require_harness() -> str:
    """The version of lm-eval.

    Raises:
        ValueError: it is not installed. The message says how to install it.
    """
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        raise ValueError(
            "the harness needs the package lm-eval: install it with pip install 'transxssm[eval]'"
        ) from None


def expand_groups(names: Sequence[str]) -> list[str]:
    """Names of tasks for lm-eval, each once. This package's own groups are replaced by their tasks."""
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))


def harness_plans(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
) -> list[CellPlan]:
    """Plans one cell for each task, or group of tasks that lm-eval knows.

    Args:
        model, tokenizer: the model and its tokenizer, which adds the first token of a prompt, as with lm-eval's own `hf` backend.
        tasks: names from `expand_groups`.
        include_path: a folder of YAML tasks, which take precedence over lm-eval's own.
        num_fewshot: examples before each question. Defaults to each task's own number.
        limit: number of questions of each task, from the first on. Defaults to all.
        batch_size: sequences that the model reads at once.

    Raises:
        ValueError: lm-eval is not installed, `include_path` is not a folder, or a task is unknown.
    """
    require_harness()
    from lm_eval.models.huggingface import HFLM

    manager = _task_manager(tasks, include_path)
    adapter = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    return [
        CellPlan(
            key=task,
            num_steps=1,
            measure=partial(measure_task, adapter, task, manager, num_fewshot, limit),
        )
        for task in tasks
    ]


def measure_task(
    adapter: Any, task: str, manager: Any, num_fewshot: int | None, limit: int | None, advance: Advance
) -> Cell:
    """Measures a task with lm-eval.

    Args:
        adapter: a model of lm-eval.
        task: a task, group or tag.
        manager: lm-eval's TaskManager that knows the task.
        num_fewshot, limit: see `harness_plans`.

    Returns:
        results: metric names to values, by task; shots, samples and versions by task.

    Raises:
        ValueError: the task's data cannot be loaded.
    """
    from lm_eval import simple_evaluate

    try:
        report = simple_evaluate(
            model=adapter, tasks=[task], task_manager=manager, num_fewshot=num_fewshot, limit=limit, log_samples=False
        )
    except OSError as error:  # a connection, a missing file
        reason = one_line(error)
        raise ValueError(
            f"the data of task {task} cannot be had: {reason}; go online once, or name a local task with --include-path"
        ) from error
    advance(1)
    return {
        "results": {name: _metrics(values) for name, values in report["results"].items()},
        "shots": report["n-shot"],
        "samples": {name: count["effective"] for name, count in report["n-samples"].items()},
        "versions": report["versions"],
    }


def harness_table(cells: Mapping[str, Cell]) -> ResultTable:
    """A row for each metric of a task. A group has only its aggregate. With all of the paper's tasks, their mean comes last."""
    rows = []
    for task, cell in cells.items():
        names = [task] if task in cell["results"] else list(cell["results"])
        for name in names:
            for metric, value in cell["results"][name].items():
                if not metric.endswith("_stderr"):
                    error = cell["results"][name].get(f"{metric}_stderr")
                    shots = cell["shots"].get(name, "")
                    rows.append([name, metric, str(shots), f"{value:.4f}", "–" if error is None else f"{error:.4f}"])
    if all(task in cells for task in GROUPS[PAPER_GROUP]):
        rows.append(["mean of the paper's seven", "acc, exact_match", "", f"{paper_mean(cells):.4f}", "–"])
    return ResultTable(["task", "metric", "shots", "value", "± s.e."], rows)


def accuracy(task: str, cell: Cell) -> float:
    """Accuracy, or exact match if a task has none. For a tag it is the mean of its tasks."""
    names = [task] if task in cell["results"] else list(cell["results"])
    return math.fsum(_accuracy(cell["results"][name]) for name in names) / len(names)


def paper_mean(cells: Mapping[str, Cell]) -> float:
    """Mean accuracy of the paper's seven tasks, with equal weights."""
    tasks = GROUPS[PAPER_GROUP]
    return math.fsum(accuracy(task, cells[task]) for task in tasks) / len(tasks)


def _accuracy(metrics: Mapping[str, float]) -> float:
    # A filter's name may follow the metric's: TriviaQA has "exact_match,remove_whitespace".
    return next(
        (value for wanted in ACCURACIES for name, value in metrics.items() if name.split(",")[0] == wanted), math.nan
    )


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Renames lm-eval's "acc,none" and "acc_stderr,none" to "acc" and "acc_stderr", and keeps only finite numbers."""
    metrics = {}
    for key, value in values.items():
        name, comma, filter_name = key.partition(",")
        if not comma or isinstance(value, str) or value is None:
            continue
        base, stderr = name.removesuffix("_stderr"), "_stderr" if name.endswith("_stderr") else ""
        metrics[f"{base}{'' if filter_name == 'none' else ',' + filter_name}{stderr}"] = float(value)
    return metrics


def _task_manager(tasks: Iterable[str], include_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"no folder of tasks {include_path}: expected one with YAML files in it")
    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager  # loading the thousands of tasks of lm-eval takes long
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"unknown task {unknown[0]!r}: expected {', '.join(GROUPS)}, a name that `lm-eval ls tasks` shows, or one in --include-path"
        )
    return manager


def plot_harness(path: Path, cells: Mapping[str, Cell]) -> None:
    """Plots the accuracy of every task, or the exact match if it has none."""
    with picture(path) as axes:
        values = [accuracy(task, cell) for task, cell in cells.items()]
        axes.barh(list(cells), values, color=BLUE)
        for row, value in enumerate(values):
            axes.text(value, row, f" {value:.1%}", va="center", fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(False, axis="y")
        axes.set_xlabel("accuracy")
