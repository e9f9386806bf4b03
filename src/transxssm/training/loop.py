"""Runs a recipe: prepares rows and model, trains, and writes the run folder with its summary."""

import errno
import hashlib
import inspect
import logging
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME

from transxssm.data import PackedCollator, build_datasets, build_tokenizer, load_corpus
from transxssm.machine import device_name, versions
from transxssm.models.baselines import new_language_model, use_our_scan
from transxssm.models.checkpoint import load_causal_lm
from transxssm.plotting import reason_without_pictures
from transxssm.training import run_folder
from transxssm.training.callbacks import LastStep, MetricsFile, ProgressDisplay, rows_of
from transxssm.training.checkpoints import (
    SaveError,
    last_complete_checkpoint,
    save_error,
    step_of,
)
from transxssm.training.estimate import (
    FORWARD_SHARE,
    LONG_RUN,
    estimate_line,
    evaluations_left,
    measured_step_seconds,
    number_of_steps,
    rows_per_step,
)
from transxssm.training.fit import fitted
from transxssm.training.interrupt import BudgetSpentError, Interrupt, stopped_at
from transxssm.training.nonfinite import NonFiniteError
from transxssm.training.recipe import Recipe
from transxssm.training.run_folder import SUMMARY, plot_loss, read_summary, write_summary
from transxssm.training.trainer import TransXSSMTrainer, asks_accelerate_to_shard
from transxssm.whole_files import write_text_whole

logger = logging.getLogger(__name__)

Collate = Callable[[Sequence[Any]], dict[str, Tensor]]
_HASHED_ROWS = 4096  # rows that are hashed at once, which bounds the memory. The hash depends on this number

# A multiple that is fast on all hardware. The paper's 50304 is GPT-NeoX's vocabulary rounded up to it.
VOCABULARY_MULTIPLE = 64
# Seconds. The time of a shorter run is not estimated.
SHORTEST_ESTIMATED = 60.0
SMALLEST_RECIPE = "laptop"


@dataclass(frozen=True)
class TrainingData:
    """The data of a run.

    Args:
        train, held_out: data sets for `Trainer`.
        collate: makes a batch of rows: `input_ids` and `labels`, (b, t) int64, and other inputs of a model. Those that the model's
            `forward` does not name are left out.
        held_out_bytes: UTF-8 bytes that the labelled tokens of `held_out` stand for, or None if the data is not text.
        tokenizer: is saved into the run folder, and determines the model's vocabulary. Defaults to the recipe's tokenizer.
        description: a line about the training and the held-out data.
        contents: for each split by name, its number of rows and a hash of its tokens, by which a resumed run checks its data. Streams
            and data that are determined by the recipe alone have no entry.
    """

    train: Dataset
    held_out: Dataset
    collate: Collate
    held_out_bytes: int | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    description: str = ""
    contents: Mapping[str, str] = field(default_factory=dict)


def text_data(recipe: Recipe) -> TrainingData:
    """The packed text that a recipe's data section names.

    Raises:
        ValueError: the text or the tokenizer cannot be read.
    """
    corpus = load_corpus(recipe.data)
    tokenizer = build_tokenizer(recipe.data, corpus)
    rows = build_datasets(recipe.data, corpus, tokenizer)
    description = f"{recipe.data.corpus}: {corpus.description}"
    return TrainingData(
        rows.train,
        rows.held_out,
        PackedCollator(tokenizer),
        rows.held_out_bytes,
        tokenizer,
        description,
        {
            name: content_of(split)
            for name, split in (("held out", rows.held_out), ("trained on", rows.train))
            if isinstance(split, datasets.Dataset)
        },
    )


def content_of(rows: datasets.Dataset) -> str:
    """The number of packed rows and a hash of their tokens, which do not depend on the files' places and times."""
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(_HASHED_ROWS):
        tokens = batch.column("input_ids").combine_chunks()
        # The lengths are hashed, too, so that the same tokens divided into other rows give another hash.
        digest.update(tokens.value_lengths().to_numpy(zero_copy_only=False).tobytes())
        digest.update(tokens.flatten().to_numpy(zero_copy_only=False).tobytes())
    return f"{len(rows):,} rows, sha256 {digest.hexdigest()[:16]}"


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    source: Callable[[Recipe], TrainingData] = text_data,
    display: TrainerCallback | None = None,
    budget_seconds: float | None = None,
) -> dict[str, Any]:
    """Trains a model as a recipe says, and writes the model and all records into the run folder.

    Args:
        recipe: a recipe from `load_recipe`.
        resume: whether to continue the run in the recipe's folder from its last whole checkpoint, or from scratch if it has none. A
            finished run is left as it is.
        source: makes the data. It is not called if the run has finished.
        display: shows the run's progress. Defaults to `ProgressDisplay`.
        budget_seconds: wall time, including the preparation of data, within which the run stops with a checkpoint. Defaults to no limit.

    Returns:
        The summary, as in summary.json: parameters, steps, train_tokens, train_seconds (without data preparation and evaluation),
        tokens_per_second, eval_loss (nats per token), perplexity, bits_per_byte (for text only), and the machine.

    Raises:
        ValueError: settings are invalid, data cannot be read, the folder holds another run or one of other text, or there is no run to
            resume.
        NonFiniteError: a loss or gradient became NaN or infinite. The last checkpoint is kept.
        SaveError: a checkpoint could not be written. The one before is kept.
        BudgetSpentError: the time was up. It is raised after the checkpoint has been saved, or during the preparation of data.
        KeyboardInterrupt: after Ctrl-C, when the checkpoint or, in the last step, the finished run has been saved.
    """
    with _process_group():
        return _train(recipe, resume, source, display, budget_seconds)


@contextmanager
def _process_group() -> Iterator[None]:
    """Destroys the process group that the run has initialised, as NCCL requires. A group of the caller is left alone.

    After an error the group is not destroyed, since that would wait for processes that may be waiting in it.
    """
    had_group = dist.is_available() and dist.is_initialized()
    try:
        yield
    except (BudgetSpentError, KeyboardInterrupt) as stop:
        if stop.args:  # raised in all processes after the same step; a second Ctrl-C has no message
            _end_process_group(had_group)
        raise
    _end_process_group(had_group)


def _end_process_group(had_group: bool) -> None:
    if had_group or not (dist.is_available() and dist.is_initialized()):
        return
    dist.destroy_process_group()
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # otherwise the next run in this process would use the group


def _train(
    recipe: Recipe,
    resume: bool,
    source: Callable[[Recipe], TrainingData],
    display: TrainerCallback | None,
    budget_seconds: float | None,
) -> dict[str, Any]:
    deadline = None if budget_seconds is None else time.monotonic() + budget_seconds
    if resume:
        recipe = run_folder.as_started(recipe)
    if recipe.open_settings:
        if not resume or run_folder.stored_recipe(recipe.output_dir) is None:
            _check_folder(recipe.output_dir, recipe, resume)  # before time is spent on measuring the machine
        recipe, chosen = fitted(recipe)
        if chosen:
            logger.warning("%s", chosen)
    arguments = recipe.training_arguments()
    recipe.check_processes(arguments.world_size, uses_accelerate_fsdp=asks_accelerate_to_shard(arguments))
    run_dir, is_main = recipe.output_dir, arguments.process_index == 0
    say = logger.warning if is_main else logger.debug
    with arguments.main_process_first(local=False):
        if is_main:
            _check_folder(run_dir, recipe, resume)
    was_there = run_dir.exists()
    checkpoint = None
    if resume:
        finished = read_summary(run_dir)
        if finished is not None and run_folder.has_same_training(run_dir, recipe):
            say("%s has finished already: its results are kept", run_dir)
            return finished
        checkpoint = last_complete_checkpoint(run_dir)
        if checkpoint is None:
            say("nothing to resume in %s: starting from scratch", run_dir)
        else:
            say("resuming from %s", checkpoint)
            changed = keep_rows_per_step(arguments, rows_of(_state_of(checkpoint).log_history))
            if changed:
                say("%s", changed)
    started = time.perf_counter()
    with arguments.main_process_first(local=False), stopped_at(deadline):
        data = source(recipe)
    prepare_seconds = time.perf_counter() - started
    if checkpoint is not None:
        run_folder.check_same_data(run_dir, data.contents, say)
    shown = display or ProgressDisplay()
    trainer = _build_trainer(recipe, arguments, data, checkpoint, shown)
    if isinstance(shown, ProgressDisplay):
        _introduce(shown, trainer, recipe, data, checkpoint)
    if asks_accelerate_to_shard(arguments) and not trainer.is_fsdp_enabled:
        say("accelerate shards over accelerators only: on the CPU every process holds the whole model")
    with _full_disk_in_one_line(run_dir):
        if is_main:
            run_dir.joinpath(SUMMARY).unlink(missing_ok=True)  # left by a finished run that is now extended
            write_text_whole(run_dir / run_folder.RECIPE, recipe.to_yaml())
            if checkpoint is None and data.contents:
                run_folder.write_data(run_dir, data.contents)
        try:
            was_asked_to_stop = _run(trainer, checkpoint, deadline)
        except (NonFiniteError, BudgetSpentError):  # these are outcomes of a run
            raise
        except Exception:
            if is_main and not resume and trainer.state.global_step == 0:
                run_folder.remove_start(run_dir, was_there=was_there)
            raise
        trainer.save_final()
        summary = _summary(recipe, trainer) | {"prepare_seconds": round(prepare_seconds, 3)}
        if is_main:
            if reason := reason_without_pictures():
                say("%s is not drawn: %s", run_folder.LOSS_PLOT, reason)
            else:
                plot_loss(run_dir / run_folder.LOSS_PLOT, rows_of(trainer.state.log_history))
            write_summary(run_dir, summary)
    if was_asked_to_stop:  # the caller must not continue after this run
        raise KeyboardInterrupt("the run had finished; its results are kept")
    return summary


def _state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def keep_rows_per_step(arguments: TrainingArguments, rows: list[dict[str, Any]]) -> str | None:
    """Keeps the global batch size when a run is resumed with another number of processes, so that each row is still read once.

    Args:
        arguments: arguments of the run. Gradient accumulation or, if that is not enough, the batch size is changed in place.
        rows: rows of the log so far.

    Returns:
        What was changed, in words, or None if nothing was, or if the log does not say how many rows a step had.

    Raises:
        ValueError: the rows of a step cannot be divided evenly among the processes.
    """
    before, now = (rows[-1].get("rows_per_step") if rows else None), rows_per_step(arguments)
    if before is None or before == now:
        return None
    batch, processes = (
        arguments.per_device_train_batch_size,
        now // (arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps),
    )
    if before % (batch * processes) == 0:
        arguments.gradient_accumulation_steps = before // (batch * processes)
    elif before % processes == 0:
        arguments.gradient_accumulation_steps = 1
        arguments.per_device_train_batch_size = before // processes
    else:
        raise ValueError(
            f"the run was started with {before} rows a step, which {processes} processes cannot share equally: "
            f"expected a number of processes that divides {before}"
        )
    return (
        f"rows a step stay {before}: training.per_device_train_batch_size={arguments.per_device_train_batch_size} and "
        f"training.gradient_accumulation_steps={arguments.gradient_accumulation_steps} in each of {processes} processes"
    )


def _introduce(
    display: ProgressDisplay,
    trainer: TransXSSMTrainer,
    recipe: Recipe,
    data: TrainingData,
    checkpoint: Path | None,
) -> None:
    """Passes to the display what is trained on and, if one batch can be measured, how long the run will take."""
    arguments = trainer.args
    rows = rows_per_step(arguments)
    evaluation = len(data.held_out) / rows * FORWARD_SHARE if isinstance(data.held_out, Sized) else 0.0
    lines, step = [data.description] if data.description else [], None
    steps = number_of_steps(arguments, data.train)
    # The time of a compiled or distributed model cannot be measured before training.
    if (
        steps is not None
        and arguments.world_size == 1
        and not arguments.torch_compile
        and isinstance(data.train, Sized)
    ):
        row = data.train[0]
        step = measured_step_seconds(
            trainer.model,
            arguments,
            batch_of=lambda count: trainer.data_collator([row] * count),
            loss_of=partial(trainer.compute_loss, trainer.model),
        )
        left = steps - (0 if checkpoint is None else step_of(checkpoint))
        state = TrainerState(global_step=steps - left, max_steps=steps, eval_steps=_whole(arguments.eval_steps, steps))
        seconds = (left + evaluations_left(arguments, state) * evaluation) * step
        if seconds >= SHORTEST_ESTIMATED:
            lines.append(estimate_line(seconds, left, step, _what_is_quicker(recipe, arguments, step)))
    display.introduce(
        lines,
        evaluation_in_steps=evaluation,
        quicker=partial(_what_is_quicker, recipe, arguments),
        is_estimated=step is not None,
    )


def _whole(steps: float, of: int) -> int:
    """The number of steps, which may be given as a share of all steps."""
    return max(1, math.ceil(of * steps) if steps < 1 else int(steps))


def _what_is_quicker(recipe: Recipe, arguments: TrainingArguments, step_seconds: float) -> str:
    ways = [f"training.max_steps={max(1, int(LONG_RUN / step_seconds)):,} (an hour)".replace(",", "")]
    if recipe.name != SMALLEST_RECIPE and not recipe.data.streaming:
        ways.insert(0, f"transxssm train {SMALLEST_RECIPE} data.corpus={shlex.quote(recipe.data.corpus)} (minutes)")
    if arguments.device.type == "cpu":
        ways.append("a GPU")
    return ", or ".join([", ".join(ways[:-1]), ways[-1]] if len(ways) > 1 else ways)


def _check_folder(run_dir: Path, recipe: Recipe, resume: bool) -> None:
    if resume:
        run_folder.check_same_run(run_dir, recipe)
    else:
        run_folder.check_empty(run_dir)


def _build_trainer(
    recipe: Recipe,
    arguments: TrainingArguments,
    data: TrainingData,
    checkpoint: Path | None,
    display: TrainerCallback,
) -> TransXSSMTrainer:
    if data.held_out_bytes is None and "bits_per_byte" in (arguments.metric_for_best_model or ""):
        raise ValueError(
            "training.metric_for_best_model: got bits_per_byte, expected loss or perplexity: what is held out is no text"
        )
    set_seed(arguments.seed)
    config = _config_for(recipe, data.tokenizer)
    if recipe.checkpoint is None:
        model = new_language_model(config)
    else:
        model = load_causal_lm(recipe.checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    use_our_scan(model)
    arguments.remove_unused_columns = False  # the collator reads columns that some models' forward does not name
    callbacks: list[TrainerCallback] = [
        LastStep(),
        MetricsFile(recipe.output_dir / run_folder.METRICS),
        display,
    ]
    if "tensorboard" in arguments.report_to:
        # Trainer's own callback would write into a folder named by time and host, and keep rows of repeated steps.
        arguments.report_to = [name for name in arguments.report_to if name != "tensorboard"]
        if arguments.process_index == 0:
            purge_step = None if checkpoint is None else step_of(checkpoint) + 1
            events = SummaryWriter(str(recipe.output_dir / run_folder.TENSORBOARD), purge_step=purge_step)
            callbacks.append(TensorBoardCallback(events))
    return TransXSSMTrainer(
        model=model,
        args=arguments,
        data_collator=partial(_collate_named, data.collate, frozenset(inspect.signature(model.forward).parameters)),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        held_out_bytes=data.held_out_bytes,
        parallelism=recipe.parallelism,
        processing_class=data.tokenizer,
        callbacks=callbacks,
    )


def _collate_named(collate: Collate, names: frozenset[str], rows: Sequence[Any]) -> dict[str, Tensor]:
    """A batch of the inputs that a model's `forward` names. transformers' models take no `seq_idx`, and its Mamba-2 no positions."""
    return {name: tensor for name, tensor in collate(rows).items() if name in names}


def _config_for(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    if tokenizer is None:
        return recipe.language_model_config()
    padded = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    from_tokenizer = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = recipe.language_model_config(vocab_size=padded, **from_tokenizer)
    if config.vocab_size < len(tokenizer):
        raise ValueError(
            f"model.vocab_size must be at least the tokenizer's {len(tokenizer)}: got {config.vocab_size}; leave it out to have it set"
        )
    return config


def _run(trainer: TransXSSMTrainer, checkpoint: Path | None, deadline: float | None) -> bool:
    """Trains to the last step. Returns whether Ctrl-C came during that one, when the run could no longer be stopped."""
    interrupt = Interrupt(deadline)
    trainer.add_callback(interrupt)
    if checkpoint is not None:
        last_row = rows_of(_state_of(checkpoint).log_history)[-1]
        trainer.continue_clock(last_row["train_seconds"], last_row["tokens"])
    try:
        with interrupt.listening():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressDisplay):
                callback.close()
    if trainer.state.global_step < trainer.state.max_steps:
        how = f"stopped after step {trainer.state.global_step}: continue with the same command and --resume"
        if interrupt.requested:
            raise KeyboardInterrupt(how)
        if interrupt.is_out_of_time:
            raise BudgetSpentError(how)
    return interrupt.requested


@contextmanager
def _full_disk_in_one_line(run_dir: Path) -> Iterator[None]:
    """Raises `SaveError` if the disk is full when metrics, events or plots are written, as for checkpoints."""
    try:
        yield
    except SaveError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise save_error("the run's records", run_dir, error) from error


def _summary(recipe: Recipe, trainer: TransXSSMTrainer) -> dict[str, Any]:
    arguments, state = trainer.args, trainer.state
    evaluated = [row for row in rows_of(state.log_history) if "eval_loss" in row][-1]
    if arguments.load_best_model_at_end:  # the weights are those of an earlier step
        evaluated = evaluated | trainer.held_out_metrics()
    seconds, tokens = trainer.train_seconds, state.num_input_tokens_seen
    return {
        "recipe": recipe.name,
        "parameters": trainer.model.num_parameters(),
        "steps": state.global_step,
        "train_tokens": tokens,
        "train_seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "eval_loss": evaluated["eval_loss"],
        "perplexity": evaluated["eval_perplexity"],
        **({"bits_per_byte": evaluated["eval_bits_per_byte"]} if "eval_bits_per_byte" in evaluated else {}),
        "eval_seconds": evaluated["eval_runtime"],
        "held_out_bytes": trainer.held_out_bytes,
        "dtype": "bfloat16 autocast" if arguments.bf16 else "float16 autocast" if arguments.fp16 else "float32",
        "device": device_name(arguments.device),
        "processes": arguments.world_size,
        "versions": versions(),
    }
