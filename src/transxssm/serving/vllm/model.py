"""The model out of vLLM's layers. Weights have the names of our checkpoints; those of one input are read as one matrix.

Letters: n tokens of all sequences in a step, h heads, d head_dim of attention.
"""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFunc,
    get_conv_copy_spec,
    get_temporal_copy_spec,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    SupportsLoRA,
    SupportsMambaPrefixCaching,
    SupportsPP,
)
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from transxssm.models.configuration_transxssm import SSD_LAYER_TYPE, TransXSSMConfig
from transxssm.models.modeling_transxssm import TransXSSMRotaryEmbedding
from transxssm.models.positions import Rotary, length_scale
from transxssm.models.ssd_mixer import DYNAMICS_NAMES
from transxssm.ops import apply_rotary
from transxssm.serving.vllm.engine_config import check_model
from transxssm.serving.vllm.ssd_layer import SSDLayer, StateShapes, state_dtypes, state_shapes


class TransXSSMMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = get_act_and_mul_fn("silu" if config.hidden_act == "swish" else config.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate_up, _ = self.gate_up_proj(hidden_states)
        output, _ = self.down_proj(self.act_fn(gate_up))
        return output


class TransXSSMAttention(nn.Module):
    """vLLM's attention on queries and keys that our table has rotated."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        num_shards = get_tensor_model_parallel_world_size()
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads // num_shards
        self.num_kv_heads = max(1, config.num_key_value_heads // num_shards)
        self.split_sizes = [heads * self.head_dim for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        query_size = config.num_attention_heads * self.head_dim
        self.o_proj = RowParallelLinear(
            query_size, config.hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.g_proj = None
        if config.attention_output_gate:
            self.g_proj = ColumnParallelLinear(
                config.hidden_size, query_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.g_proj"
            )
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        is_sliding = config.layer_types[extract_layer_index(prefix)] == "sliding_attention"
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=config.sliding_window if is_sliding else None,
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden_states: Tensor, rotary: Rotary | None, scale: Tensor | None) -> Tensor:
        """(n, hidden) → (n, hidden).

        Args:
            rotary: cos and sin, each (n, d/2). None if queries and keys are not rotated.
            scale: (n,) factor on queries. Defaults to no scaling.
        """
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.split_sizes, dim=-1)
        q, k = q.unflatten(-1, (self.num_heads, -1)), k.unflatten(-1, (self.num_kv_heads, -1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q.contiguous()), self.k_norm(k.contiguous())
        if scale is not None:
            q = (q * scale[:, None, None]).to(q.dtype)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        output = self.attn(q.flatten(1), k.flatten(1), v)
        if self.g_proj is not None:
            gate, _ = self.g_proj(hidden_states)
            output = output * torch.sigmoid(gate)
        output, _ = self.o_proj(output)
        return output


class TransXSSMDecoderLayer(nn.Module):
    """A mixer, then an FFN, each behind an RMSNorm that also adds the residual."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.is_ssd = config.layer_types[extract_layer_index(prefix)] == SSD_LAYER_TYPE
        if self.is_ssd:
            self.ssd = SSDLayer(config, vllm_config, vllm_config.quant_config, f"{prefix}.ssd")
        else:
            self.self_attn = TransXSSMAttention(vllm_config, f"{prefix}.self_attn")
        self.mlp = TransXSSMMLP(vllm_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None,
        ssd_rotary: Rotary | None,
        attention_rotary: Rotary | None,
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        if self.is_ssd:
            cos, sin = (None, None) if ssd_rotary is None else ssd_rotary
            hidden_states = self.ssd(hidden_states, cos, sin, scale)
        else:
            hidden_states = self.self_attn(hidden_states, attention_rotary, scale)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


@support_torch_compile
class TransXSSMModel(nn.Module):
    """The decoder without its head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.rotary_emb = TransXSSMRotaryEmbedding(config)
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: TransXSSMDecoderLayer(vllm_config, prefix),
            prefix=maybe_prefix(prefix, "layers"),
        )
        self.norm: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """(n,) ids and positions → (n, hidden)."""
        residual: Tensor | None = None
        if get_pp_group().is_first_rank:
            if inputs_embeds is None:
                assert input_ids is not None
                inputs_embeds = self.embed_input_ids(input_ids)
            hidden_states = inputs_embeds
        else:
            assert intermediate_tensors is not None
            hidden_states, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        ssd_rotary, attention_rotary = self.rotary_emb.tables(positions, torch.float32)
        scale = length_scale(positions, self.config.length_scaling_base, torch.float32)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, residual = layer(hidden_states, residual, ssd_rotary, attention_rotary, scale)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class TransXSSMForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsMambaPrefixCaching, SupportsPP, SupportsLoRA):
    """The language model in vLLM."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={f".ssd.{name}": f".ssd.dynamics.{name}" for name in DYNAMICS_NAMES},
        orig_to_new_stacked={
            ".self_attn.q_proj": (".self_attn.qkv_proj", "q"),
            ".self_attn.k_proj": (".self_attn.qkv_proj", "k"),
            ".self_attn.v_proj": (".self_attn.qkv_proj", "v"),
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
            ".ssd.x_proj": (".ssd.in_proj", 0),
            ".ssd.B_proj": (".ssd.in_proj", 1),
            ".ssd.C_proj": (".ssd.in_proj", 2),
            ".ssd.z_proj": (".ssd.in_proj", 3),
        },
    )
    embedding_modules = {  # noqa: RUF012 (vLLM's own form)
        "embed_tokens": "input_embeddings",
        "lm_head": "output_embeddings",
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        check_model(config)
        self.config = config
        self.packed_modules_mapping = {
            "qkv_proj": ["q_proj", "k_proj", "v_proj"],
            "gate_up_proj": ["gate_proj", "up_proj"],
            "in_proj": ["x_proj", "B_proj", "C_proj"] + (["z_proj"] if config.ssd_output_gate else []),
        }
        self.model = TransXSSMModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            self.lm_head = head.tie_weights(self.model.embed_tokens) if config.tie_word_embeddings else head
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> StateShapes:
        """Of one slot of one layer; empty where no layer keeps states."""
        config: TransXSSMConfig = vllm_config.model_config.hf_config
        if SSD_LAYER_TYPE not in config.layer_types:
            return ()
        return state_shapes(config, vllm_config.parallel_config.tensor_parallel_size)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Of the same."""
        config: TransXSSMConfig = vllm_config.model_config.hf_config
        if SSD_LAYER_TYPE not in config.layer_types:
            return ()
        return state_dtypes(config, vllm_config.model_config.dtype)

    def get_mamba_state_copy_funcs(
        self, mamba_types: set[MambaAttentionBackendEnum]
    ) -> dict[MambaAttentionBackendEnum, tuple[MambaStateCopyFunc, ...]]:
        """How vLLM copies a state, and the convolution's last inputs where there are any, from one slot to another."""
        copies: tuple[MambaStateCopyFunc, ...] = (get_temporal_copy_spec, get_conv_copy_spec)
        return dict.fromkeys(mamba_types, copies[: len(state_shapes(self.config, 1))])

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
