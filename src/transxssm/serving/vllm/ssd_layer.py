"""The state-space layer in vLLM: its projections are sharded by heads, its states live in vLLM's cache, one slot for each sequence.

Letters: n tokens of all sequences in a step, h heads, g groups, p head_dim, s state size, e channels of x, B and C, k kernel size of the
convolution; sizes are those of one shard.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.communication_op import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.model_loader.weight_utils import default_weight_loader, sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from transxssm.models.configuration_transxssm import TransXSSMConfig
from transxssm.models.norm import TransXSSMRMSNorm
from transxssm.models.ssd_mixer import TransXSSMDynamics
from transxssm.ops import short_convolution, short_convolution_, ssd_chunk_scan_, ssd_step_, swiglu
from transxssm.serving.vllm.plugin import STATE_BACKEND

StateShapes = tuple[tuple[int, ...], ...]


def state_shapes(config: TransXSSMConfig, num_shards: int) -> StateShapes:
    """Of one sequence's slot in one SSD layer: the state (h, p, s) and, with a convolution, its last inputs (k − 1, e)."""
    heads, groups = config.ssd_num_heads // num_shards, config.ssd_num_groups // num_shards
    state = (heads, config.ssd_head_dim, config.ssd_state_size)
    memory = config.ssd_conv_kernel_size - 1
    if memory < 1:
        return (state,)
    return state, (memory, heads * config.ssd_head_dim + 2 * groups * config.ssd_state_size)


def state_dtypes(config: TransXSSMConfig, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Of the same: states are float32 in a model of any dtype."""
    return (torch.float32,) if config.ssd_conv_kernel_size < 2 else (torch.float32, dtype)


@dataclass
class SSDMetadata(BaseMambaAttentionMetadata):
    """Which tokens of a step are whose: single tokens that go on from a state come first, longer pieces of prompts behind them."""

    cu_seqlens_p: Tensor | None = None  # (s + 1,) on the host: where each piece begins, and where the last ends


class SSDMetadataBuilder(BaseMambaAttentionMetadataBuilder[SSDMetadata]):
    """vLLM's own, which adds where the prompts' pieces begin: the host lays the scan out by it, and has it without asking the device."""

    metadata_cls = SSDMetadata
    needs_causal_conv1d_metadata = False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> SSDMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        if metadata.num_prefills:
            _, metadata.cu_seqlens_p = self._prefill_cpu_metadata(
                common_attn_metadata, metadata.num_reqs, metadata.num_prefills, metadata.num_decode_tokens
            )
        return metadata


class SSDBackend(AttentionBackend):
    """The name under which vLLM groups the layers' slots."""

    @staticmethod
    def get_name() -> str:
        return STATE_BACKEND

    @staticmethod
    def get_builder_cls() -> type[SSDMetadataBuilder]:
        return SSDMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class ShardedRMSNorm(nn.Module):
    """An RMSNorm over a width of which each shard holds a part."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.num_shards = get_tensor_model_parallel_world_size()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width // self.num_shards))
        set_weight_attrs(self.weight, {"weight_loader": sharded_weight_loader(0)})

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        squares = wide.square().sum(-1, keepdim=True)
        if self.num_shards > 1:
            squares = tensor_model_parallel_all_reduce(squares)
        return (wide * torch.rsqrt(squares / self.width + self.eps) * self.weight.float()).to(x.dtype)


class SSDLayer(MambaBase, nn.Module):
    """`TransXSSMSSDMixer` for the tokens of many sequences: the same options in the same order."""

    def __init__(
        self, config: TransXSSMConfig, vllm_config: VllmConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.config, self.prefix = config, prefix
        self.dtype = vllm_config.model_config.dtype
        self.num_shards = num_shards = get_tensor_model_parallel_world_size()
        self.num_heads, self.num_groups = config.ssd_num_heads // num_shards, config.ssd_num_groups // num_shards
        x_size, map_size = config.ssd_num_heads * config.ssd_head_dim, config.ssd_num_groups * config.ssd_state_size
        parts = [x_size, map_size, map_size] + ([x_size] if config.ssd_output_gate else [])
        self.split_sizes = [size // num_shards for size in parts[:3]]
        self.gate_size = sum(parts[3:]) // num_shards
        self.in_proj = MergedColumnParallelLinear(
            config.hidden_size, parts, bias=False, quant_config=quant_config, prefix=f"{prefix}.in_proj"
        )
        self.dt_proj = ColumnParallelLinear(  # never quantised, as in the mixer
            config.hidden_size, config.ssd_num_heads, bias=False, prefix=f"{prefix}.dt_proj"
        )
        self.out_proj = RowParallelLinear(
            x_size, config.hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.out_proj"
        )
        self.conv_weight = None
        if config.ssd_conv_kernel_size:
            self.conv_weight = nn.Parameter(torch.empty(sum(self.split_sizes), config.ssd_conv_kernel_size))
            set_weight_attrs(self.conv_weight, {"weight_loader": self._load_parts})
        self.B_norm = self.C_norm = None
        if config.ssd_norm_BC:
            self.B_norm = TransXSSMRMSNorm(config.ssd_state_size, eps=config.rms_norm_eps)
            self.C_norm = TransXSSMRMSNorm(config.ssd_state_size, eps=config.rms_norm_eps)
        self.B_bias = self.C_bias = None
        if config.ssd_bias_BC:
            self.B_bias = nn.Parameter(torch.empty(self.split_sizes[1]))
            self.C_bias = nn.Parameter(torch.empty(self.split_sizes[2]))
        self.norm = ShardedRMSNorm(x_size, config.rms_norm_eps) if config.ssd_output_gate else None
        self.dynamics = TransXSSMDynamics(self.num_heads, has_skip=config.ssd_skip)
        for parameter in (self.B_bias, self.C_bias, *self.dynamics.parameters()):
            if parameter is not None:
                set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})

        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two layers have the name {prefix}")
        layers[prefix] = self  # where vLLM finds the layers that need slots, and the operator its layer
        self.kv_cache: tuple[Tensor, ...] = (torch.tensor([]),)  # vLLM binds the slots of all sequences here

    def _load_parts(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """The channels of this shard's x, B and C."""
        rank = get_tensor_model_parallel_rank()
        parts = weight.split([size * self.num_shards for size in self.split_sizes])
        own = [part.narrow(0, rank * size, size) for part, size in zip(parts, self.split_sizes, strict=True)]
        default_weight_loader(parameter, torch.cat(own))

    def get_state_shape(self) -> StateShapes:
        return state_shapes(self.config, self.num_shards)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return state_dtypes(self.config, self.dtype)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum[STATE_BACKEND]

    def forward(
        self, hidden_states: Tensor, cos: Tensor | None, sin: Tensor | None, length_scale: Tensor | None
    ) -> Tensor:
        """(n, hidden) → (n, hidden).

        Args:
            cos, sin: (n, s/2) of B's and C's rotation. None if they are not rotated.
            length_scale: (n,) factor on C. Defaults to no scaling.
        """
        projected, _ = self.in_proj(hidden_states)
        projected_dt, _ = self.dt_proj(hidden_states)
        mixed, gate = projected, None
        if self.norm is not None:
            mixed, gate = projected.split([sum(self.split_sizes), self.gate_size], dim=-1)
        y = torch.ops.vllm.transxssm_ssd(mixed, projected_dt, cos, sin, length_scale, self.prefix)
        if self.norm is not None and gate is not None:
            y = self.norm(swiglu(gate, y))
        output, _ = self.out_proj(y)
        return output

    def run(
        self, mixed: Tensor, projected_dt: Tensor, cos: Tensor | None, sin: Tensor | None, length_scale: Tensor | None
    ) -> Tensor:
        """x, B and C before the convolution (n, e), and dt's projection (n, h), to y (n, h · p); reads and writes the slots."""
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, dict):
            metadata = metadata.get(self.prefix)
        y = mixed.new_zeros(len(mixed), self.split_sizes[0])
        if metadata is None:  # vLLM measures memory, or compiles
            return y
        num_decodes, num_actual = metadata.num_decode_tokens, metadata.num_decode_tokens + metadata.num_prefill_tokens
        mixed, projected_dt = mixed[:num_actual], projected_dt[:num_actual]
        if self.conv_weight is not None:
            mixed = self._convolve(mixed, self.conv_weight, metadata)
        x, B, C = mixed.split(self.split_sizes, dim=-1)
        x = x.unflatten(-1, (self.num_heads, -1))  # (n, h, p)
        B, C = self._state_map(B, self.B_norm, self.B_bias), self._state_map(C, self.C_norm, self.C_bias)
        if length_scale is not None:
            C = (C * length_scale[:num_actual, None, None]).to(C.dtype)
        if self.config.ssd_scan_in_fp32:
            x, B, C = x.float(), B.float(), C.float()
        dt, A, D = self.dynamics(projected_dt)
        states, rotary = self.kv_cache[0], None if cos is None or sin is None else (cos, sin)
        if num_decodes:
            x_d, dt_d, B_d, C_d = (tensor[:num_decodes] for tensor in (x, dt, B, C))
            y[:num_decodes] = ssd_step_(
                *(states, x_d, dt_d, A, B_d, C_d),
                rotary=None if rotary is None else (rotary[0][:num_decodes], rotary[1][:num_decodes]),
                D=D,
                state_indices=metadata.state_indices_tensor_d[:num_decodes, 0],
            ).flatten(1)
        if metadata.num_prefills:
            prompts = slice(num_decodes, num_actual)
            x_p, dt_p, B_p, C_p = (tensor[None, prompts] for tensor in (x, dt, B, C))
            y_p = ssd_chunk_scan_(
                *(states, x_p, dt_p, A, B_p, C_p),
                rotary=None if rotary is None else (rotary[0][None, prompts], rotary[1][None, prompts]),
                D=D,
                chunk_size=self.config.ssd_chunk_size,
                **_slots_of_prompts(metadata),
            )
            y[prompts] = y_p[0].flatten(1)
        return y

    def _convolve(self, mixed: Tensor, weight: Tensor, metadata: SSDMetadata) -> Tensor:
        """(n, e) → (n, e), each token with the last inputs of its own sequence."""
        if weight.shape[1] == 1:
            return short_convolution(mixed[None], weight)[0][0]
        inputs, num_decodes, outputs = self.kv_cache[1], metadata.num_decode_tokens, []
        if num_decodes:
            slots = metadata.state_indices_tensor_d[:num_decodes, 0]
            outputs.append(short_convolution_(inputs, mixed[:num_decodes, None], weight, state_indices=slots)[:, 0])
        if metadata.num_prefills:
            prompts = mixed[None, num_decodes:]
            outputs.append(short_convolution_(inputs, prompts, weight, **_slots_of_prompts(metadata))[0])
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _state_map(self, projected: Tensor, norm: nn.Module | None, bias: Tensor | None) -> Tensor:
        """(n, g, s): B or C of every group, normalised over the state and moved by its bias where there are any."""
        state_map = projected.unflatten(-1, (self.num_groups, -1))
        if norm is not None:
            state_map = norm(state_map)
        return state_map if bias is None else (state_map + bias.view(self.num_groups, -1)).to(state_map.dtype)


def _slots_of_prompts(metadata: SSDMetadata) -> dict[str, Any]:
    """Which of a step's tokens are one prompt's piece, the slot of each, and whether it goes on from what its slot holds."""
    return {
        "cu_seqlens": metadata.cu_seqlens_p,
        "state_indices": metadata.state_indices_tensor_p,
        "has_initial_state": metadata.has_initial_states_p,
    }


def _ssd(
    mixed: Tensor,
    projected_dt: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    length_scale: Tensor | None,
    layer_name: str,
) -> Tensor:
    layer = get_forward_context().no_compile_layers[layer_name]
    return layer.run(mixed, projected_dt, cos, sin, length_scale)


def _ssd_shape(
    mixed: Tensor,
    projected_dt: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    length_scale: Tensor | None,
    layer_name: str,
) -> Tensor:
    layer = get_forward_context().no_compile_layers[layer_name]
    return mixed.new_empty(mixed.shape[0], layer.split_sizes[0])


direct_register_custom_op(op_name="transxssm_ssd", op_func=_ssd, fake_impl=_ssd_shape)
