"""What each token attends to: pads, and for each kind of attention layer a mask or, for kernels that take it, the per-query KV start.

Letters: b batch, t time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils.import_utils import is_tracing

from transxssm.models.attention import has_kernels_for_rows
from transxssm.models.cache_transxssm import TransXSSMCache
from transxssm.models.configuration_transxssm import SSD_LAYER_TYPE, TransXSSMConfig
from transxssm.models.positions import (
    FirstKeys,
    WindowedKeys,
    documents_from_positions,
    first_keys_in,
    has_pads_between,
    key_documents,
    left_pads,
    windowed_keys,
)

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # takes the indices of row, head, query and key


def padding_of(
    config: TransXSSMConfig,
    attention_mask: Tensor | dict[str, Tensor | None] | None,
    past_length: int,
    length: int,
) -> Tensor | None:
    """The two-dimensional mask, (b, cached + t), if there is one, after a check that SSD layers can read pads from it.

    Raises:
        ValueError: the mask has another shape.
    """
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.dim() != 2 and (SSD_LAYER_TYPE in config.layer_types or config.is_selective):
        raise ValueError(
            "attention_mask must have shape (b, cached + t), since SSD layers and selective rotations read pads from it: "
            f"got {tuple(attention_mask.shape)}; pass seq_idx for packed rows"
        )
    if attention_mask.dim() == 2 and attention_mask.shape[1] != past_length + length:
        raise ValueError(
            f"attention_mask must cover the {past_length} cached and the {length} new tokens: got {attention_mask.shape[1]} columns"
        )
    return attention_mask if attention_mask.dim() == 2 else None


def first_keys_by_kind(
    config: TransXSSMConfig,
    is_training: bool,
    options: dict[str, Any],
    inputs_embeds: Tensor,
    seq_idx: Tensor | None,
    padding: Tensor | None,
) -> dict[str, FirstKeys] | None:
    """The first key that each token sees, for each kind of attention layer.

    None if masks are needed, because no kernel takes first keys, or because the keys that a token sees are not a range.

    Args:
        options: options of the attention function.
        inputs_embeds: (b, t, hidden), whole rows.
        seq_idx: (b, t) documents of packed rows.
        padding: (b, t), 0 at pads. No token sees pads on its right. While tracing, its values cannot be read, and the result is None.
    """
    if inputs_embeds.device.type != "cpu" or (padding is not None and is_tracing(padding)):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else inputs_embeds.dtype
    head = inputs_embeds.new_empty(1, 1, 1, config.head_dim, dtype=dtype)  # like the heads that projections will make
    if not has_kernels_for_rows(config, is_training, options, head, head, head):
        return None
    num_left_pads = None
    if padding is not None and not padding.all():
        num_left_pads = left_pads(padding)
        if num_left_pads is None:
            return None
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    return {
        kind: first_keys_in(window, seq_idx, num_left_pads, inputs_embeds)
        for kind, window in windows.items()
        if kind in config.layer_types
    }


def documents_of(
    config: TransXSSMConfig, position_ids: Tensor, padding: Tensor | None, cache: Cache | None
) -> Tensor | None:
    """(b or 1, t) document of each token, derived from restarts in `position_ids`. None if each row is one document.

    While tracing, the numbers are always formed. If the cache or attention does not support documents, the graph asserts that there is
    only one.
    """
    seq_idx = documents_from_positions(position_ids, padding)
    if seq_idx is None or not is_tracing(seq_idx):
        return seq_idx
    refusal = refusal_of_documents(config, cache)
    if refusal is None:
        return seq_idx
    torch._assert_async((seq_idx == 0).all(), refusal)
    return None


def refusal_of_documents(config: TransXSSMConfig, cache: Cache | None) -> str | None:
    """Why documents of packed rows would see each other in this cache or attention. None if they would not."""
    if cache is not None and not isinstance(cache, TransXSSMCache):
        return (
            "packed rows need a cache that remembers where the last document began: "
            f"got {type(cache).__name__}, expected TransXSSMCache(config=model.config) or use_cache=False"
        )
    if config.has_attention and "flash" in config._attn_implementation:
        return (
            "packed rows need a mask, which flash attention does not take: got attn_implementation="
            f"{config._attn_implementation!r}, expected 'sdpa', 'eager' or 'flex_attention'"
        )
    return None


def refusal_of_pads_between(config: TransXSSMConfig, cache: Cache | None) -> str | None:
    """Why a sliding window would count pads between tokens. None if it would not."""
    if "sliding_attention" not in config.layer_types or cache is None or isinstance(cache, TransXSSMCache):
        return None
    return (
        "a sliding window over rows with pads between their tokens needs a cache that keeps no pads: "
        f"got {type(cache).__name__}, expected TransXSSMCache(config=model.config) or use_cache=False; or pad on the left only"
    )


def _counts_tokens(config: TransXSSMConfig, padding: Tensor | None, cache: Cache | None) -> bool:
    """Whether windows have to skip pads between tokens. transformers' windows count columns, pads included.

    Raises:
        ValueError: the cache keeps columns. While tracing, the graph asserts instead that there are no such pads.
    """
    if "sliding_attention" not in config.layer_types or padding is None:
        return False
    is_traced = is_tracing(padding)
    if not is_traced and not has_pads_between(padding).any():
        return False
    refusal = refusal_of_pads_between(config, cache)
    if refusal is None:
        return True
    if not is_traced:
        raise ValueError(refusal)
    torch._assert_async(~has_pads_between(padding).any(), refusal)
    return False


def attention_masks(
    config: TransXSSMConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    past_length: int,
    seq_idx: Tensor | None,
) -> dict[str, Tensor | None]:
    """The mask of each kind of attention layer in the model. It is causal, and hides pads and other documents.

    Raises:
        ValueError: rows are packed, and the cache or the attention implementation would let documents leak; or there are pads between
            tokens, and the cache would count them.
    """
    documents = None
    cached_start = cache.document_start if isinstance(cache, TransXSSMCache) else None
    if seq_idx is not None or cached_start is not None:
        refusal = refusal_of_documents(config, cache)
        if refusal is not None:
            raise ValueError(refusal)
        documents = key_documents(seq_idx, inputs_embeds, past_length, cached_start)  # (b, cached + t)

    same_document: MaskFunction | None = None
    if documents is not None:

        def same_document(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return documents[batch_idx, q_idx] == documents[batch_idx, kv_idx]

    create = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    padding_of_kind = dict.fromkeys(create, attention_mask)
    is_seen: dict[str, MaskFunction | None] = dict.fromkeys(create, same_document)
    padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
    if padding is not None and _counts_tokens(config, padding, cache):
        keys = windowed_keys(padding, past_length, seq_idx, cached_start)
        create["sliding_attention"] = create_causal_mask
        padding_of_kind["sliding_attention"] = keys.is_token
        # Flash attention removes pads by itself before it counts, and takes no mask function.
        is_seen["sliding_attention"] = (
            None if "flash" in config._attn_implementation else _is_in_window(config.sliding_window, keys)
        )
    takes_tensors = config._attn_implementation in ("sdpa", "eager") and (attention_mask is None or padding is not None)
    masks = {}
    for kind in create:
        if kind not in config.layer_types:
            continue
        restriction = is_seen[kind]
        # Without layer_idx, transformers 5.17 may read the lengths of an SSD layer.
        options: dict[str, Any] = {"layer_idx": config.layer_types.index(kind)}
        if takes_tensors:
            options["allow_is_causal_skip"] = restriction is None
        else:
            options["and_mask_function"] = restriction
        mask = create[kind](config, inputs_embeds, padding_of_kind[kind], cache, **options)
        if takes_tensors and restriction is not None:
            mask = _restricted(mask, restriction, inputs_embeds, past_length)
        masks[kind] = mask
    return masks


def _restricted(mask: Tensor, is_seen: MaskFunction, inputs_embeds: Tensor, past_length: int) -> Tensor:
    """Restricts a boolean or additive mask of transformers, (b, 1, t, keys), by a function of indices.

    transformers maps such a function over single indices, which takes as long as half the layers of a small model.
    """
    batch, length = inputs_embeds.shape[:2]
    device = inputs_embeds.device
    ends = past_length + length
    rows = torch.arange(batch, device=device)[:, None, None, None]
    heads = torch.zeros_like(rows)
    queries = torch.arange(past_length, ends, device=device)[:, None]
    keys = torch.arange(ends - mask.shape[-1], ends, device=device)
    seen = is_seen(rows, heads, queries, keys)  # (b, 1, t, keys)
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def next_token_masks(
    config: TransXSSMConfig, tokens: Tensor, attention_mask: Tensor | None, cache: Cache | None
) -> dict[str, Tensor | None] | None:
    """The masks by layer type for decoding one token in each row with a static cache. None if the call is another one.

    They take two operations, where transformers' general function takes some twenty before each token.

    Args:
        tokens: (b, 1, …). Only the shape and the device are used.
        attention_mask: (b, cached + 1), 0 at pads. Defaults to no pads.
    """
    batch, length = tokens.shape[:2]
    if length != 1 or not isinstance(cache, StaticCache) or config._attn_implementation != "sdpa":
        return None
    if set(config.layer_types) != {SSD_LAYER_TYPE, "full_attention"}:
        return None
    index = config.layer_types.index("full_attention")
    places = cache.layers[index].max_cache_len
    if attention_mask is None:
        seen = (torch.arange(places, device=tokens.device) <= cache.get_seq_length(index)).expand(batch, places)
    elif attention_mask.dim() == 2:
        seen = F.pad(attention_mask.bool(), (0, places - attention_mask.shape[1]))
    else:
        return None
    return {SSD_LAYER_TYPE: None, "full_attention": seen[:, None, None]}


def _is_in_window(window: int | None, keys: WindowedKeys) -> MaskFunction:
    """The mask function of a window that counts tokens."""
    assert window is not None

    def is_in_window(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen = keys.key_numbers[batch_idx, kv_idx] > keys.numbers[batch_idx, q_idx] - window
        if keys.documents is not None:
            seen = seen & (keys.documents[batch_idx, q_idx] == keys.documents[batch_idx, kv_idx])
        return seen

    return is_in_window
