"""The decoding caches. They extend transformers' own: they count their tokens, remember where the last document began, and append a
token's keys and values in place instead of copying all earlier ones.

Letters: b batch, h heads, t time, d head_dim of attention.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.import_utils import is_tracing

from transxssm.models.configuration_transxssm import TransXSSMConfig

_MIN_ROOM = 64  # tokens
_FILE_FORMAT = "transxssm cache 1"


@dataclass(frozen=True)
class CacheSnapshot:
    """The contents of a cache at one moment, for `TransXSSMCache.restore`: the states, and only the number of keys and values.

    Args:
        num_tokens: number of tokens in the cache, pads included.
        num_bytes: size of the snapshot, which does not depend on the number of tokens.
    """

    num_tokens: int
    num_bytes: int
    _cuts: list[int]  # the list of the cache itself, by which it recognises its snapshots
    _num_cuts: int
    _layers: list[dict[str, Any]]
    _document_start: Tensor | None


class _Cuts:
    """The number of tokens that were left after each removal from a cache, and −1 for each change of its rows.

    It is kept in a slot, since exporters make an output of every other attribute.
    """

    __slots__ = ("_list",)
    _list: list[int]

    @property
    def _cuts(self) -> list[int]:
        if not hasattr(self, "_list"):  # a cache that was put together out of its attributes
            self._list = []
        return self._list


class TransXSSMCache(_Cuts, DynamicCache):
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
        self.document_start: Tensor | None = None  # (b,) index of the last document's first token; None if all are 0

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
        self._cuts.append(-1)

    def snapshot(self) -> CacheSnapshot:
        """Records the contents of the cache, so that tokens that are read from now on can be removed again.

        It copies the states of SSD layers and the keys and values of sliding windows, a constant number of bytes. The keys and values of
        full attention layers stay in the cache. For an independent copy use `copy.deepcopy`.
        """
        layers = [_contents_of(layer) for layer in self.layers]
        tensors = [each for contents in layers for each in contents.values() if isinstance(each, Tensor)]
        return CacheSnapshot(
            num_tokens=self.get_seq_length(),
            num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            _cuts=self._cuts,
            _num_cuts=len(self._cuts),
            _layers=layers,
            _document_start=self.document_start,
        )

    def restore(self, snapshot: CacheSnapshot) -> None:
        """Restores the contents that the cache had at a snapshot. A snapshot can be restored any number of times.

        Raises:
            ValueError: the snapshot is of another cache, or no longer fits because its tokens were removed or the rows of the batch were
                changed after it.
        """
        if snapshot._cuts is not self._cuts:
            raise ValueError(
                "the snapshot is of another cache: got one that this cache has not made (a copy of a cache makes its own)"
            )
        if any(cut < snapshot.num_tokens for cut in self._cuts[snapshot._num_cuts :]):
            raise ValueError(
                f"the snapshot of {snapshot.num_tokens} tokens no longer fits: since then the cache went back further, or its rows were "
                "reordered, repeated or reset; keep a copy.deepcopy of the cache instead"
            )
        for index, layer in enumerate(self.layers):
            # Layers for the states of selective rotations are added at the first token.
            _put_back(layer, snapshot._layers[index] if index < len(snapshot._layers) else {}, snapshot.num_tokens)
        self.document_start = snapshot._document_start
        self._cuts.append(snapshot.num_tokens)

    def save(self, path: str | Path, model: PreTrainedModel) -> None:
        """Writes the cache into a safetensors file, for `load` with the same model.

        Args:
            path: path of the file.
            model: the model of the cache. Its fingerprint is stored in the file.
        """
        tensors = {} if self.document_start is None else {"document_start": self.document_start}
        numbers = []
        for index, layer in enumerate(self.layers):
            contents = _contents_of(layer, with_all_keys=True)
            tensors |= {f"layers.{index}.{name}": each for name, each in contents.items() if isinstance(each, Tensor)}
            numbers.append({name: each for name, each in contents.items() if isinstance(each, int)})
        metadata = {"format": _FILE_FORMAT, "model": fingerprint_of(model), "layers": json.dumps(numbers)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> "TransXSSMCache":
        """Reads a cache that `save` has written, onto the model's device.

        Raises:
            ValueError: the file does not exist, holds no cache, is damaged, or holds the cache of another model.
        """
        try:
            with safe_open(path, framework="pt", device=str(model.device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"the cache in {path} cannot be read: {error}") from None
        if metadata.get("format") != _FILE_FORMAT:
            raise ValueError(f"{path} holds no cache: got format {metadata.get('format')!r}, expected {_FILE_FORMAT!r}")
        fingerprint = fingerprint_of(model)
        if metadata["model"] != fingerprint:
            raise ValueError(
                f"the cache in {path} is another model's: got fingerprint {metadata['model']}, expected {fingerprint}; load it with the "
                "model and the dtype that it was made with"
            )
        cache = cls(config=model.config)
        numbers = json.loads(metadata["layers"])
        while len(cache.layers) < len(numbers):
            cache.layers.append(StateLayer())  # for selective rotations
        cache.document_start = tensors.pop("document_start", None)
        for index, layer in enumerate(cache.layers):
            prefix = f"layers.{index}."
            own = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
            _put_back(layer, numbers[index] | own, None)
        return cache

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last −tokens_to_remove tokens, if all layers are attention layers.

        Raises:
            ValueError: there is an SSD layer, whose state has summed the tokens, or the tokens are of a packed row's earlier documents.
        """
        if tokens_to_remove and any(isinstance(layer, LinearAttentionLayer) for layer in self.layers):
            raise ValueError(
                f"crop({tokens_to_remove}) would take back tokens that the states of SSD layers, or running angles, have summed: take a "
                "snapshot() of the cache before them and restore() it, or run the text again"
            )
        length = self.get_seq_length() - abs(tokens_to_remove)
        if self.document_start is not None and bool((self.document_start > length).any()):
            raise ValueError(
                f"crop({tokens_to_remove}) would take back tokens from before a packed row's last document: got {self.get_seq_length()} "
                f"cached tokens, the last document's from {self.document_start.tolist()} on; run the text again"
            )
        super().crop(tokens_to_remove)
        self._cuts.append(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_documents(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_documents(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._cuts.append(-1)
        if self.document_start is not None:
            self.document_start = self.document_start.repeat_interleave(repeats, dim=0)

    def _select_documents(self, indices: Tensor) -> None:
        self._cuts.append(-1)
        if self.document_start is not None:
            self.document_start = self.document_start[indices.to(self.document_start.device)]


class StaticStatesCache(StaticCache):
    """A cache of states alone, whose step can be compiled once. A tensor counts its tokens, as in other static caches."""

    def get_seq_length(self, layer_idx: int = 0) -> Tensor | int:
        """Number of cached tokens, pads included."""
        return num_counted_tokens(self)


def has_keys(cache: Cache) -> bool:
    """Whether any layer of the cache is an attention layer, which counts its tokens. A layer that is made at the first token is one."""
    return not cache.layers or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def num_cached_tokens(cache: Cache | None) -> Any:
    """Number of cached tokens, pads included, in any cache: an integer, or a tensor if a static cache counts."""
    if cache is None:
        return 0
    return cache.get_seq_length() if has_keys(cache) else num_counted_tokens(cache)


def num_counted_tokens(cache: Cache) -> Any:
    """The number of tokens that `count_tokens` has counted since the states were zero."""
    first = cache.layers[0]
    return getattr(first, "num_seen_tokens", 0) if first.has_previous_state[0] else 0


def count_tokens(cache: Cache, num_before: Any, num_new: int) -> None:
    """Records in a cache of states alone how many tokens they have summed. The first layer holds the count, in any kind of cache."""
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
    """A layer's states. Rows can be selected and repeated, but no token can be removed."""

    is_croppable = False

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        self._map_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows of `indices`."""
        self._map_states(lambda state: state[indices.to(state.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Does nothing: `TransXSSMCache.crop` refuses to remove tokens from states."""

    def _map_states(self, change: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = change(state)


class _Room:
    """Buffers in a slot, since exporters make an input and an output of every other attribute."""

    __slots__ = ("_buffers",)
    _buffers: dict[str, Tensor]


class GrowingLayer(_Room, DynamicLayer):
    """Keys and values at the front of larger buffers, so that appending a token does not copy the earlier ones.

    `keys` and `values` are views of the filled part. Code that replaces them (beam search, `crop`) need not know about the buffers:
    tensors that are not at the front of a buffer are copied into a new one at the next update. While tracing, an update makes a copy.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (b, h, t, d) each, and returns all keys and values."""
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
        dtype = torch.promote_types(past.dtype, new.dtype)  # the cached ones may come from autocast
        buffers = self._own_buffers()
        buffer = buffers.get(name)
        if buffer is None or buffer.dtype != dtype or stop > buffer.shape[-2] or not _is_front(past, buffer):
            room = max(_MIN_ROOM, start // 4)  # a prompt is not copied; a growing cache is copied less and less often
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
    """The keys and values of the last tokens of each row that fit into the window. Pads take no place in it."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends (b, h, t, d) each, and returns the kept and the new ones.

        Args:
            padding_mask: (b, t), 0 at pads.
        """
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.record_past:
            return keys, values
        num_passed = max(keys.shape[-2] - (self.sliding_window - 1), 0)
        if self.sliding_window == 1:  # transformers would keep all tokens
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


def _contents_of(layer: Any, *, with_all_keys: bool = False) -> dict[str, Any]:
    """Copies of a layer's tensors, and its counters. Empty before its first tokens.

    Args:
        with_all_keys: also copy keys and values of an attention layer without a window.
    """
    if isinstance(layer, LinearAttentionLayer):
        if not layer.has_previous_state[0]:
            return {}
        conv_state, num_seen = layer.conv_states[0], getattr(layer, "num_seen_tokens", None)
        contents = {"recurrent_state": layer.recurrent_states[0].clone()}
        contents |= {} if conv_state is None else {"conv_state": conv_state.clone()}
        return contents if num_seen is None else contents | {"num_seen_tokens": num_seen}
    if not layer.is_initialized:
        return {}
    if isinstance(layer, SlidingLayer):
        keys, values = layer.keys.clone(), layer.values.clone()
        return {"keys": keys, "values": values, "cumulative_length": layer.cumulative_length}
    return {"keys": layer.keys.clone(), "values": layer.values.clone()} if with_all_keys else {"is_front": 1}


def _put_back(layer: Any, contents: dict[str, Any], num_tokens: int | None) -> None:
    """Gives a layer the contents of `_contents_of`, or the first `num_tokens` of its own keys and values."""
    if not contents:
        layer.reset()
    elif isinstance(layer, LinearAttentionLayer):
        write_ssd_state(layer, contents["recurrent_state"], contents.get("conv_state"))  # copies them
        if "num_seen_tokens" in contents:
            layer.num_seen_tokens = contents["num_seen_tokens"]
    elif "keys" in contents:
        if not layer.is_initialized:
            layer.lazy_initialization(contents["keys"], contents["values"])
        layer.keys, layer.values = contents["keys"].clone(), contents["values"].clone()
        if "cumulative_length" in contents:
            layer.cumulative_length = contents["cumulative_length"]
    else:
        layer.keys, layer.values = layer.keys[..., :num_tokens, :], layer.values[..., :num_tokens, :]


def fingerprint_of(model: PreTrainedModel) -> str:
    """A hash of a model's options and weights, which identifies its caches.

    It reads some 1024 evenly spaced numbers of each weight, so that it costs milliseconds at any size. Training changes them all, but a
    change of a single number may go unnoticed.
    """
    own = {name: value for name, value in model.config.to_dict().items() if name in TransXSSMConfig.__annotations__}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // 1024)].to("cpu", torch.float64)
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _is_front(part: Tensor, buffer: Tensor) -> bool:
    """Whether `part` is a view of the first tokens of `buffer`."""
    return (
        part.data_ptr() == buffer.data_ptr()
        and part.shape[:-2] == buffer.shape[:-2]
        and part.stride() == buffer.stride()
    )


def ssd_state_of(cache: Cache | None, layer_idx: int) -> LinearAttentionLayer | None:
    """A layer's own part of the cache, which an SSD layer gets instead of the cache.

    A layer that looked itself up by its index would be compiled once for every index, and each call would check the guards of the others.

    Raises:
        ValueError: the cache was made without this model's config.
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
    """The last inputs and the running angle of each layer's selective rotation.

    Any cache keeps them after the model's own layers, so that they are reset, reordered, repeated and moved with these.
    """
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
    if torch.is_grad_enabled():  # backward needs the old values, and the buffers are overwritten in place
        return state.clone(), None if conv_state is None else conv_state.clone()
    return state, conv_state


def write_ssd_state(cached: LinearAttentionLayer, state: Tensor, conv_state: Tensor | None) -> None:
    """Copies a layer's new states into the cache and marks the layer as initialised.

    transformers marks a layer only in `update_conv_state`, so that otherwise a model without convolution would start from zero at every
    call.
    """
    cached.update_recurrent_state(state)
    if conv_state is not None:
        previous = cached.conv_states[0]
        if previous is None or torch.promote_types(previous.dtype, conv_state.dtype) != previous.dtype:
            cached.lazy_initialization(conv_states=conv_state)  # also if the old one is of a lower precision
        cached.conv_states[0].copy_(conv_state)
    cached.device = state.device
    cached.has_previous_state[0] = True
