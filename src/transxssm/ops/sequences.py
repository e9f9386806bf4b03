"""Several sequences in one call: the bounds of each among the tokens, and the slot of a cache that holds its state.

Letters: b batch, s sequences, t tokens of all sequences.
"""

import itertools

import torch
from torch import Tensor

from transxssm.ops.dispatch import is_watched


def check_slots(state_indices: Tensor, num_states: int, num_slots: int) -> None:
    """Checks the slots of a cache that hold the states of a call.

    On a CPU the values are checked, too. On other devices that would synchronise: if two rows name one slot, one of their states is left
    there, and the caller must avoid numbers out of range.

    Args:
        state_indices: (num_states,) integers.
        num_states: number of states in the call, one for each row or sequence.
        num_slots: number of states that the cache holds.

    Raises:
        ValueError: the shape or dtype differs, or, on a CPU, a slot does not exist or is named twice.
    """
    if state_indices.shape != (num_states,) or state_indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"state_indices must be ({num_states},) int32 or int64, a slot for each state: got {tuple(state_indices.shape)} "
            f"{state_indices.dtype}"
        )
    if torch.compiler.is_compiling() or state_indices.device.type != "cpu" or is_watched():
        return
    slots = state_indices.tolist()
    outside = [slot for slot in slots if not 0 <= slot < num_slots]
    if outside:
        raise ValueError(f"state_indices must name slots 0 … {num_slots - 1}: got {outside[0]}")
    if len(set(slots)) < len(slots):
        twice = next(slot for slot in slots if slots.count(slot) > 1)
        raise ValueError(
            f"state_indices must name a slot for each state, and none twice: got slot {twice} more than once"
        )


def has_dense_slots(cache: Tensor) -> bool:
    """Whether each slot's state is contiguous; the slots may lie apart."""
    expected = 1
    for size, stride in zip(reversed(cache.shape[1:]), reversed(cache.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def read_slots(cache: Tensor, state_indices: Tensor, has_initial_state: Tensor | None) -> Tensor:
    """A copy of the states with which sequences begin, (s, …): those of their slots, or zeros if a sequence has no initial state.

    Args:
        cache: (slots, …).
        state_indices: (s,), checked.
        has_initial_state: (s,) bool, or None if all sequences have one.

    Raises:
        ValueError: `has_initial_state` has another shape or dtype.
    """
    states = cache.index_select(0, state_indices)
    if has_initial_state is None:
        return states
    if has_initial_state.shape != state_indices.shape or has_initial_state.dtype != torch.bool:
        raise ValueError(
            f"has_initial_state must be {tuple(state_indices.shape)} bool, as state_indices are: got "
            f"{tuple(has_initial_state.shape)} {has_initial_state.dtype}"
        )
    begins = ~has_initial_state.to(cache.device)
    return states.masked_fill_(begins.view(-1, *(1,) * (cache.dim() - 1)), 0.0)


def checked_cu_seqlens(cu_seqlens: Tensor, batch: int, num_tokens: int) -> Tensor:
    """The checked bounds of sequences, (s + 1,) int64.

    Args:
        cu_seqlens: (s + 1,) integers on the CPU, increasing: 0, where the second sequence begins, …, the number of tokens.
        batch: number of rows in the call.
        num_tokens: tokens in a row.

    Raises:
        ValueError: the bounds are something else, or there are several rows.
    """
    if batch != 1:
        raise ValueError(f"cu_seqlens is for sequences side by side in one row: got {batch} rows")
    if (
        cu_seqlens.dim() != 1
        or len(cu_seqlens) < 2
        or cu_seqlens.is_floating_point()
        or cu_seqlens.device.type != "cpu"
    ):
        raise ValueError(
            "cu_seqlens must be (s + 1,) integers on the CPU, which lays the work out by them: got "
            f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype} on {cu_seqlens.device}"
        )
    places = cu_seqlens.tolist()
    if places[0] != 0 or places[-1] != num_tokens or any(start >= stop for start, stop in itertools.pairwise(places)):
        raise ValueError(
            f"cu_seqlens must increase from 0 to the number of tokens, {num_tokens}, by at least one token a sequence: got "
            f"{places if len(places) < 10 else f'{places[:8]} …, {places[-1]}'}"
        )
    return cu_seqlens.long().contiguous()
