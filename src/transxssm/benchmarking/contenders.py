"""The models that a benchmark compares, and the steps it times them at. A new contender is a new entry in `CONTENDERS`."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, StaticCache

from transxssm.benchmarking.steps import Step
from transxssm.models import TransXSSMConfig
from transxssm.models.baselines import jamba_config, llama_config, mamba2_config, new_language_model
from transxssm.models.configuration_transxssm import SSD_LAYER_TYPE

MODES = ("train", "prefill", "decode", "train-autocast", "optimizer")
DEFAULT_MODES = ("train", "prefill", "decode")
REFERENCE = "transxssm"  # whose time others are divided by
DECODE_TOKENS = 16  # that one run of a decoding step goes through
STATIC_CACHE_ROOM = 1024  # tokens that a static cache holds beyond the prompt
SEED = 0


def _all_ssd(config: TransXSSMConfig) -> TransXSSMConfig:
    changed = copy.deepcopy(config)
    changed.layer_types = [SSD_LAYER_TYPE] * config.num_hidden_layers
    return changed


def _static_cache(config: PreTrainedConfig, length: int) -> Cache:
    return StaticCache(config=config, max_cache_len=length + STATIC_CACHE_ROOM)


@dataclass(frozen=True)
class Contender:
    """A model in a benchmark.

    Args:
        label: what it is, for tables.
        config: its configuration, given the one that all are matched to.
        attention: transformers' name of the attention implementation.
        transform: what is called in place of the model.
        new_cache: makes the cache for decoding from the configuration and the prompt's length; None: the one that the model makes.
        modes: that it can be measured in.
    """

    label: str
    config: Callable[[TransXSSMConfig], PreTrainedConfig]
    attention: str = "sdpa"
    transform: Callable[[nn.Module], Callable[..., Any]] = lambda model: model
    new_cache: Callable[[PreTrainedConfig, int], Cache] | None = None
    modes: tuple[str, ...] = MODES


CONTENDERS = {
    "transxssm": Contender("TransXSSM", lambda config: config),
    "transxssm-compiled": Contender(
        "TransXSSM, torch.compile",
        lambda config: config,
        transform=torch.compile,
        modes=("train", "prefill", "train-autocast"),  # a growing cache would compile again at every token
    ),
    "transxssm-ssd": Contender("TransXSSM, SSD layers only", _all_ssd),
    "llama": Contender("Llama, SDPA", llama_config),
    "llama-eager": Contender("Llama, eager attention", llama_config, attention="eager"),
    "llama-static": Contender("Llama, SDPA, static cache", llama_config, new_cache=_static_cache, modes=("decode",)),
    "mamba2": Contender("Mamba-2", mamba2_config),
    "jamba": Contender("Jamba (Bamba)", jamba_config),
}
DEFAULT_CONTENDERS = ("transxssm", "llama", "mamba2", "jamba")


def build_step(
    name: str, config: PreTrainedConfig, mode: str, length: int, batch: int, dtype: torch.dtype, *, device: torch.device
) -> Step:
    """A contender with new weights on a device, ready to be timed.

    train: forward with labels and backward, weights in `dtype`. prefill: the prompt through an empty cache, logits of its last
    token. decode: `DECODE_TOKENS` tokens, one at a time, after the prompt. train-autocast: as train, float32 weights under
    autocast to `dtype`. optimizer: a step of AdamW.
    """
    contender = CONTENDERS[name]
    torch.manual_seed(SEED)
    weights_dtype = torch.float32 if mode == "train-autocast" else dtype
    options = {"attn_implementation": contender.attention} if hasattr(config, "num_attention_heads") else {}
    with torch.device(device):
        model = new_language_model(config, dtype=weights_dtype, **options)
    input_ids = torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(SEED))
    input_ids = input_ids.to(device)
    if mode == "optimizer":
        return _optimizer_step(model)
    if mode in ("train", "train-autocast"):
        autocast_dtype = dtype if mode == "train-autocast" else None
        return _training_step(model.train(), contender.transform(model), input_ids, autocast_dtype)
    model.eval()
    if mode == "prefill":
        return _prefill_step(contender.transform(model), input_ids)
    assert mode == "decode"
    cache = None if contender.new_cache is None else contender.new_cache(config, length)
    return _decoding_step(model, input_ids, cache)


def _training_step(
    model: nn.Module, call: Callable[..., Any], input_ids: Tensor, autocast_dtype: torch.dtype | None
) -> Step:
    def run() -> None:
        with torch.autocast(input_ids.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            loss = call(input_ids=input_ids, labels=input_ids).loss
        loss.backward()

    return Step(run, lambda: model.zero_grad(set_to_none=True))


def _prefill_step(call: Callable[..., Any], input_ids: Tensor) -> Step:
    @torch.no_grad()
    def run() -> Any:
        return call(input_ids=input_ids, use_cache=True, logits_to_keep=1)

    return Step(run)


@torch.no_grad()
def _decoding_step(model: nn.Module, input_ids: Tensor, cache: Cache | None) -> Step:
    parameters = inspect.signature(model.forward).parameters
    cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"
    given = {} if cache is None else {cache_name: cache}
    filled = model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **given)[cache_name]
    position = input_ids.shape[1]

    @torch.no_grad()
    def run() -> None:
        nonlocal position
        for index in range(DECODE_TOKENS):
            arguments: dict[str, Any] = {cache_name: filled, "use_cache": True}
            if "position_ids" in parameters:  # as generate passes them
                arguments["position_ids"] = torch.tensor([[position]], device=input_ids.device)
            model(input_ids=input_ids[:, index % input_ids.shape[1], None], **arguments)
            position += 1

    return Step(run)


def _optimizer_step(model: nn.Module) -> Step:
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    return Step(optimizer.step)
