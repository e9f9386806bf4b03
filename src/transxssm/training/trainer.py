"""`transformers.Trainer` with this project's parameter groups, exact held-out loss, whole checkpoints and a non-finite guard."""

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging as transformers_logging

from transxssm.data.packing import IGNORED_LABEL
from transxssm.models import MODEL_CARD, TransXSSMConfig
from transxssm.ops.devices import has_float64
from transxssm.training.checkpoints import (
    PREFIX,
    STAGING,
    keep_latest,
    last_complete_checkpoint,
    publish_files,
    publish_folder,
    save_error,
)
from transxssm.training.estimate import rows_per_step
from transxssm.training.nonfinite import NonFiniteError, find_origin
from transxssm.training.sharding import (
    Parallelism,
    compile_layers,
    is_sharded,
    keep_two_groups,
    load_optimizer,
    load_whole_optimizer,
    load_whole_weights,
    mesh_of,
    save_optimizer,
    share_weights,
    update_one_by_one,
    whole_weights,
)

logger = logging.getLogger(__name__)

OPTIMIZER_SHARDS = "optimizer"  # a folder inside a checkpoint


class TransXSSMTrainer(Trainer):
    """Trains a TransXSSM model, or a baseline, on packed rows. Each process trains on one GPU.

    Args:
        held_out_bytes: UTF-8 bytes that the labelled tokens of the held-out rows stand for, or None if they are not text.
        parallelism: how processes share the run.
        Others: see `Trainer`.
    """

    def __init__(self, *, held_out_bytes: int | None, parallelism: Parallelism | None = None, **kwargs: Any) -> None:
        arguments: Any = kwargs.get("args")
        _take_one_gpu(arguments)
        use_cache = kwargs["model"].config.use_cache
        self._parallelism = parallelism or Parallelism()
        self._compiles = arguments is not None and arguments.torch_compile
        is_own = kwargs["model"].config.model_type == TransXSSMConfig.model_type
        is_shared = arguments is not None and arguments.world_size > 1 and is_own
        if is_shared and self._compiles and not asks_accelerate_to_shard(arguments):
            _leave_compiling_to_us(arguments)
        super().__init__(**kwargs)
        if is_shared and not self.is_fsdp_enabled:
            self._share()
        self._saved_use_cache = use_cache  # Trainer switches it off, and the saved model must have the original value
        self.held_out_bytes = held_out_bytes
        # If the model supports it, the (tokens × vocabulary) logits are never formed.
        self._loss_options = {"skip_logits": True} if is_own else {}
        self._keep_outputs_whole()
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.train_seconds = 0.0  # without evaluation
        self._clock_started: float | None = None
        self._last_log = (0.0, 0)  # seconds and tokens at the last line of the log
        self._staging: Path | None = None
        self._step_losses: list[Tensor] = []
        self._step_batches: list[tuple[dict[str, Any], Any]] = []
        self._most_rows = 0  # largest number of rows in a batch so far
        self._held_out_sums = torch.zeros(2)

    def _run_epoch(self, **kwargs: Any) -> None:
        # Without this, Trainer would make one more step when it is resumed after the last one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _keep_outputs_whole(self) -> None:
        """Makes FSDP2's mixed precision gather parameters in half precision, and round nothing else.

        accelerate's policy also rounds the inputs and outputs of modules, among them the loss and the rotations of positions.
        """
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        policy = getattr(plugin, "mixed_precision_policy", None)
        if isinstance(policy, MixedPrecisionPolicy):
            plugin.mixed_precision_policy = replace(policy, output_dtype=None, cast_forward_inputs=False)

    def _share(self) -> None:
        """Prepares model and data as `parallelism` says, before accelerate can wrap them."""
        model: Any = self.model
        parallelism, device_type = self._parallelism, self.args.device.type
        mesh = mesh_of(parallelism, device_type) if parallelism.data != "ddp" or parallelism.tp > 1 else None
        rows = mesh
        if parallelism.cp > 1:
            sizes = (self.args.world_size // parallelism.cp, parallelism.cp)
            rows = init_device_mesh(device_type, sizes, mesh_dim_names=("dp_shard", "cp"))
            model.enable_context_parallel(rows["cp"].get_group())
        if parallelism.sharing > 1:
            self.accelerator.state.device_mesh = (
                rows  # data loaders read it to give the same rows to processes that share them
            )
            self.add_callback(CountTokensOnce(parallelism.sharing))
            self._read_streams_in_every_process()
        if mesh is not None:
            share_weights(model, parallelism, mesh)
            self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # for autocast only
            model._is_accelerate_prepared = True
        if self._compiles:  # layer by layer, which takes seconds and not minutes
            compile_layers(model)

    def _read_streams_in_every_process(self) -> None:
        """Makes each process read streams itself. accelerate would read them in the first process and send different rows to all."""
        self.accelerator.dataloader_config.dispatch_batches = False
        for name in ("train_dataset", "eval_dataset"):
            rows = getattr(self, name)
            if isinstance(rows, IterableDataset):
                setattr(self, name, UndividedStream(rows))

    @property
    def _is_sharded(self) -> bool:
        return is_sharded(self.model)

    # Parameter groups

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names of matrices, which decay. Vectors (norms, biases, A_log, dt_bias and D) do not."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self._parallelism.tp > 1:
            keep_two_groups(optimizer, self.model)
        return optimizer

    # A step, and the check before it changes weights

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._step_batches.append((inputs, num_items_in_batch))
        loss = super().training_step(model, self._filled_batch(inputs), num_items_in_batch)
        self._step_losses.append(loss)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, **self._loss_options}, *args, **kwargs)

    def _filled_batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Pads an epoch's last batch under `torch.compile` to the size of the others, with copies of its first row without labels.

        A smaller batch would be recompiled during the run, which takes minutes.
        """
        if not self._compiles:
            return inputs
        num_rows = len(inputs["labels"])
        self._most_rows = max(self._most_rows, num_rows)
        # A collator that makes several rows of one may make any number of them.
        missing = min(self._most_rows, self._train_batch_size) - num_rows
        if missing <= 0:
            return inputs
        filled = {name: torch.cat((rows, rows[:1].expand(missing, *rows.shape[1:]))) for name, rows in inputs.items()}
        filled["labels"][num_rows:] = IGNORED_LABEL
        return filled

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Trainer calls this once in each step, after the backward pass and before the update.
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(grad_norm, DTensor):  # under FSDP2 each process holds its part of the sum
            grad_norm = grad_norm.full_tensor()
        losses, batches = torch.stack(self._step_losses), self._step_batches
        self._step_losses, self._step_batches = [], []
        finite = torch.isfinite(losses).all()
        # fp16's gradient scaler expects infinite gradients and skips such a step itself.
        if self.accelerator.scaler is None:
            finite = finite & torch.isfinite(torch.as_tensor(grad_norm, device=losses.device)).all()
        if not self.accelerator.gather(finite.reshape(1)).all():
            raise self._non_finite_error(model, losses, grad_norm, batches)
        return grad_norm

    def _non_finite_error(self, model: nn.Module, losses: Tensor, grad_norm: Any, batches: list[Any]) -> NonFiniteError:
        module = model if self.is_fsdp_enabled else self.accelerator.unwrap_model(model, keep_torch_compile=False)
        origin = None
        for inputs, num_items in batches:
            again = partial(self.compute_loss, module, self._prepare_inputs(inputs), num_items_in_batch=num_items)
            origin = origin or find_origin(module, again)
        what = f"loss {losses.sum().item():.4g}, gradient norm {float(grad_norm):.4g}"
        where = f"first in the {origin}" if origin else "but running the batch again stayed finite on this process"
        last = last_complete_checkpoint(Path(self.args.output_dir))
        return NonFiniteError(
            f"step {self.state.global_step + 1} is not finite ({what}), {where}. "
            f"Weights are as before the step, the last checkpoint is {last.name if last else 'none'}: "
            "lower training.learning_rate or training.max_grad_norm and continue with --resume"
        )

    # Held-out loss: all nats over all labelled tokens

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        is_training = self._clock_started is not None
        self._stop_clock()
        metrics = super().evaluate(*args, **kwargs)
        if is_training:
            self._start_clock()
        return metrics

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Runs Trainer's loop, and replaces its mean over batches by the exact loss, perplexity and bits per byte."""
        widest = torch.float64 if has_float64(self.args.device) else torch.float32
        self._held_out_sums = torch.zeros(2, dtype=widest, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self.accelerator.reduce(self._held_out_sums, reduction="sum")
        nats, tokens = (
            sums / self._parallelism.sharing
        ).tolist()  # each process that shares a row has summed the whole row
        if tokens == 0:
            raise ValueError("the held-out rows have no labelled token: raise data.held_out_fraction")
        loss = nats / tokens
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(loss, 700.0))
        if self.held_out_bytes is not None:
            output.metrics[f"{metric_key_prefix}_bits_per_byte"] = nats / math.log(2) / self.held_out_bytes
        return output

    def held_out_metrics(self) -> dict[str, float]:
        """Evaluates the model without an entry in the log."""
        loop = self.evaluation_loop(self.get_eval_dataloader(), description="Evaluation", prediction_loss_only=True)
        return loop.metrics

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"].clone()
        labels[self._rows_of_their_own(len(labels)) :] = IGNORED_LABEL
        with torch.no_grad(), self.compute_loss_context_manager():
            # With num_items_in_batch = 1 the loss is the sum.
            nats = model(**{**inputs, "labels": labels}, num_items_in_batch=1, **self._loss_options).loss
        tokens = (labels[:, 1:] != IGNORED_LABEL).sum()
        self._held_out_sums += torch.stack((nats, tokens)).to(self._held_out_sums)
        return nats / tokens.clamp(min=1), None, None

    def _rows_of_their_own(self, num_rows: int) -> int:
        """The number of this process's rows without those that are repeated to fill the last batch of all processes."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return num_rows
        return min(num_rows, max(0, state.remainder - self.args.process_index // self._parallelism.sharing * num_rows))

    # Log: tokens and seconds, besides Trainer's own entries

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._start_clock()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._stop_clock()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._stop_clock()
            self._start_clock()
            seconds, tokens = self._last_log
            now = (self.train_seconds, self.state.num_input_tokens_seen)
            logs["tokens_per_second"] = (now[1] - tokens) / max(now[0] - seconds, 1e-9)
            logs["train_seconds"] = now[0]
            logs["rows_per_step"] = rows_per_step(self.args)
            self._last_log = now
        super().log(logs)  # without start_time, since Trainer's throughput would count evaluation as training

    def continue_clock(self, seconds: float, tokens: int) -> None:
        """Continues the counts of an earlier process."""
        self.train_seconds, self._last_log = seconds, (seconds, tokens)

    def _start_clock(self) -> None:
        self._clock_started = time.perf_counter()

    def _stop_clock(self) -> None:
        if self._clock_started is not None:
            self.train_seconds += time.perf_counter() - self._clock_started
        self._clock_started = None

    # Checkpoints and the final model

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, name = Path(self.args.output_dir), f"{PREFIX}{self.state.global_step}"
        self._staging = run_dir / STAGING
        try:
            self._clear_staging()
            with self._saving():
                super()._save_checkpoint(model, trial)  # its rotation of checkpoints sees only the staging folder
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.state.best_global_step == self.state.global_step:
                    self.state.best_model_checkpoint = str(run_dir / name)
                    self.state.save_to_json(str(self._staging / name / "trainer_state.json"))
                publish_folder(self._staging / name, run_dir / name)
                keep_latest(run_dir, self.args.save_total_limit, also=self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            raise save_error(name, run_dir, error) from error
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self._is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        weights = whole_weights(self.model)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer(self.model, self.optimizer.optimizer, Path(output_dir, OPTIMIZER_SHARDS))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._is_sharded:
            load_whole_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._is_sharded:
            load_whole_weights(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads the optimizer's state, saved as shards or as a whole, into shards or a whole state."""
        shards = None if checkpoint is None else Path(checkpoint, OPTIMIZER_SHARDS)
        has_shards = shards is not None and shards.is_dir()
        if checkpoint is None or not (has_shards or self._is_sharded):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if has_shards:
            load_optimizer(self.model, self.optimizer.optimizer, Path(checkpoint, OPTIMIZER_SHARDS))
        else:
            load_whole_optimizer(self.optimizer.optimizer, Path(checkpoint, OPTIMIZER_NAME))
        if self._parallelism.tp > 1:
            update_one_by_one(self.optimizer.optimizer)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def save_final(self) -> None:
        """Writes the model by `save_pretrained`, and the tokenizer, into the run folder itself."""
        run_dir = Path(self.args.output_dir)
        staging = run_dir / STAGING
        try:
            self._clear_staging()
            state_dict = whole_weights(self.model) if self._is_sharded and not self.is_fsdp_enabled else None
            if self.is_fsdp_enabled:  # gathers the shards, where a tied head is a separate tensor
                gathered = self.accelerator.get_state_dict(self.model)
                state_dict = {
                    name: gathered[name] for name in gathered.keys() - self.model.all_tied_weights_keys.keys()
                }
            if self.args.should_save:
                with self._saving():
                    self.model.save_pretrained(staging, state_dict=state_dict)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(staging)
                if (run_dir / MODEL_CARD).exists():  # its owner may have edited it
                    (staging / MODEL_CARD).unlink(missing_ok=True)
                publish_files(staging, run_dir)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            raise save_error("the final model", run_dir, error) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _clear_staging(self) -> None:
        if self.args.should_save:
            shutil.rmtree(Path(self.args.output_dir) / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Restores the original config while the model is saved, and hides the progress bar for files."""
        in_training, showed_bars = self.model.config.use_cache, transformers_logging.is_progress_bar_enabled()
        self.model.config.use_cache = self._saved_use_cache
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            self.model.config.use_cache = in_training
            if showed_bars:
                transformers_logging.enable_progress_bar()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A tied head is not saved in addition to the embeddings. Trainer would report it as missing at every resume.
        tied = self.model.all_tied_weights_keys
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)


class UndividedStream(IterableDataset[Any]):
    """A stream that is read in order. accelerate would otherwise give each process some of a stream's files."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


class CountTokensOnce(TrainerCallback):
    """Corrects the number of tokens, which Trainer sums over all processes, when `shared` processes read each row."""

    def __init__(self, shared: int) -> None:
        self.shared = shared
        self._counted = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._counted = state.num_input_tokens_seen

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._counted += (state.num_input_tokens_seen - self._counted) // self.shared
        state.num_input_tokens_seen = self._counted


def asks_accelerate_to_shard(arguments: TrainingArguments) -> bool:
    """Whether `training.fsdp` or accelerate's environment requests FSDP."""
    return bool(arguments.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def _leave_compiling_to_us(arguments: TrainingArguments) -> None:
    """Keeps Trainer and accelerate from compiling the model as a whole, in a graph for each layer."""
    arguments.torch_compile = False
    arguments.torch_compile_backend = arguments.torch_compile_mode = None
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:  # set by TrainingArguments
        del os.environ[name]


def _take_one_gpu(arguments: TrainingArguments | None) -> None:
    """Keeps `Trainer` from spreading the batches of one process over all GPUs with `nn.DataParallel`, whose losses are a vector."""
    if arguments is not None and arguments.n_gpu > 1:
        logger.warning(
            "%d GPUs are here and this process trains on one; on all: transxssm train … --gpus all", arguments.n_gpu
        )
        arguments._n_gpu = 1
