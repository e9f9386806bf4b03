"""Positions and documents of the tokens in one forward call: defaults, padding, packing.

Letters: b batch, t time, n state size, d head_dim of attention.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from transxssm.models.context_parallel import ContextPart
from transxssm.ops import DocumentBounds

Rotary = tuple[Tensor, Tensor]


class FirstKeys(NamedTuple):
    """The per-query KV start, which attention layers get in place of a mask: each token sees the keys from its first one to itself."""

    numbers: Tensor | None  # (b, t) int32; None if the first key of every token is the first of the row


class Positions(NamedTuple):
    """The positions and documents of the tokens, as all layers need them. They are computed once per forward pass."""

    ssd_rotary: Rotary | None  # cos, sin (b or 1, t, n/2)
    attention_rotary: Rotary | None  # cos, sin (b or 1, t, d/2)
    length_scale: Tensor | None  # (b or 1, t) factor on C and Q
    padding_mask: Tensor | None  # (b, t), 0 at pads, or None if there are no pads
    seq_idx: Tensor | None  # (b, t) document of each token, or None if each row is one document
    context: ContextPart | None = None  # other parts of the rows, where processes share them
    # For selective rotations: frequencies of the pairs of a state and of a head, in radians, and the bounds of packed documents.
    ssd_frequencies: Tensor | None = None  # (up to n/2,)
    attention_frequencies: Tensor | None = None  # (d/2,)
    bounds: DocumentBounds | None = None


def default_positions(
    inputs_embeds: Tensor,
    past_length: int | Tensor,
    padding: Tensor | None,
    seq_idx: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    """(b or 1, t): the number of real tokens before each token in its document. Without pads and packed rows this is
    arange + past length. `start` is the place at which the cached document began."""
    length = inputs_embeds.shape[1]
    index = past_length + torch.arange(length, device=inputs_embeds.device)[None]  # a static cache's length is a tensor
    begins = (
        torch.zeros_like(index) if start is None else start[:, None]
    )  # (b or 1, t): where each token's document begins
    if seq_idx is not None:
        begins = torch.maximum(begins, document_begins(seq_idx, index))
    if padding is None or padding.shape[1] != past_length + length:
        return index - begins
    num_before = F.pad(padding.long().cumsum(-1), (1, 0))  # (b, cached + t + 1) real tokens before each column
    begins = begins.expand(padding.shape[0], length)
    return num_before[:, past_length:-1] - num_before.gather(1, begins)


def document_begins(seq_idx: Tensor, index: Tensor) -> Tensor:
    """(b, t): the place, among those in `index` (1, t), at which each token's document begins. It is 0 for the first document."""
    restarts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    return (index * restarts).cummax(dim=1).values


def document_bounds(seq_idx: Tensor, padding: Tensor | None) -> DocumentBounds:
    """Where each token's document begins and ends in its row. Pads before a row's first token belong to that token's document.

    Args:
        seq_idx: (b, t), non-decreasing.
        padding: (b, t), 0 at pads.
    """
    index = torch.arange(seq_idx.shape[1], device=seq_idx.device)[None]
    if padding is not None:
        first_token = padding.bool().int().argmax(dim=1, keepdim=True)  # (b, 1)
        seq_idx = torch.where(index < first_token, seq_idx.gather(1, first_token), seq_idx)
    ends = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (0, 1), value=True)
    last = torch.where(ends, index, seq_idx.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return DocumentBounds(document_begins(seq_idx, index), last)


def first_keys_in(
    window: int | None, seq_idx: Tensor | None, num_left_pads: Tensor | None, hidden_states: Tensor
) -> FirstKeys:
    """The first key that each token sees: in its document, after the pads on the left, and within the window. A pad sees itself."""
    batch, length = hidden_states.shape[:2]
    index = torch.arange(length, device=hidden_states.device)[None]
    bounds = []
    if seq_idx is not None:
        bounds.append(document_begins(seq_idx, index))
    if num_left_pads is not None:
        bounds.append(torch.minimum(index, num_left_pads[:, None]))
    if window is not None and window < length:
        bounds.append(index - window + 1)
    if not bounds:
        return FirstKeys(None)
    return FirstKeys(functools.reduce(torch.maximum, bounds).expand(batch, length).to(torch.int32))


def left_pads(padding: Tensor) -> Tensor | None:
    """(b,) the number of pads before each row's first token, or None if a row has pads between its tokens.

    Args:
        padding: (b, t), 0 at pads. A row of pads alone counts as a row of tokens.
    """
    if has_pads_between(padding).any():
        return None
    return padding.bool().int().argmax(-1)


def has_pads_between(padding: Tensor) -> Tensor:
    """(b,) whether a row has pads between its tokens."""
    real = padding.bool()
    starts = real & ~F.pad(real[:, :-1], (1, 0))
    return starts.sum(-1) > 1


class WindowedKeys(NamedTuple):
    """What a window that counts tokens, and not the pads between them, needs to know about each column of a row, (b, cached + t).

    Of cached tokens only the last ones of each row are present, side by side on the right, as `SlidingLayer` keeps them.
    """

    numbers: Tensor  # number of tokens up to each query, itself included
    key_numbers: Tensor
    is_token: Tensor  # whether the key is a token and not a pad
    documents: Tensor | None  # document of each key and query, or None if each row is one document


def windowed_keys(padding: Tensor, past_length: int, seq_idx: Tensor | None, start: Tensor | None) -> WindowedKeys:
    """The `WindowedKeys` of rows with pads anywhere.

    Args:
        padding: (b, cached + t), 0 at pads.
        seq_idx: (b, t) documents of this call's tokens.
        start: (b,) the column at which the cached document began.
    """
    real = padding.bool()
    num_before = F.pad(real.long().cumsum(-1), (1, 0))  # (b, cached + t + 1) tokens before each column
    numbers = num_before[:, 1:]
    to_the_last = torch.arange(1 - past_length, 1, device=padding.device)
    cached_numbers = num_before[:, past_length, None] + to_the_last  # (b, cached); below 1 where there is no token
    documents = None
    if seq_idx is not None or start is not None:
        local = torch.zeros_like(numbers[:, past_length:]) if seq_idx is None else seq_idx - seq_idx[:, :1]
        past = torch.zeros_like(cached_numbers)
        if start is not None:
            past = past.masked_fill(cached_numbers <= num_before.gather(1, start[:, None]), -1)
        documents = torch.cat((past, local), dim=1)
    return WindowedKeys(
        numbers=numbers,
        key_numbers=torch.cat((cached_numbers, numbers[:, past_length:]), dim=1),
        is_token=torch.cat((cached_numbers > 0, real[:, past_length:]), dim=1),
        documents=documents,
    )


def documents_from_positions(position_ids: Tensor, padding: Tensor | None) -> Tensor | None:
    """(b or 1, t) document numbers, or None if each row is one document.

    A document begins where a token's position does not follow the one before it. After pads, which positions may count or leave out,
    it begins where the position decreases. While tracing, values cannot be read, so that rows of one document get numbers, too.
    """
    length = position_ids.shape[-1]
    if length == 1:
        return None
    before, now = position_ids[:, :-1], position_ids[:, 1:]
    starts = now != before + 1  # (b or 1, t − 1)
    if padding is not None:
        real = padding[:, -length:].bool()
        index = torch.arange(length - 1, device=real.device)
        last_real = torch.where(real[:, :-1], index, -1).cummax(dim=-1).values  # (b, t − 1) before each token
        falls_back = now <= before.expand(len(real), -1).gather(1, last_real.clamp(min=0))
        starts = real[:, 1:] & (last_real >= 0) & torch.where(real[:, :-1], starts, falls_back)
    if not is_tracing(starts) and not starts.any():
        return None
    return F.pad(starts.long().cumsum(-1), (1, 0))


def local_padding(padding: Tensor | None, length: int) -> Tensor | None:
    """(b, t) mask of this call's tokens, or None where there are no pads among them.

    transformers' own helper drops the mask for single tokens, so that a prompt that is fed token by token would read pads as text.
    """
    if padding is None:
        return None
    local = padding[:, -length:]
    if not is_tracing(local) and bool(local.all()):
        return None
    return local


def length_scale(position_ids: Tensor, base: int | None, dtype: torch.dtype) -> Tensor | None:
    """max(1, log_base n) with n = position + 1 (Appendix A, end), (b or 1, t)."""
    if base is None:
        return None
    return (torch.log(position_ids.to(dtype) + 1) / math.log(base)).clamp(min=1)


def key_documents(seq_idx: Tensor | None, inputs_embeds: Tensor, past_length: int, start: Tensor | None) -> Tensor:
    """(b, cached + t) document of every key. This call's first token continues the cached document; earlier ones are −1."""
    batch, length = inputs_embeds.shape[:2]
    if seq_idx is None:
        seq_idx = torch.zeros(batch, length, dtype=torch.long, device=inputs_embeds.device)
    local = seq_idx - seq_idx[:, :1]
    index = torch.arange(past_length, device=local.device)
    past = torch.zeros(batch, past_length, dtype=local.dtype, device=local.device)
    if start is not None:
        past = past.masked_fill(index < start[:, None], -1)
    return torch.cat((past, local), dim=1)


def last_document_start(seq_idx: Tensor, past_length: int, previous: Tensor | None) -> Tensor:
    """(b,) index, among all tokens so far, of the first token of each row's last document."""
    in_last = seq_idx == seq_idx[:, -1:]
    first = in_last.long().argmax(dim=1)
    continued = torch.zeros_like(first) if previous is None else previous
    return torch.where(in_last[:, 0], continued, first + past_length)
