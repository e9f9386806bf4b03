"""Several sequences in one call: where each begins and ends among the tokens, and which slot of a cache holds its state.

Letters: b batch, s sequences, t tokens of all sequences.
"""

import itertools

import torch
from torch import Tensor

from transxssm.ops.dispatch import is_watched


def check_slots(state_indices: Tensor, num_states: int, num_slots: int) -> None:
    """Checks which slots of a cache hold the states of a call.

    On a CPU their values are looked at, too. Elsewhere that would wait for the device: two rows that name one slot leave one of their two
    states there, and a number out of range is the caller's to avoid.

    Args:
        state_indices: (num_states,) integers.
        num_states: how many states the call has, one for each row or sequence.
        num_slots: how many states the cache holds.

    Raises:
        ValueError: another shape or dtype; on a CPU, a slot that is not there or is named twice.
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


def bounds_of(cu_seqlens: Tensor, num_tokens: int) -> list[tuple[int, int]]:
    """Where each sequence begins and ends.

    Args:
        cu_seqlens: (s + 1,) integers on the CPU, increasing: 0, where the second sequence begins, …, the number of tokens.
        num_tokens: of all sequences.

    Raises:
        ValueError: anything else.
    """
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
    bounds = list(itertools.pairwise(places))
    if places[0] != 0 or places[-1] != num_tokens or any(start >= stop for start, stop in bounds):
        raise ValueError(
            f"cu_seqlens must increase from 0 to the number of tokens, {num_tokens}, by at least one token a sequence: got "
            f"{places if len(places) < 10 else f'{places[:8]} …, {places[-1]}'}"
        )
    return bounds
