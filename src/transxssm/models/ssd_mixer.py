"""The state-space layer of the model: projections around the SSD scan (paper, Section 3 and Appendix A).

Letters: b batch, t time, h heads, g groups, p head_dim, n state size.
"""

import functools
import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.cache_utils import LinearAttentionLayer

from transxssm.models.cache_transxssm import read_ssd_state, write_ssd_state
from transxssm.models.configuration_transxssm import TransXSSMConfig
from transxssm.models.context_parallel import inputs_before, state_before
from transxssm.models.linear import HALF_PRECISION, apply_linear, at_least_float32
from transxssm.models.norm import TransXSSMRMSNorm
from transxssm.models.positions import Positions
from transxssm.models.selective_rotation import TransXSSMSelectiveRotation
from transxssm.ops import rotate_by_angles, short_convolution, ssd_chunk_scan, ssd_step, ssd_step_, swiglu
from transxssm.ops.ssd.parts import add_state_before

logger = logging.getLogger(__name__)

DYNAMICS_NAMES = ("A_log", "dt_bias", "D")


def name_in_checkpoints(name: str) -> str:
    """The name of a parameter or module in a checkpoint, where the parameters of `dynamics` belong to the SSD layer itself."""
    return re.sub(r"\bssd\.dynamics\b", "ssd", name)


class TransXSSMDynamics(nn.Module):
    """The per-head parameters of a state-space layer: A = −exp(A_log), the bias of dt, and D (Appendix A; D as in Mamba-2).

    They are float32 in a model of any dtype, since bfloat16 would change decays by a part in 256. They form a module, because FSDP shards
    parameters of one dtype together and gathers them when their module is called. Its results must be new tensors, since gathered
    parameters are freed after the call.
    """

    def __init__(self, num_heads: int, *, has_skip: bool) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(num_heads, dtype=torch.float32)) if has_skip else None

    def forward(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Computes dt (b, t, h), A (h,) and D (h,), at least float32, from W_dt u (b, t, h)."""
        dt = F.softplus(at_least_float32(projected) + at_least_float32(self.dt_bias))
        A = -torch.exp(at_least_float32(self.A_log))
        return dt, A, None if self.D is None else self.D.clone()


class TransXSSMSSDMixer(nn.Module):
    """The state-space layer: x, B, C and dt from the input, the SSD recurrence with rotated C and B, an output projection (Appendix A).

    Options, in the order in which they act: a short convolution on x, B and C (Mamba-2); an RMSNorm, then a bias, on every group's B
    and C (Mamba-3); the D skip; the output times silu(z), z = W_z u, then normalised over its whole width (Mamba-2).
    """

    def __init__(self, config: TransXSSMConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.ssd_num_heads, config.ssd_head_dim
        self.num_groups, self.state_size = config.ssd_num_groups, config.ssd_state_size
        self.chunk_size, self.scan_in_fp32 = config.ssd_chunk_size, config.ssd_scan_in_fp32
        x_size, state_size = self.num_heads * self.head_dim, self.num_groups * self.state_size
        self.split_sizes = (x_size, state_size, state_size)

        self.x_proj = nn.Linear(config.hidden_size, x_size, bias=False)
        self.B_proj = nn.Linear(config.hidden_size, state_size, bias=False)
        self.C_proj = nn.Linear(config.hidden_size, state_size, bias=False)
        # Quantisers skip this type of layer. One output per head fits none of their block sizes (bitsandbytes' 4-bit kernel refuses it
        # on a CPU) and would save nothing, and decays are exponentials of the output.
        self.dt_proj = NonDynamicallyQuantizableLinear(config.hidden_size, self.num_heads, bias=False)
        self.out_proj = nn.Linear(x_size, config.hidden_size, bias=False)
        self.conv_weight = None
        if config.ssd_conv_kernel_size:
            self.conv_weight = nn.Parameter(torch.empty(sum(self.split_sizes), config.ssd_conv_kernel_size))
        self.B_norm = self.C_norm = None
        if config.ssd_norm_BC:
            self.B_norm = TransXSSMRMSNorm(self.state_size, eps=config.rms_norm_eps)
            self.C_norm = TransXSSMRMSNorm(self.state_size, eps=config.rms_norm_eps)
        # Vectors like other biases, and not (g, n), since weight decay applies to parameters with two axes.
        self.B_bias = nn.Parameter(torch.empty(state_size)) if config.ssd_bias_BC else None
        self.C_bias = nn.Parameter(torch.empty(state_size)) if config.ssd_bias_BC else None
        self.z_proj = self.norm = None
        if config.ssd_output_gate:
            self.z_proj = nn.Linear(config.hidden_size, x_size, bias=False)
            self.norm = TransXSSMRMSNorm(x_size, eps=config.rms_norm_eps)
        self.dynamics = TransXSSMDynamics(self.num_heads, has_skip=config.ssd_skip)
        self.rotation = None
        if config.is_selective and config.rotates_ssd:
            self.rotation = TransXSSMSelectiveRotation(config, self.num_groups, config.ssd_num_rotated_pairs)

    @property
    def A_log(self) -> nn.Parameter:
        return self.dynamics.A_log

    @property
    def dt_bias(self) -> nn.Parameter:
        return self.dynamics.dt_bias

    @property
    def D(self) -> nn.Parameter | None:
        return self.dynamics.D

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Accepts the names of checkpoints, too, since Trainer passes a checkpoint's tensors to `load_state_dict` unchanged.
        for name in DYNAMICS_NAMES:
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}dynamics.{name}"] = state_dict.pop(f"{prefix}{name}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def input_layers(self) -> tuple[nn.Module, ...]:
        """The layers that read the input, whose outputs `mix` takes."""
        layers = (self.x_proj, self.B_proj, self.C_proj, self.dt_proj)
        return layers if self.z_proj is None else (*layers, self.z_proj)

    @property
    def output_layer(self) -> nn.Module:
        return self.out_proj

    def forward(
        self,
        hidden_states: Tensor,
        positions: Positions,
        cached: LinearAttentionLayer | None = None,
        angle_state: LinearAttentionLayer | None = None,
    ) -> Tensor:
        if positions.padding_mask is not None:  # a pad may hold anything, NaN of a fully masked attention row included
            hidden_states = hidden_states.masked_fill(~positions.padding_mask[..., None].bool(), 0.0)
        projected = [apply_linear(layer, hidden_states) for layer in self.input_layers]
        angles = None
        if self.rotation is not None and positions.ssd_frequencies is not None:
            angles = self.rotation(hidden_states, positions.ssd_frequencies, positions, angle_state)
        return apply_linear(self.output_layer, self.mix(projected, positions, cached, angles))

    def mix(
        self,
        projected: Sequence[Tensor],
        positions: Positions,
        cached: LinearAttentionLayer | None = None,
        angles: Tensor | None = None,
    ) -> Tensor:
        """Computes the input of the output projection, (b, t, h p), from the outputs of `input_layers`, which are zero at pads.

        Args:
            angles: angles of the selective rotation.
        """
        x, B, C, dt_input, *gates = projected
        batch, length, _ = x.shape
        state, conv_state = read_ssd_state(cached)
        new_conv_state = None
        if self.conv_weight is not None:
            inputs = torch.cat((x, B, C), dim=-1)
            if positions.context is not None:
                conv_state = inputs_before(positions.context, inputs, self.conv_weight.shape[1] - 1)
            mixed, new_conv_state = short_convolution(
                inputs,
                self.conv_weight,
                initial_state=conv_state,
                seq_idx=positions.seq_idx,
                mask=positions.padding_mask,
            )
            x, B, C = mixed.split([part.shape[-1] for part in (x, B, C)], dim=-1)
        dt, A, D = self.dynamics(dt_input)
        if dt.dtype in HALF_PRECISION:  # the module returns float32
            warn_of_rounded_decays(dt.dtype)
            dt, A, D = dt.float(), A.float(), None if D is None else D.float()
        if positions.padding_mask is not None:  # after softplus, so that a pad leaves the state alone
            dt = dt * positions.padding_mask[..., None]
        x = x.view(batch, length, -1, self.head_dim)  # under tensor parallelism only this process's heads
        B, C = self._state_map(B, self.B_norm, self.B_bias), self._state_map(C, self.C_norm, self.C_bias)
        if positions.length_scale is not None:  # after the norm, which would cancel it
            C = (C * positions.length_scale[..., None, None]).to(C.dtype)
        if angles is not None:  # in addition to the rotation by position inside the scan
            B, C = rotate_by_angles(B, angles), rotate_by_angles(C, angles)
        dtype = x.dtype
        if self.scan_in_fp32:
            x, B, C = at_least_float32(x), at_least_float32(B), at_least_float32(C)

        rotary = positions.ssd_rotary
        if state is not None and length == 1:
            step_rotary = None if rotary is None else (rotary[0][:, 0], rotary[1][:, 0])
            token = (state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])
            if torch.is_grad_enabled() or state.dtype != dt.dtype:
                y, state = ssd_step(*token, rotary=step_rotary, D=D)
            else:
                y = ssd_step_(*token, rotary=step_rotary, D=D)  # in the cache's own buffer
        else:
            y, state = ssd_chunk_scan(
                x,
                dt,
                A,
                B,
                C,
                rotary=rotary,
                D=D,
                initial_state=state,
                seq_idx=positions.seq_idx,
                chunk_size=self.chunk_size,
            )
            if positions.context is not None:
                before = state_before(positions.context, state, dt, A)
                y = add_state_before(y, before, dt, A, C, rotary=rotary, seq_idx=positions.seq_idx)
        if cached is not None:
            write_ssd_state(cached, state, new_conv_state)
        y = y.reshape(batch, length, -1).to(dtype)
        if gates and self.norm is not None:
            y = self.norm(swiglu(gates[0], y))
        return y

    def _state_map(self, projected: Tensor, norm: nn.Module | None, bias: Tensor | None) -> Tensor:
        """(b, t, g, n): B or C of every group, normalised over the state and with its bias added, if the model has them."""
        state_map = projected.unflatten(-1, (-1, self.state_size))
        if norm is not None:
            state_map = norm(state_map)
        if bias is not None:
            state_map = (state_map + bias.view(-1, self.state_size)).to(state_map.dtype)
        return state_map


@functools.cache
def warn_of_rounded_decays(dtype: torch.dtype) -> None:
    """Warns once for each dtype."""
    logger.warning(
        "time steps and decays of SSD layers were rounded to %s: got mixed precision that casts what TransXSSMDynamics returns, expected "
        "float32; load the model in float32, or give FSDP a MixedPrecisionPolicy with output_dtype=None",
        dtype,
    )
