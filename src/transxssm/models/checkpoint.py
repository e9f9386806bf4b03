"""Reads checkpoint folders. Every refusal is one line: a folder is missing, truncated, of another model, or has another tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from transxssm.models.configuration_transxssm import TransXSSMConfig
from transxssm.models.modeling_transxssm import TransXSSMForCausalLM
from transxssm.models.ssd_mixer import name_in_checkpoints
from transxssm.wording import one_line

CONFIG = "config.json"
HEADER_LENGTH_BYTES = 8  # a safetensors file has the header's length, the header in JSON, and the tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(folder: Path) -> TransXSSMConfig:
    """The configuration in a checkpoint folder. No weight is read.

    Raises:
        ValueError: there is no such folder, or it holds no model, another kind of model, or sizes that do not fit each other.
    """
    kind = _model_type(folder)
    if kind != TransXSSMConfig.model_type:
        raise ValueError(f"{folder} holds another kind of model: got {kind!r}, expected {TransXSSMConfig.model_type!r}")
    try:
        return TransXSSMConfig.from_pretrained(folder)
    except Exception as error:  # a strict dataclass raises its own kinds, with the reason as their cause
        raise ValueError(f"{folder / CONFIG}: {one_line(error.__cause__ or error)}") from error


def load_model(folder: Path, *, dtype: torch.dtype | None, device: torch.device) -> TransXSSMForCausalLM:
    """The language model in a checkpoint folder, on a device, in evaluation mode.

    Args:
        folder: a folder written by `save_pretrained`.
        dtype: dtype of the weights (A_log, dt_bias and D stay float32). Defaults to the dtype in which they were saved.
        device: a device from `read_device`.

    Raises:
        ValueError: see `read_config`; or weights are missing, truncated, or of other shapes than the configuration says.
    """
    return _load(TransXSSMForCausalLM, folder, read_config(folder), dtype, device)


def load_causal_lm(folder: Path, *, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """The language model in a folder, of this package or transformers, on a device, in evaluation mode.

    Code in the folder is not run.

    Args:
        folder, dtype, device: as for `load_model`.

    Raises:
        ValueError: see `load_model` and `read_causal_lm_config`.
    """
    config = read_causal_lm_config(folder)
    if isinstance(config, TransXSSMConfig):
        return load_model(folder, dtype=dtype, device=device)
    return _load(AutoModelForCausalLM, folder, config, dtype, device)


def read_causal_lm_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a causal language model in a folder, of this package or transformers. No weight is read.

    Raises:
        ValueError: see `read_config`; or the model is unknown to transformers, or is not a causal language model.
    """
    if _model_type(folder) == TransXSSMConfig.model_type:
        return read_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a strict dataclass raises its own kinds, with the reason as their cause
        raise ValueError(f"{folder / CONFIG}: {one_line(error.__cause__ or error)}") from error
    is_masked = any(str(name).endswith("ForMaskedLM") for name in config.architectures or ())
    if is_masked or getattr(config, "is_encoder_decoder", False):
        kind = "a masked" if is_masked else "an encoder-decoder"
        raise ValueError(f"{folder} holds {config.model_type!r}, {kind} model: expected a causal language model")
    return config


def load_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint folder.

    Raises:
        ValueError: there is no tokenizer, or it has token ids for which the model has no embedding.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer in {folder}: {one_line(error)}; save it there with save_pretrained") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    vocab_size = config.get_text_config().vocab_size
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} does not fit its model: got token ids up to {largest}, expected less than "
            f"vocab_size={vocab_size}; put the tokenizer there that the model was trained with"
        )
    return tokenizer


def read_device(name: str) -> torch.device:
    """A device by name. "auto" is the first GPU if torch sees one, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: expected auto, cpu, cuda, cuda:1, …") from None
    try:
        torch.zeros(1, device=device).item()  # torch.device accepts names of devices that are not there
    except (NotImplementedError, ImportError) as error:  # torch's message lists every key of its dispatcher
        raise ValueError(
            f"device {name!r} cannot be used here: this torch has no such backend; {_devices()}"
        ) from error
    except (RuntimeError, AssertionError) as error:
        reason = (
            str(error).split("\n", 1)[0].split(". ", 1)[0].rstrip(".")
        )  # the rest is advice on building or debugging torch
        raise ValueError(f"device {name!r} cannot be used here: {reason}; {_devices()}") from error
    return device


def _devices() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return f"expected {'cpu' if accelerator is None else f'cpu or {accelerator.type}'}"


def _model_type(folder: Path) -> Any:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise ValueError(f"no checkpoint folder {folder}: found {found} there, expected a run folder or a saved model")
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no model: {CONFIG} is missing{_unfinished_hint(folder)}") from None
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is damaged, not JSON: {error}") from None
    return settings.get("model_type") if isinstance(settings, dict) else None


def _load(
    model_class: Any, folder: Path, config: PreTrainedConfig, dtype: torch.dtype | None, device: torch.device
) -> Any:
    for path in sorted(folder.glob("*.safetensors")):
        _check_whole(path)
    try:
        model, report = model_class.from_pretrained(
            folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, since transformers' error does not name them
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} cannot be loaded: {one_line(error)}") from error
    if mismatched := sorted(report["mismatched_keys"]):
        weight, got, expected = mismatched[0]
        raise ValueError(
            f"the weights in {folder} do not fit its {CONFIG}: {len(mismatched)} differ, {name_in_checkpoints(weight)} among them: "
            f"got {tuple(got)}, expected {tuple(expected)}; put the configuration there that they were saved with"
        )
    if isinstance(config, TransXSSMConfig) and (
        unexpected := sorted(map(name_in_checkpoints, report["unexpected_keys"]))
    ):
        raise ValueError(
            f"the weights in {folder} do not fit its {CONFIG}: it has no place for {len(unexpected)} of them, {unexpected[0]} among "
            "them; put the configuration there that they were saved with"
        )
    absent = sorted(map(name_in_checkpoints, report["missing_keys"]))
    if absent:  # transformers would initialise them at random
        raise ValueError(f"{folder} lacks {len(absent)} of the model's weights, {absent[0]} among them: save it anew")
    return model.to(device).eval()


def _check_whole(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        header_length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
        header = file.read(header_length) if header_length < size else b""
    try:
        tensors = json.loads(header)
        ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is truncated or damaged: its header is not whole; copy or save it again") from None
    expected = HEADER_LENGTH_BYTES + header_length + max(ends, default=0)
    if size != expected:
        raise ValueError(
            f"{path} is truncated or damaged: got {size} bytes, expected {expected}; copy or save it again"
        )


def _unfinished_hint(folder: Path) -> str:
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    if not checkpoints:
        return "; expected a run folder or a saved model"
    last = max(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")))
    return f", the run is unfinished: continue it with --resume, or take its last checkpoint, {last}"


def read_dtype(name: str, *others: str) -> torch.dtype:
    """The dtype of this name.

    Args:
        name: the name that the user gave.
        others: other accepted values, for the message.

    Raises:
        ValueError: there is no such dtype.
    """
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: expected one of {', '.join([*others, *DTYPES])}")
    return DTYPES[name]
