"""The models of transformers with which TransXSSM is compared at equal parameters (Appendix B): Llama, Mamba-2, Jamba.

"Jamba" is the paper's word for a hybrid of attention and Mamba-2 blocks; transformers' Bamba is one. All have the hybrid's
hidden size, vocabulary and tying. Llama and Jamba also have its depth, and the width of their FFN is chosen to match the parameters.
Mamba-2 has no FFN, so that its depth is chosen.

Without mamba_ssm's kernels, transformers computes Mamba-2's scan by sums over products of Q × Q × n numbers, which takes several times as
long as the rest of the model. `use_our_scan` makes it compute the same function by this package's scan, which is fast enough to train.
"""

import copy
import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, BambaConfig, LlamaConfig, Mamba2Config, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from transxssm.models.configuration_transxssm import ATTENTION_LAYER_TYPES, SELECTIVE_ROPE_TYPE, TransXSSMConfig
from transxssm.models.linear import at_least_float32
from transxssm.models.modeling_transxssm import TransXSSMForCausalLM
from transxssm.ops.short_convolution import short_convolution
from transxssm.ops.ssd import ssd_chunk_scan

PARAMETER_TOLERANCE = 0.02
# The deviation in parameters that is accepted for a width that is a multiple of a large power of two, which suits the hardware.
_ROUNDING_TOLERANCE = 0.005
_WIDTH_MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)

# What Mamba-2 and the paper's Table 4 have in common.
MAMBA2_EXPAND = 2
MAMBA2_GROUPS = 1
MAMBA2_CONV_KERNEL_SIZE = 4
MAMBA2_CHUNK_SIZE = 256
_LONGEST = 131072  # positions; transformers warns beyond the number in a configuration


def count_baseline_parameters(config: PreTrainedConfig) -> int:
    """Number of parameters of a configuration's causal language model, tied ones counted once. No memory is allocated."""
    return sum(parameter.numel() for parameter in language_model_on_meta(config).parameters())


def language_model_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The modules of a causal language model on the meta device, with shapes but no storage."""
    with torch.device("meta"):
        return _model_of(config)


def llama_config(config: TransXSSMConfig) -> LlamaConfig:
    """A Llama with the hybrid's width, depth and heads. The width of its FFN matches the number of parameters.

    Raises:
        ValueError: no width comes within `PARAMETER_TOLERANCE` of the hybrid's parameters.
    """

    def with_width(intermediate_size: int) -> LlamaConfig:
        return LlamaConfig(
            **_shared_fields(config),
            **_attention_fields(config),
            num_hidden_layers=config.num_hidden_layers,
            intermediate_size=intermediate_size,
            rope_parameters=_fixed_rotation(config),
        )

    return _match_width("llama", with_width, config)


def jamba_config(config: TransXSSMConfig) -> BambaConfig:
    """Mamba-2 blocks where the hybrid has SSD layers, attention where it has attention, an FFN after each (transformers' Bamba).

    Attention rotates the whole head, as in the hybrid. The Mamba-2 blocks encode positions by convolution and recurrence only.

    Raises:
        ValueError: no FFN width comes within `PARAMETER_TOLERANCE` of the hybrid's parameters, or the heads do not divide the block.
    """
    num_heads = _mamba2_heads(config)

    def with_width(intermediate_size: int) -> BambaConfig:
        return BambaConfig(
            **_shared_fields(config),
            **_attention_fields(config),
            num_hidden_layers=config.num_hidden_layers,
            intermediate_size=intermediate_size,
            attn_layer_indices=[i for i, kind in enumerate(config.layer_types) if kind in ATTENTION_LAYER_TYPES],
            rope_parameters={**_fixed_rotation(config), "partial_rotary_factor": 1.0},
            mamba_n_heads=num_heads,
            mamba_d_head=config.ssd_head_dim,
            mamba_d_state=config.ssd_state_size,
            mamba_n_groups=MAMBA2_GROUPS,
            mamba_expand=MAMBA2_EXPAND,
            mamba_d_conv=MAMBA2_CONV_KERNEL_SIZE,
            mamba_chunk_size=MAMBA2_CHUNK_SIZE,
        )

    return _match_width("jamba", with_width, config)


def mamba2_config(config: TransXSSMConfig) -> Mamba2Config:
    """A Mamba-2 with the hybrid's width. Its depth and, for small differences, its state size match the number of parameters.

    Raises:
        ValueError: no depth and state size come within `PARAMETER_TOLERANCE`, or the heads do not divide the block.
    """
    num_heads, target = _mamba2_heads(config), count_baseline_parameters(config)

    def with_sizes(num_layers: int, state_size: int) -> Mamba2Config:
        shared = _shared_fields(config)
        return Mamba2Config(
            **{name: value for name, value in shared.items() if name != "rms_norm_eps"},
            layer_norm_epsilon=shared["rms_norm_eps"],
            num_hidden_layers=num_layers,
            num_heads=num_heads,
            head_dim=config.ssd_head_dim,
            state_size=state_size,
            n_groups=MAMBA2_GROUPS,
            expand=MAMBA2_EXPAND,
            conv_kernel=MAMBA2_CONV_KERNEL_SIZE,
            chunk_size=MAMBA2_CHUNK_SIZE,
        )

    depth = _solve_linear(lambda layers: with_sizes(layers, config.ssd_state_size), target)
    candidates = [with_sizes(max(1, round(depth)), config.ssd_state_size)]
    if not _matches(candidates[0], target):
        for layers in {max(1, math.floor(depth)), max(1, math.ceil(depth))}:
            state = _solve_linear(lambda size, layers=layers: with_sizes(layers, size), target)  # type: ignore[misc]
            candidates += [with_sizes(layers, max(1, multiple * round(state / multiple))) for multiple in (8, 1)]
    matching = [candidate for candidate in candidates if _matches(candidate, target)]
    if not matching:
        raise _no_match("mamba2", candidates[0], target)
    return min(matching, key=lambda candidate: abs(math.log(candidate.state_size / config.ssd_state_size)))


BASELINES: dict[str, Callable[[TransXSSMConfig], PreTrainedConfig]] = {
    "llama": llama_config,
    "mamba2": mamba2_config,
    "jamba": jamba_config,
}


def new_language_model(
    config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32, **options: Any
) -> PreTrainedModel:
    """Makes a language model with new weights, of this package or a baseline.

    transformers initialises the weights, with one exception: it starts every time step of Bamba's Mamba-2 blocks at softplus(1) ≈ 1.3,
    which gives states a half-life of half a token. Here they start as in Mamba-2, log-uniform in [0.001, 0.1].

    Args:
        config: a `TransXSSMConfig`, or a configuration made by this module.
        dtype: dtype of the weights.
        options: options of `AutoModelForCausalLM.from_config`, such as attn_implementation.
    """
    model = _model_of(config, dtype=dtype, **options)
    if isinstance(config, BambaConfig):
        low, high = math.log(1e-3), math.log(0.1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".dt_bias"):
                    steps = torch.empty_like(parameter, dtype=torch.float32).uniform_(low, high).exp()
                    init.copy_(parameter, steps + torch.log(-torch.expm1(-steps)))  # softplus⁻¹
    return model


def _model_of(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    if isinstance(config, TransXSSMConfig):  # works without registration with the Auto classes, too
        return TransXSSMForCausalLM._from_config(config, **options)
    return AutoModelForCausalLM.from_config(config, **options)


def _shared_fields(config: TransXSSMConfig) -> dict[str, Any]:
    names = (
        "vocab_size",
        "hidden_size",
        "hidden_act",
        "initializer_range",
        "rms_norm_eps",
        "tie_word_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    return {name: getattr(config, name) for name in names}


def _attention_fields(config: TransXSSMConfig) -> dict[str, Any]:
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "attention_dropout")
    fields = {name: getattr(config, name) for name in names}
    return fields | {"max_position_embeddings": max(config.max_position_embeddings, _LONGEST)}


def _fixed_rotation(config: TransXSSMConfig) -> dict[str, Any]:
    """The hybrid's rotation by position, without a selective rotation."""
    rope = copy.deepcopy(config.rope_parameters or {})
    if rope.get("rope_type") != SELECTIVE_ROPE_TYPE:
        return rope
    return {"rope_type": "default", "rope_theta": rope["rope_theta"]}


def _mamba2_heads(config: TransXSSMConfig) -> int:
    inner = MAMBA2_EXPAND * config.hidden_size
    if inner % config.ssd_head_dim:
        raise ValueError(
            f"a Mamba-2 block is {MAMBA2_EXPAND} · hidden_size wide, which must be a multiple of ssd_head_dim: "
            f"got {inner} and {config.ssd_head_dim}"
        )
    return inner // config.ssd_head_dim


def _solve_linear(with_size: Callable[[int], PreTrainedConfig], target: int) -> float:
    """The size at which the number of parameters, which is linear in it, is `target`."""
    at_1, at_2 = (count_baseline_parameters(with_size(size)) for size in (1, 2))
    return 1 + (target - at_1) / (at_2 - at_1)


def _match_width(name: str, with_width: Callable[[int], Any], config: TransXSSMConfig) -> Any:
    """The configuration whose FFN width is a multiple of the largest power of two that keeps the match close."""
    target = count_baseline_parameters(config)
    width = _solve_linear(with_width, target)
    for multiple in _WIDTH_MULTIPLES:
        rounded = max(1, multiple * round(width / multiple))
        if _matches(candidate := with_width(rounded), target, _ROUNDING_TOLERANCE):
            return candidate
    if _matches(candidate, target):
        return candidate
    raise _no_match(name, candidate, target)


def _matches(config: PreTrainedConfig, target: int, tolerance: float = PARAMETER_TOLERANCE) -> bool:
    return abs(count_baseline_parameters(config) / target - 1) <= tolerance


def _no_match(name: str, closest: PreTrainedConfig, target: int) -> ValueError:
    return ValueError(
        f"no {name} matches the model's {target:,} parameters within {PARAMETER_TOLERANCE:.0%}: "
        f"the closest has {count_baseline_parameters(closest):,}; choose other sizes"
    )


def use_our_scan(model: PreTrainedModel) -> None:
    """Makes every Mamba-2 mixer of a model (Mamba2, Bamba) compute whole sequences by `ssd_chunk_scan`, in place.

    Weights, configuration and saved files remain those of transformers. A forward pass with a cache and mixers with another activation
    than SiLU still use its code.
    """
    for module in model.modules():
        if isinstance(module, Mamba2Mixer | BambaMixer) and module.activation == "silu":
            module.forward = MethodType(_mix, module)


def _mix(
    mixer: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """(b, t, hidden size) → the same: projection, convolution, scan, gated norm, projection (Mamba-2, Section 7)."""
    if cache_params is not None:
        return type(mixer).forward(mixer, hidden_states, cache_params, attention_mask, **kwargs)
    mask = None if attention_mask is None else attention_mask[..., None].to(hidden_states.dtype)  # (b, t, 1)
    projected = mixer.in_proj(hidden_states if mask is None else hidden_states * mask)
    gate, xBC, dt = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
    xBC, _ = short_convolution(xBC, mixer.conv1d.weight.squeeze(1), bias=mixer.conv1d.bias)
    if mask is not None:
        xBC = xBC * mask
    states = mixer.n_groups * mixer.ssm_state_size
    x, B, C = xBC.split([mixer.intermediate_size, states, states], dim=-1)
    dt = F.softplus(at_least_float32(dt) + at_least_float32(mixer.dt_bias)).clamp(*mixer.time_step_limit)
    y, _ = ssd_chunk_scan(
        x.unflatten(-1, (mixer.num_heads, -1)),
        dt,
        -torch.exp(at_least_float32(mixer.A_log)),
        B.unflatten(-1, (mixer.n_groups, -1)),
        C.unflatten(-1, (mixer.n_groups, -1)),
        D=at_least_float32(mixer.D),
    )
    return mixer.out_proj(mixer.norm(y.flatten(2), gate).to(hidden_states.dtype))
