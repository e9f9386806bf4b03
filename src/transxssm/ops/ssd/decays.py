"""The decays of a block of chunks: between its tokens, from the state that enters, to the state that leaves.

Letters: a chunks of all rows, q and k positions in a chunk, g groups, r heads of a group.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from transxssm.ops.devices import has_float64


class Decays(NamedTuple):
    """All are between 0 and 1, and 0 across document boundaries."""

    between: Tensor  # (a, g, r, q, k): from token k to token q ≥ k
    from_start: Tensor  # (a, g, r, q): from the state that enters to token q
    to_end: Tensor  # (a, g, r, q): from token q to the state that leaves
    across: Tensor  # (a, g, r): from the state that enters to the state that leaves


def decays_of(log_decay: Tensor, seq_idx: Tensor | None, before: Tensor | None, *, exact: bool) -> Decays:
    """The decays of chunks whose tokens multiply the state by exp(log_decay).

    Args:
        log_decay: (a, g, r, q) ≤ 0, float32 or float64.
        seq_idx: (a, q) the documents of the tokens. before: (a,) the document of the token before each chunk. None for one document.
        exact: small decays after large ones keep the digits that rounding the cumulative sum leaves out.
    """
    dtype = log_decay.dtype
    if has_float64(log_decay.device):
        sums = cumulative_sum(log_decay.double())  # (a, g, r, q)
        from_start = sums.to(dtype).exp()
        to_end = (sums[..., -1:] - sums).to(dtype).exp_()
        exponents = _differences(sums, dtype, exact=exact)
    else:
        from_start = cumulative_sum(log_decay).exp()
        exponents = sums_between(log_decay)
        to_end = exponents[..., -1, :].exp()
    across = from_start[..., -1]
    if seq_idx is not None and before is not None:
        last = seq_idx[:, -1]
        from_start = from_start * (seq_idx == before[:, None])[:, None, None]
        to_end = to_end * (seq_idx == last[:, None])[:, None, None]
        across = across * (before == last)[:, None, None]
    return Decays(_between(exponents, seq_idx), from_start, to_end, across)


def cumulative_sum(tensor: Tensor) -> Tensor:
    """Over the last axis. On CUDA a product, since torch's `cumsum` there is refused in deterministic mode and breaks the compiler."""
    if tensor.device.type == "cpu" or not has_float64(tensor.device):
        return tensor.cumsum(-1)
    length = tensor.shape[-1]
    sums = torch.ones(length, length, dtype=torch.float64, device=tensor.device).triu()  # float64: never TF32
    return (tensor.double() @ sums).to(tensor.dtype)


def _differences(sums: Tensor, dtype: torch.dtype, *, exact: bool) -> Tensor:
    """l_q − l_k: sums (a, g, r, q) in float64 → (a, g, r, q, k) in `dtype`."""
    rounded = sums.to(dtype)
    exponents = rounded[..., :, None] - rounded[..., None, :]  # those above 0, k > q, are not exponentiated
    if exact:
        remainder = (sums - rounded).to(dtype)
        exponents.add_(remainder[..., :, None]).sub_(remainder[..., None, :])
    return exponents


def sums_between(log_decay: Tensor) -> Tensor:
    """l_q − l_k for k ≤ q, −∞ elsewhere: (…, q) → (…, q, k). Each difference is summed by itself, so that nothing cancels and
    float64 is not needed ("segment sum", Mamba-2, Listing 1)."""
    length = log_decay.shape[-1]
    index = torch.arange(length, device=log_decay.device)
    terms = log_decay[..., :, None].expand(*log_decay.shape, length).masked_fill(index[:, None] <= index, 0.0)
    return terms.cumsum(-2).masked_fill(index[:, None] < index, -torch.inf)


def _between(exponents: Tensor, seq_idx: Tensor | None) -> Tensor:
    """exp(l_q − l_k) for k ≤ q of one document: (a, g, r, q, k), in the memory of its argument."""
    length, dtype = exponents.shape[-1], exponents.dtype
    visible = torch.ones(length, length, dtype=torch.bool, device=exponents.device).tril()
    if seq_idx is not None:
        visible = visible & (seq_idx[:, :, None] == seq_idx[:, None, :])[:, None, None]
    # Adding −∞ is ten times as fast on a CPU as masked_fill_ with a mask that broadcasts.
    exponents += torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)
    return exponents.exp_()
