"""The decoding cache: transformers' dynamic cache, which also counts its tokens and remembers where the last document began."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from transxssm.models.configuration_transxssm import TransXSSMConfig


class TransXSSMCache(DynamicCache):
    """Keys and values of the attention layers, one constant-size state for each SSD layer.

    What `DynamicCache` lacks: the length of an all-SSD model's cache (no layer there holds an entry per token, and `generate`
    asks), and the start of the last document, so that tokens decoded after a packed row do not attend to its earlier documents.
    """

    def __init__(self, config: TransXSSMConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self._has_attention = config.has_attention
        self.num_seen_tokens = 0
        self.document_start: Tensor | None = None  # (b,) index of the last document's first token; None: 0 everywhere

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens, pads included."""
        if not self._has_attention:
            return self.num_seen_tokens
        return super().get_seq_length(layer_idx)

    @property
    def is_compileable(self) -> bool:
        """Lengths are Python integers that change at every token."""
        return False

    def reset(self) -> None:
        super().reset()
        self.num_seen_tokens = 0
        self.document_start = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.document_start is not None:
            self.document_start = self.document_start.index_select(0, beam_idx.to(self.document_start.device))


def read_ssd_layer(cache: Cache | None, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
    """(recurrent state, convolution state) of a layer, or (None, None) before its first tokens."""
    if cache is None or not cache.has_previous_state(layer_idx):
        return None, None
    layer = cache.layers[layer_idx]
    state, conv_state = layer.recurrent_states[0], layer.conv_states[0]
    if torch.is_grad_enabled():  # the buffers are overwritten in place, which backward must not see
        return state.clone(), None if conv_state is None else conv_state.clone()
    return state, conv_state


def write_ssd_layer(cache: Cache, layer_idx: int, state: Tensor, conv_state: Tensor | None) -> None:
    """Copies a layer's new states into the cache and marks them as there.

    transformers marks a layer in `update_conv_state` only, so that without this a model without convolution would start
    from zero again at every call.
    """
    layer = cache.layers[layer_idx]
    cache.update_recurrent_state(state, layer_idx)
    if conv_state is not None:
        if not layer.is_conv_states_initialized[0]:
            layer.lazy_initialization(conv_states=conv_state)
        layer.conv_states[0].copy_(conv_state)
    layer.device = state.device
    layer.has_previous_state[0] = True
