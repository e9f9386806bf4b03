"""The "triton" backend of `linear_cross_entropy`: each row of logits is read twice, and its gradient is written over it.

Letters: n tokens, v vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transxssm.ops.devices import launched_on

_BLOCK = 4096  # logits of a row that a program loads at once


def cross_entropy_over_logits(logits: Tensor, labels: Tensor, ignore_index: int, *, differentiate: bool) -> Tensor:
    """The loss of each token, (n,) float32; 0 for ignored ones, NaN for a label outside the vocabulary.

    Args:
        logits: (n, v), contiguous; where `differentiate`, replaced by the gradient of the sum of the losses.
        labels: (n,) int64.
    """
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        with launched_on(logits.device):
            _cross_entropy[(logits.shape[0],)](
                *(logits, labels.contiguous(), losses, logits.shape[1], ignore_index),
                differentiate=differentiate,
                block=_BLOCK,
                num_warps=8,
            )
    return losses


@triton.jit
def _cross_entropy(logits, labels, losses, vocabulary, ignored, differentiate: tl.constexpr, block: tl.constexpr):
    """Each lane keeps its own maximum and sum until the row has been read, so that lanes do not wait for one another."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    counts = label != ignored
    logits += row * vocabulary
    v = tl.arange(0, block)
    most = tl.full((block,), -1e38, tl.float32)
    total = tl.zeros((block,), tl.float32)
    for first in range(0, vocabulary, block):
        logit = tl.load(logits + first + v, mask=first + v < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(most, logit)
        total = total * tl.exp(most - higher) + tl.exp(logit - higher)
        most = higher
    highest = tl.max(most, 0)
    log_total = highest + tl.log(tl.sum(total * tl.exp(most - highest), 0))
    is_known = (label >= 0) & (label < vocabulary)
    wanted = tl.load(logits + label, mask=is_known, other=float("nan")).to(tl.float32)
    tl.store(losses + row, tl.where(counts, log_total - wanted, 0.0))
    if differentiate:
        tl.debug_barrier()  # the label's logit has been read
        for first in range(0, vocabulary, block):
            inside = first + v < vocabulary
            logit = tl.load(logits + first + v, mask=inside, other=0.0).to(tl.float32)
            grad = tl.exp(logit - log_total) - tl.where(first + v == label, 1.0, 0.0)
            grad = tl.where(counts, grad, 0.0)
            tl.store(logits + first + v, grad.to(logits.dtype.element_ty), mask=inside)
