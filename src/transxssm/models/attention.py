"""The attention layer of the model (paper, Section 3), through the attention functions of transformers.

Letters: b batch, t time, h heads, d head_dim.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from transxssm.models.configuration_transxssm import TransXSSMConfig
from transxssm.models.context_parallel import attention_in_parts
from transxssm.models.linear import apply_linear
from transxssm.models.norm import TransXSSMRMSNorm
from transxssm.models.positions import FirstKeys, Positions
from transxssm.models.selective_rotation import TransXSSMSelectiveRotation
from transxssm.ops import (
    apply_rotary,
    causal_attention,
    has_attention_kernels,
    has_single_query_attention,
    rotate_by_angles,
    single_query_attention,
)


class TransXSSMAttention(nn.Module):
    """Causal self-attention with the rotary embedding that SSD layers use too (Eq. 4 and 6), and Llama's parameter names.

    Options: an RMSNorm of the queries and keys of each head before the rotation (QK-norm), with Qwen3's names; no rotation (NoPE); the
    heads' output times sigmoid(g), g = W_g u, before the output projection ("Gated Attention", arXiv 2505.06708).
    """

    def __init__(self, config: TransXSSMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        query_size, key_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, query_size, bias=False) if config.attention_output_gate else None
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = TransXSSMRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = TransXSSMRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.rotation = None
        if config.is_selective and config.rotates_attention:
            self.rotation = TransXSSMSelectiveRotation(config, config.num_key_value_heads, self.head_dim // 2)

    @property
    def input_layers(self) -> tuple[nn.Module, ...]:
        """The layers that read the input, whose outputs `mix` takes."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        return layers if self.g_proj is None else (*layers, self.g_proj)

    @property
    def output_layer(self) -> nn.Module:
        return self.o_proj

    def forward(
        self,
        hidden_states: Tensor,
        positions: Positions,
        attention_mask: Tensor | FirstKeys | None,
        past_key_values: Cache | None = None,
        angle_state: LinearAttentionLayer | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        projected = [apply_linear(layer, hidden_states) for layer in self.input_layers]
        angles = None
        if self.rotation is not None and positions.attention_frequencies is not None:
            angles = self.rotation(hidden_states, positions.attention_frequencies, positions, angle_state)
        output, weights = self.mix(projected, positions, attention_mask, past_key_values, angles, **kwargs)
        return apply_linear(self.output_layer, output), weights

    def mix(
        self,
        projected: Sequence[Tensor],
        positions: Positions,
        attention_mask: Tensor | FirstKeys | None,
        past_key_values: Cache | None = None,
        angles: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the input of the output projection, (b, t, h d), and the attention weights from the outputs of `input_layers`.

        Args:
            angles: angles of the selective rotation.
        """
        queries, keys, values, *gates = projected
        heads = (*queries.shape[:2], -1, self.head_dim)
        q, k = queries.view(heads), keys.view(heads)  # (b, t, h, d)
        v = values.view(heads).transpose(1, 2)  # (b, h, t, d)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if positions.length_scale is not None:  # after the norm, which would cancel it
            q = (q * positions.length_scale[..., None, None]).to(q.dtype)
        if angles is not None:
            q, k = rotate_by_angles(q, angles), rotate_by_angles(k, angles)
        if positions.attention_rotary is not None:
            q, k = apply_rotary(q, *positions.attention_rotary), apply_rotary(k, *positions.attention_rotary)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if past_key_values is not None:
            pads = {} if self.sliding_window is None else {"padding_mask": positions.padding_mask}
            k, v = past_key_values.update(k, v, self.layer_idx, **pads)
        weights = None
        dropout = self.attention_dropout if self.training else 0.0
        if isinstance(attention_mask, FirstKeys):
            output = causal_attention(q, k, v, attention_mask.numbers, scaling=self.scaling).transpose(1, 2)
        elif positions.context is not None:
            parts = attention_in_parts(
                positions.context, q, k, v, attention_mask, scaling=self.scaling, dropout=dropout
            )
            output = parts.transpose(1, 2)
        elif self._is_for_single_query(q, k, v, attention_mask):
            output = single_query_attention(q, k, v, attention_mask, scaling=self.scaling).transpose(1, 2)
        elif self._is_causal_for_kernels(q, k, v, attention_mask, kwargs):
            output = causal_attention(q, k, v, scaling=self.scaling).transpose(1, 2)
        else:
            attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            is_decoding_on_gpu = q.device.type == "cuda" and q.shape[2] == 1 and not torch.compiler.is_compiling()
            with without_cudnn_attention() if is_decoding_on_gpu else nullcontext():
                output, weights = attend(
                    self,
                    q,
                    k,
                    v,
                    attention_mask,
                    dropout=dropout,
                    scaling=self.scaling,
                    sliding_window=self.sliding_window,
                    **kwargs,
                )
        output = output.reshape(*heads[:2], -1)
        if gates:
            output = output * torch.sigmoid(gates[0])
        return output, weights

    def _is_causal_for_kernels(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
    ) -> bool:
        """Whether these are whole rows with causal attention and no mask, for which `has_kernels_for_rows` is true."""
        is_whole = attention_mask is None and 1 < q.shape[2] == k.shape[2]
        return is_whole and self.is_causal and has_kernels_for_rows(self.config, self.training, options, q, k, v)

    def _is_for_single_query(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> bool:
        """Whether SDPA decodes one token without gradients, and `single_query_attention` has a faster backend for it."""
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
        return (
            self.config._attn_implementation == "sdpa"
            and (attention_mask is None or _hides_keys_alike(attention_mask, k))
            and not (needs_grad or self.training)
            and has_single_query_attention(q, k, v)
        )


def _hides_keys_alike(mask: Tensor, k: Tensor) -> bool:
    """Whether the mask is boolean and hides the same keys from all heads and queries of a row."""
    return mask.dtype == torch.bool and mask.shape[1:] == (1, 1, k.shape[2])


def has_kernels_for_rows(
    config: TransXSSMConfig, is_training: bool, options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor
) -> bool:
    """Whether the call is causal attention by SDPA without dropout, for which `causal_attention` has kernels.

    Args:
        options: options of the attention function, possibly with transformers' `is_causal`.
    """
    is_causal = getattr(config, "is_causal", True) and options.get("is_causal") is not False
    has_dropout = is_training and config.attention_dropout > 0
    return config._attn_implementation == "sdpa" and is_causal and not has_dropout and has_attention_kernels(q, k, v)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Makes SDPA use another backend than cuDNN, if another is allowed.

    On Hopper torch prefers cuDNN, which builds a plan for every new number of keys. A decoded token waits 65 ms for it on an H200.
    """
    cuda = torch.backends.cuda
    has_another = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.math_sdp_enabled()
    if not (has_another and cuda.cudnn_sdp_enabled()):
        yield
        return
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(True)
