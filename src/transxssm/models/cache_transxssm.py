"""The decoding cache: transformers' dynamic cache, which also counts its tokens, remembers where the last document began, and
writes a token's keys and values where there is room instead of copying all the earlier ones.

Letters: b batch, h heads, t time, d head_dim of attention.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from transxssm.models.configuration_transxssm import TransXSSMConfig

_MIN_ROOM = 64  # tokens


class TransXSSMCache(DynamicCache):
    """Keys and values of the attention layers, one constant-size state for each SSD layer.

    What `DynamicCache` lacks: the length of an all-SSD model's cache (no layer there holds an entry per token, and `generate`
    asks), the start of the last document, so that tokens decoded after a packed row do not attend to its earlier documents, and
    room to grow (`GrowingLayer`).
    """

    def __init__(self, config: TransXSSMConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = GrowingLayer()
            elif type(layer) is DynamicSlidingWindowLayer:
                self.layers[index] = SlidingLayer(sliding_window=layer.sliding_window)
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


class GrowingLayer(DynamicLayer):
    """Keys and values at the front of buffers with room behind them, so that a token costs what it adds, not all before it.

    `keys` and `values` are views of what is filled. Whoever replaces them (a beam search, `crop`) need not know of the buffers:
    what no longer lies at a buffer's front is copied into a new one at the next update.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (b, h, t, d) each; returns all keys and values."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        self._buffers = {}
        super().reset()

    def _append(self, name: str, past: Tensor, new: Tensor) -> Tensor:
        start = past.shape[-2] if past.numel() else 0
        stop = start + new.shape[-2]
        buffer = self._buffers.get(name)
        if buffer is None or stop > buffer.shape[-2] or not _is_front(past, buffer):
            room = max(
                _MIN_ROOM, start // 4
            )  # a prompt is taken as it is; what goes on growing is copied ever more rarely
            buffer = new.new_empty(*new.shape[:-2], stop + room, new.shape[-1])
            if start:
                buffer[..., :start, :] = past
            self._buffers[name] = buffer
        buffer[..., start:stop, :] = new
        return buffer[..., :stop, :]


class SlidingLayer(DynamicSlidingWindowLayer):
    """The keys and values of each row's last tokens, as many as a window reaches back; pads take none of their places."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends (b, h, t, d) each; returns those that were kept and the new ones.

        Args:
            padding_mask: (b, t), 0 at pads.
        """
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.record_past:
            return keys, values
        num_passed = max(keys.shape[-2] - (self.sliding_window - 1), 0)
        if self.sliding_window == 1:  # of which transformers keeps all
            self.keys, self.values = keys[..., num_passed:, :], values[..., num_passed:, :]
        elif padding_mask is not None:
            batch, length = padding_mask.shape
            is_kept = F.pad(padding_mask.bool(), (keys.shape[-2] - length, 0), value=True)  # (b, kept + t)
            order = is_kept.int().argsort(dim=1, stable=True)[:, num_passed:]  # pads first
            self.keys, self.values = (
                tensor.gather(2, order[:, None, :, None].expand(batch, tensor.shape[1], -1, tensor.shape[3]))
                for tensor in (keys, values)
            )
        return keys, values


def _is_front(part: Tensor, buffer: Tensor) -> bool:
    """Whether `part` is the first tokens of `buffer`, in place."""
    return (
        part.data_ptr() == buffer.data_ptr()
        and part.shape[:-2] == buffer.shape[:-2]
        and part.stride() == buffer.stride()
    )


def ssd_state_of(cache: Cache | None, layer_idx: int) -> LinearAttentionLayer | None:
    """A layer's own part of the cache, which is all that an SSD layer sees: a layer that looked itself up by its number would be
    compiled once for every number, and each call would try the others first.

    Raises:
        ValueError: a cache that was made without this model's config.
    """
    if cache is None:
        return None
    part = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not isinstance(part, LinearAttentionLayer):
        raise ValueError(
            f"the cache must be made from the model's config, as TransXSSMCache(config=model.config) is: got a {type(cache).__name__} "
            f"that holds {'nothing' if part is None else 'a ' + type(part).__name__} for layer {layer_idx}, expected a "
            "LinearAttentionLayer "
            "(PEFT's prefix tuning makes keys and values for every layer, and an SSD layer has none: use prompt tuning)"
        )
    return part


def read_ssd_state(cached: LinearAttentionLayer | None) -> tuple[Tensor | None, Tensor | None]:
    """(recurrent state, convolution state) of a layer, or (None, None) before its first tokens."""
    if cached is None or not cached.has_previous_state[0]:
        return None, None
    state, conv_state = cached.recurrent_states[0], cached.conv_states[0]
    if torch.is_grad_enabled():  # the buffers are overwritten in place, which backward must not see
        return state.clone(), None if conv_state is None else conv_state.clone()
    return state, conv_state


def write_ssd_state(cached: LinearAttentionLayer, state: Tensor, conv_state: Tensor | None) -> None:
    """Copies a layer's new states into the cache and marks them as there.

    transformers marks a layer in `update_conv_state` only, so that without this a model without convolution would start
    from zero again at every call.
    """
    cached.update_recurrent_state(state)
    if conv_state is not None:
        if not cached.is_conv_states_initialized[0]:
            cached.lazy_initialization(conv_states=conv_state)
        cached.conv_states[0].copy_(conv_state)
    cached.device = state.device
    cached.has_previous_state[0] = True
