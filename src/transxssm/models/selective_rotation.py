"""Selective Unified RoPE: rotations by running angles that depend on the tokens, for attention's Q and K and for SSD layers' C and B alike.

Letters: b batch, t time, g key-value heads or groups, r rank, k kernel size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer

from transxssm.models.cache_transxssm import read_ssd_state, write_ssd_state
from transxssm.models.configuration_transxssm import TransXSSMConfig
from transxssm.models.context_parallel import inputs_before
from transxssm.models.linear import at_least_float32
from transxssm.models.positions import Positions
from transxssm.ops import running_angles, short_convolution


class TransXSSMSelectiveRotation(nn.Module):
    """The running angles of one layer (Selective RoPE, arXiv 2511.17388), as what they add to the fixed rotation of Unified RoPE.

    A token u turns pair i of head g by ω_i φ, with RoPE's frequencies ω and φ = 1 + conv(W_2 W_1 u/‖u‖): a projection of low rank, then a
    causal depthwise convolution. The angle of token t is ω_i Σ_{s ≤ t} φ_s = m_t ω_i + ω_i Σ_{s ≤ t} (φ_s − 1), and the first term is the
    rotation by position m_t that layers make anyhow. W_2 starts at 0, so that training starts at φ = 1, which is RoPE. With a gate φ is
    multiplied by 2 sigmoid(w_g · u/‖u‖), which starts at 1.

    The weights are float32 in a model of any dtype: an error of a part in 256 of φ would be a whole turn after some hundred tokens.

    Args:
        config: its rope_parameters have rank, kernel_size and gate.
        num_heads: key-value heads of attention, or groups of an SSD layer.
        num_pairs: of each that rotate.
    """

    def __init__(self, config: TransXSSMConfig, num_heads: int, num_pairs: int) -> None:
        super().__init__()
        rope = config.rope_parameters or {}
        self.num_heads = num_heads
        size, rank = (config.hidden_size, rope["rank"])
        self.down_weight = nn.Parameter(torch.empty(rank, size, dtype=torch.float32))
        self.up_weight = nn.Parameter(torch.empty(num_heads * num_pairs, rank, dtype=torch.float32))
        self.conv_weight = nn.Parameter(torch.empty(num_heads * num_pairs, rope["kernel_size"], dtype=torch.float32))
        self.gate_weight = nn.Parameter(torch.empty(num_heads, size, dtype=torch.float32)) if rope["gate"] else None

    def forward(
        self,
        hidden_states: Tensor,
        frequencies: Tensor,
        positions: Positions,
        cached: LinearAttentionLayer | None = None,
    ) -> Tensor:
        """ω_i Σ_{s ≤ t} (φ_s − 1), modulo 2π: (b, t, g, pairs) in float32, or float64 for a model in float64.

        Args:
            hidden_states: (b, t, hidden_size).
            frequencies: (pairs,) ω in radians per position.
            positions: of the tokens.
            cached: the layer's part of `angle_states_of` the cache.
        """
        context, padding = positions.context, positions.padding_mask
        before, conv_state = read_ssd_state(cached)
        with torch.autocast(hidden_states.device.type, enabled=False):
            if padding is not None:  # a pad may hold anything, NaN of a fully masked attention row included
                hidden_states = hidden_states.masked_fill(~padding[..., None].bool(), 0.0)
            direction = F.normalize(at_least_float32(hidden_states), dim=-1)
            low_rank = F.linear(direction, self.down_weight.to(direction.dtype))  # (b, t, r)
            inputs = F.linear(low_rank, self.up_weight.to(direction.dtype))
            if context is not None:
                conv_state = inputs_before(context, inputs, self.conv_weight.shape[1] - 1)
            advance, new_conv_state = short_convolution(
                inputs,
                self.conv_weight,
                initial_state=conv_state,
                seq_idx=positions.seq_idx,
                mask=padding,
                activation=None,
            )
            advance = advance.unflatten(-1, (self.num_heads, -1))  # (b, t, g, pairs) φ − 1
            if self.gate_weight is not None:
                gate = 2 * torch.sigmoid(F.linear(direction, self.gate_weight.to(direction.dtype)))
                advance = gate[..., None] * (1 + advance) - 1
            turns = (advance * (frequencies / (2 * math.pi))).flatten(-2)
            if padding is not None:
                turns = turns * padding[..., None].to(turns.dtype)
            if context is not None:
                _, of_part = running_angles(turns, bounds=positions.bounds)
                before = (context.part.gathered(of_part) * context.joins.T[..., None]).sum(0)
            angles, state = running_angles(turns, initial=before, bounds=positions.bounds)
        if cached is not None:
            write_ssd_state(cached, state, new_conv_state)
        return angles.unflatten(-1, (self.num_heads, -1))
