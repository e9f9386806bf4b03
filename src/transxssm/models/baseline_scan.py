"""transformers' Mamba-2 mixers on this package's scan: what they compute, in time to train them.

transformers computes the scan with sums over products of Q × Q × n numbers, several times as slow as everything else in the model, where
mamba_ssm's kernels are not installed. Comparisons of quality need none of that, and the same function everywhere.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from transxssm.models.ssd_mixer import at_least_float32
from transxssm.ops.short_convolution import short_convolution
from transxssm.ops.ssd import ssd_chunk_scan


def use_our_scan(model: PreTrainedModel) -> None:
    """Has every Mamba-2 mixer of a model (Mamba2, Bamba) compute whole sequences with `ssd_chunk_scan`, in place.

    Weights, configuration and what is saved stay transformers' own; so do a forward pass with a cache, and a mixer of another
    activation than SiLU.
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
