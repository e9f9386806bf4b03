"""The decoding caches: transformers' own, which also count their tokens, remember where the last document began, and write a token's
keys and values where there is room instead of copying all the earlier ones.

Letters: b batch, h heads, t time, d head_dim of attention.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticCache,
)
from transformers.utils.import_utils import is_tracing

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
            elif type(layer) is LinearAttentionLayer:
                self.layers[index] = StateLayer(number_of_states=layer.number_of_states)
        self.document_start: Tensor | None = None  # (b,) index of the last document's first token, 0 everywhere if None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens, pads included."""
        return super().get_seq_length(layer_idx) if has_keys(self) else num_counted_tokens(self)

    @property
    def is_compileable(self) -> bool:
        """Lengths are Python integers that change at every token."""
        return False

    def reset(self) -> None:
        super().reset()
        self.document_start = None

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens away, −tokens_to_remove of them, where all layers attend.

        Raises:
            ValueError: an SSD layer, whose state has summed the tokens; tokens of a packed row's earlier documents.
        """
        if tokens_to_remove and any(isinstance(layer, LinearAttentionLayer) for layer in self.layers):
            raise ValueError(
                f"crop({tokens_to_remove}) would take back tokens that the states of SSD layers, or running angles, have summed: keep a "
                "copy.deepcopy of the cache from before them, or run the text again"
            )
        length = self.get_seq_length() - abs(tokens_to_remove)
        if self.document_start is not None and bool((self.document_start > length).any()):
            raise ValueError(
                f"crop({tokens_to_remove}) would take back tokens from before a packed row's last document: got {self.get_seq_length()} "
                f"cached tokens, the last document's from {self.document_start.tolist()} on; run the text again"
            )
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_documents(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_documents(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.document_start is not None:
            self.document_start = self.document_start.repeat_interleave(repeats, dim=0)

    def _select_documents(self, indices: Tensor) -> None:
        if self.document_start is not None:
            self.document_start = self.document_start[indices.to(self.document_start.device)]


class StaticStatesCache(StaticCache):
    """A cache of states alone, whose step can be compiled once: a tensor counts its tokens, as those of other static caches are."""

    def get_seq_length(self, layer_idx: int = 0) -> Tensor | int:
        """Number of cached tokens, pads included."""
        return num_counted_tokens(self)


def has_keys(cache: Cache) -> bool:
    """Whether any layer of the cache attends, and so counts its tokens. One that is made at the first token does."""
    return not cache.layers or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def num_cached_tokens(cache: Cache | None) -> Any:
    """Number of cached tokens, pads included, in any cache: an integer, or a tensor where a static cache counts."""
    if cache is None:
        return 0
    return cache.get_seq_length() if has_keys(cache) else num_counted_tokens(cache)


def num_counted_tokens(cache: Cache) -> Any:
    """What `count_tokens` has counted since the states began."""
    first = cache.layers[0]
    return getattr(first, "num_seen_tokens", 0) if first.has_previous_state[0] else 0


def count_tokens(cache: Cache, num_before: Any, num_new: int) -> None:
    """Notes on a cache of states alone how many tokens they have summed. The first of them keeps it: any cache may hold them."""
    if has_keys(cache):
        return
    first = cache.layers[0]
    if not isinstance(cache, StaticCache):
        first.num_seen_tokens = num_before + num_new
    elif getattr(first, "num_seen_tokens", None) is None:
        first.num_seen_tokens = torch.full((), num_new, dtype=torch.long, device=first.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(first.num_seen_tokens)
    elif num_before is first.num_seen_tokens:
        first.num_seen_tokens.add_(num_new)
    else:  # after a reset
        first.num_seen_tokens.fill_(num_new)


class StateLayer(LinearAttentionLayer):
    """A layer's states, of which rows can be taken and repeated, and no token taken back."""

    is_croppable = False

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        self._map_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows of `indices`."""
        self._map_states(lambda state: state[indices.to(state.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Of no tokens; others `TransXSSMCache.crop` refuses."""

    def _map_states(self, change: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = change(state)


class _Room:
    """Buffers in a slot, where exporters, which make an input and an output of every attribute, do not see them."""

    __slots__ = ("_buffers",)
    _buffers: dict[str, Tensor]


class GrowingLayer(_Room, DynamicLayer):
    """Keys and values at the front of buffers with room behind them, so that a token costs what it adds, not all before it.

    `keys` and `values` are views of what is filled. Whoever replaces them (a beam search, `crop`) need not know of the buffers:
    what no longer lies at a buffer's front is copied into a new one at the next update. What is traced appends a copy.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (b, h, t, d) each; returns all keys and values."""
        needs_grad = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if needs_grad or is_tracing(key_states):
            self._buffers = {}
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
        dtype = torch.promote_types(past.dtype, new.dtype)  # what was cached under autocast may go on without
        buffers = self._own_buffers()
        buffer = buffers.get(name)
        if buffer is None or buffer.dtype != dtype or stop > buffer.shape[-2] or not _is_front(past, buffer):
            room = max(
                _MIN_ROOM, start // 4
            )  # a prompt is taken as it is; what goes on growing is copied ever more rarely
            buffer = new.new_empty(*new.shape[:-2], stop + room, new.shape[-1], dtype=dtype)
            if start:
                buffer[..., :start, :] = past
            buffers[name] = buffer
        buffer[..., start:stop, :] = new
        return buffer[..., :stop, :]

    def _own_buffers(self) -> dict[str, Tensor]:
        if not hasattr(self, "_buffers"):  # a layer that was put together out of its attributes
            self._buffers = {}
        return self._buffers


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


def angle_states_of(cache: Cache | None, num_layers: int) -> list[LinearAttentionLayer] | None:
    """The last inputs and the running angle of each layer's selective rotation, which any cache keeps behind the model's own layers: they
    are reset, reordered, repeated and moved with them."""
    if cache is None:
        return None
    while len(cache.layers) < 2 * num_layers:
        cache.layers.append(StateLayer())
    return cache.layers[num_layers:]


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
        previous = cached.conv_states[0]
        if previous is None or torch.promote_types(previous.dtype, conv_state.dtype) != previous.dtype:
            cached.lazy_initialization(conv_states=conv_state)  # and where the old one, of an autocast, would round
        cached.conv_states[0].copy_(conv_state)
    cached.device = state.device
    cached.has_previous_state[0] = True
