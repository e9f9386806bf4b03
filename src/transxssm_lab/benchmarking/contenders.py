"""The models that a benchmark compares, and the steps it times them at. A new contender is a new entry in `CONTENDERS`."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, StaticCache

from transxssm.models import TransXSSMConfig
from transxssm.models.baselines import (
    count_baseline_parameters,
    jamba_config,
    llama_config,
    mamba2_config,
    new_language_model,
)
from transxssm.models.configuration_transxssm import SSD_LAYER_TYPE
from transxssm_lab.benchmarking.steps import Prompt, Step, read_prompt

MODES = ("train", "prefill", "decode", "train-autocast", "train-checkpointed", "optimizer")
TRAINING_MODES = ("train", "train-autocast", "train-checkpointed")
DEFAULT_MODES = ("train", "prefill", "decode")
REFERENCE = "transxssm"  # the contender by whose time the others' are divided
STATIC_CACHE_ROOM = 1024  # tokens that a static cache holds beyond the prompt
SEED = 0


def _all_ssd(config: TransXSSMConfig) -> TransXSSMConfig:
    changed = copy.deepcopy(config)
    changed.layer_types = [SSD_LAYER_TYPE] * config.num_hidden_layers
    return changed


def _static_cache(config: PreTrainedConfig, num_tokens: int) -> Cache:
    return StaticCache(config=config, max_cache_len=num_tokens)


@dataclass(frozen=True)
class Contender:
    """A model in a benchmark.

    Args:
        label: its name in tables.
        config: makes its configuration from the one to which all are matched.
        attention: transformers' name of the attention implementation.
        compiled: "layers" compiles each layer (`compile_layers`); "step" compiles the decoding of a token as a whole, on a GPU as a
            CUDA graph (`compile_step`). Defaults to no compilation.
        new_cache: makes the cache for decoding from the configuration and the largest number of tokens that it will hold. Defaults to
            the cache that the model makes.
        modes: the modes in which it can be measured.
    """

    label: str
    config: Callable[[TransXSSMConfig], PreTrainedConfig]
    attention: str = "sdpa"
    compiled: Literal["layers", "step"] | None = None
    new_cache: Callable[[PreTrainedConfig, int], Cache] | None = None
    modes: tuple[str, ...] = MODES


def compile_layers(model: nn.Module, mode: str) -> None:
    """Compiles the decoder layers one by one. Layers of a kind share their code, so that it takes seconds and not minutes.

    In the mode "decode" only layers with a fixed state are compiled, since keys and values that grow would cause recompilation.
    """
    layers = list(model.get_submodule("model.layers").children())
    # Attention layers read their layer index where there is a cache, and each is compiled for its own.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(layers) + 1)
    for layer in layers:
        if mode != "decode" or layer.is_ssd:
            layer.compile()


def compile_step(model: nn.Module) -> None:
    """Compiles the model as one graph, as `generate` does on a GPU with a static cache, where it becomes one CUDA graph."""
    is_on_gpu = next(model.parameters()).device.type == "cuda"
    model.compile(fullgraph=True, mode="reduce-overhead" if is_on_gpu else None)


CONTENDERS = {
    "transxssm": Contender("TransXSSM", lambda config: config),
    "transxssm-compiled": Contender(
        "TransXSSM, torch.compile",
        lambda config: config,
        compiled="layers",
        modes=(*TRAINING_MODES, "prefill", "decode"),
    ),
    "transxssm-graph": Contender(
        "TransXSSM, static cache, one graph",
        lambda config: config,
        compiled="step",
        new_cache=_static_cache,
        modes=("decode",),
    ),
    "transxssm-ssd": Contender("TransXSSM, SSD layers only", _all_ssd),
    "llama": Contender("Llama, SDPA", llama_config),
    "llama-compiled": Contender(
        "Llama, torch.compile", llama_config, compiled="layers", modes=(*TRAINING_MODES, "prefill")
    ),
    "llama-eager": Contender("Llama, eager attention", llama_config, attention="eager"),
    "llama-static": Contender("Llama, SDPA, static cache", llama_config, new_cache=_static_cache, modes=("decode",)),
    "llama-graph": Contender(
        "Llama, SDPA, static cache, one graph",
        llama_config,
        compiled="step",
        new_cache=_static_cache,
        modes=("decode",),
    ),
    "mamba2": Contender("Mamba-2", mamba2_config),
    "jamba": Contender("Jamba (Bamba)", jamba_config),
}
DEFAULT_CONTENDERS = ("transxssm", "llama", "mamba2", "jamba")


def build_step(
    name: str, config: PreTrainedConfig, mode: str, length: int, batch: int, dtype: torch.dtype, *, device: torch.device
) -> Step:
    """Builds a contender with new weights on a device, ready to be timed.

    The modes: "train" is forward with labels and backward, with weights in `dtype`. "train-autocast" is the same with float32 weights under
    autocast to `dtype`. "train-checkpointed" is "train" with gradient checkpointing of every layer. "prefill" reads the prompt into an
    empty cache and returns the logits of its last token. "decode" decodes `DECODE_TOKENS` tokens, one at a time, after the prompt.
    "optimizer" is a step of AdamW.
    """
    if mode == "decode":
        return build_prompt(name, config, length, batch, dtype, STATIC_CACHE_ROOM, device=device).step()
    model = _new_model(name, config, mode, torch.float32 if mode == "train-autocast" else dtype, device)
    input_ids = _new_tokens(config, batch, length, device)
    if mode == "optimizer":
        return _optimizer_step(model)
    if mode in TRAINING_MODES:
        if mode == "train-checkpointed":
            model.gradient_checkpointing_enable()
        autocast_dtype = dtype if mode == "train-autocast" else None
        return _training_step(model.train(), input_ids, autocast_dtype)
    assert mode == "prefill"
    return _prefill_step(model.eval(), input_ids)


def build_prompt(
    name: str,
    config: PreTrainedConfig,
    length: int,
    batch: int,
    dtype: torch.dtype,
    num_new_tokens: int,
    *,
    device: torch.device,
) -> Prompt:
    """Builds a contender with new weights on a device, and has it read `batch` rows of `length` tokens.

    A static cache is made with room for `num_new_tokens` more.
    """
    new_cache = CONTENDERS[name].new_cache
    cache = None if new_cache is None else new_cache(config, length + num_new_tokens)
    model = _new_model(name, config, "decode", dtype, device).eval()
    prompt = read_prompt(model, _new_tokens(config, batch, length, device), cache)
    if CONTENDERS[name].compiled == "step":
        compile_step(model)
    return prompt


def check_contenders(names: Sequence[str], modes: Sequence[str]) -> None:
    """Checks that each of the names is a contender that can be measured in one of the modes.

    Raises:
        ValueError: there are no names, or one is unknown, given twice, or of a contender for other modes only.
    """
    check_names("contender", names, CONTENDERS)
    for name in names:
        if not set(modes) & set(CONTENDERS[name].modes):
            raise ValueError(
                f"{name} can be measured in {', '.join(CONTENDERS[name].modes)} only: got modes {', '.join(modes)}"
            )


def check_names(kind: str, got: Sequence[str], known: Sequence[str] | dict[str, Any]) -> None:
    """Checks that all names are known, and that each is given once.

    Raises:
        ValueError: there are no names, or one is unknown or given twice.
    """
    if not got:
        raise ValueError(f"expected at least one {kind} of {', '.join(known)}: got none")
    for name in got:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}: expected one of {', '.join(known)}")
    if len(set(got)) != len(got):
        raise ValueError(f"each {kind} can be named once: got {', '.join(got)}")


def describe_contenders(configs: dict[str, PreTrainedConfig], target: TransXSSMConfig) -> dict[str, Any]:
    """Sizes and number of parameters of each contender, by name, and that number relative to the model to which all are matched."""
    wanted = count_baseline_parameters(target)
    return {
        name: {
            "label": CONTENDERS[name].label,
            "parameters": (parameters := count_baseline_parameters(config)),
            "parameters_relative": parameters / wanted,
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": None if config.model_type == "mamba2" else config.intermediate_size,
            "config": json_config(config),
        }
        for name, config in configs.items()
    }


def json_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that differ from its class's defaults, with values that JSON can hold."""
    return {
        name: value
        for name, value in config.to_diff_dict().items()
        if not (isinstance(value, (list, tuple)) and any(isinstance(v, float) and math.isinf(v) for v in value))
    }


def _new_model(
    name: str, config: PreTrainedConfig, mode: str, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    options = {"attn_implementation": CONTENDERS[name].attention} if hasattr(config, "num_attention_heads") else {}
    torch.manual_seed(SEED)
    with torch.device(device):
        model = new_language_model(config, dtype=dtype, **options)
    if CONTENDERS[name].compiled == "layers":
        compile_layers(model, mode)
    return model


def _new_tokens(config: PreTrainedConfig, batch: int, length: int, device: torch.device) -> Tensor:
    tokens = torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(SEED))
    return tokens.to(device)


def _training_step(model: PreTrainedModel, input_ids: Tensor, autocast_dtype: torch.dtype | None) -> Step:
    # The trainer of this package does the same: it forms no logits where the model's loss does not need them.
    options = {"skip_logits": True} if model.config.model_type == TransXSSMConfig.model_type else {}

    def run() -> None:
        with torch.autocast(input_ids.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False, **options).loss
        loss.backward()

    return Step(run, lambda: model.zero_grad(set_to_none=True))


def _prefill_step(model: nn.Module, input_ids: Tensor) -> Step:
    @torch.no_grad()
    def run() -> Any:
        return model(input_ids=input_ids, use_cache=True, logits_to_keep=1)

    return Step(run)


def _optimizer_step(model: nn.Module) -> Step:
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    return Step(optimizer.step)
