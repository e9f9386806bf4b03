"""The language-model head and its loss without the (tokens × vocabulary) logits.

Letters: n tokens, d hidden size, v vocabulary.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from transxssm.ops.csrc import kernels_of
from transxssm.ops.devices import has_fast_products, row_blocks
from transxssm.ops.dispatch import (
    ON_CPU,
    Backend,
    Op,
    cpp_shortfall,
    eager_cpp_refusal,
    eager_triton_refusal,
    triton_shortfall,
)

# On a CPU 16 MiB of float32 stay in the last-level cache; on a GPU 512 MiB of bfloat16 keep it busy. Each block adds once to the whole
# weight gradient.
_LOGITS_PER_BLOCK = {"cpu": 2**22, "cuda": 2**28}
_MIN_TOKENS_PER_BLOCK = 160
# If a smaller share of the tokens counts, as in a prompt with its answer, they are copied and the others are left out.
_FEW_SHARE = 0.9


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of softmax(hidden · weightᵀ) against labels, over blocks of tokens.

    The forward pass computes the gradients of both factors as well, block by block, so that the logits of only one block exist at a time.
    Logits, sums and the loss are float32 (float64 for float64 inputs); the
    products take autocast's dtype where autocast is on, upcast to float32 on a CPU that doesn't multiply it in hardware. Not
    twice differentiable.

    Backends for the losses of a block and their gradient, in order of preference:
        "triton": a kernel on a GPU, which reads each row of logits twice and writes the gradient over it.
        "cpp": the same for float32 and bfloat16 on a CPU.
        "torch": torch's operations.

    Args:
        hidden: (n, d). weight: (v, d). labels: (n,) int64 in [0, v), or `ignore_index`.
        ignore_index: the label of tokens that do not count.
        reduction: "mean" over the counting tokens (nan if there are none, as in torch), or "sum".
        backend: one of the names above. Defaults to the first that takes the call.

    Returns:
        The loss, a scalar, float32 or float64.

    Raises:
        ValueError: shapes or the reduction do not fit, or the requested backend does not take the call.
        IndexError: a label is neither in [0, v) nor `ignore_index`, on a CPU.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            "expected hidden (n, d), weight (v, d) and labels (n,): "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum": got {reduction!r}')
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    counts = labels != ignore_index
    if device_type == "cpu" and not torch.compiler.is_compiling() and counts.sum() < _FEW_SHARE * len(labels):
        hidden, labels = hidden[counts], labels[counts]  # on a GPU, reading their number would synchronize
    with torch.autocast(device_type=device_type, enabled=False):
        name = LINEAR_CROSS_ENTROPY.choose(backend, hidden, weight, labels).name
        total: Tensor = _LinearCrossEntropySum.apply(hidden, weight.to(hidden.dtype), labels, ignore_index, name)
        if reduction == "sum":
            return total
        return total / counts.sum()


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, backend: str) -> Tensor:
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        total = torch.zeros((), dtype=accumulate, device=hidden.device)
        most_logits = _LOGITS_PER_BLOCK.get(hidden.device.type, _LOGITS_PER_BLOCK["cuda"])
        block = max(_MIN_TOKENS_PER_BLOCK, most_logits // weight.shape[0])
        operand = _operand(hidden)
        factor = weight.to(operand)
        losses_of: Any = LINEAR_CROSS_ENTROPY.named(backend).forward
        if backend == "cpp":
            labels = labels.long().contiguous()
            _check_labels(labels, weight.shape[0], ignore_index)
        for rows in _blocks(hidden.shape[0], block):
            inputs = hidden[rows].to(operand)
            logits = inputs @ factor.T  # (block, v)
            loss, logits = losses_of(logits, labels[rows], ignore_index, accumulate, needs_hidden or needs_weight)
            total = (total + loss).to(accumulate)
            if grad_hidden is not None:
                grad_hidden[rows] = logits @ factor
            if needs_weight:
                product = logits.T @ inputs
                if rows.stop - rows.start == hidden.shape[0]:
                    grad_weight = product
                    continue
                if grad_weight is None:
                    grad_weight = torch.zeros_like(weight, dtype=accumulate)
                for part in _parts(product, accumulate):
                    grad_weight[part] += product[part]
        if needs_weight and grad_weight is None:  # of no tokens
            grad_weight = torch.zeros_like(weight)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad_total.to(grad_weight.dtype),
            None,
            None,
            None,
        )


def _operand(hidden: Tensor) -> torch.dtype:
    return hidden.dtype if has_fast_products(hidden.device.type, hidden.dtype) else torch.float32


def _kernel_refusal(hidden: Tensor, weight: Tensor, labels: Tensor) -> str | None:
    if hidden.device.type != "cpu":
        return ON_CPU
    return eager_cpp_refusal(hidden, weight, labels, dtype=_operand(hidden))


# Each of the following takes logits (n, v), labels (n,), the label to ignore, the dtype of sums, and whether gradients are wanted. It
# gives the sum of the losses and, where gradients are wanted, the gradient of that sum for the logits, whose memory it may use.


def _by_triton(
    logits: Tensor, labels: Tensor, ignore_index: int, accumulate: torch.dtype, differentiate: bool
) -> tuple[Tensor, Tensor]:
    from transxssm.ops.linear_cross_entropy_triton import cross_entropy_over_logits  # which imports Triton

    return cross_entropy_over_logits(logits, labels, ignore_index, differentiate=differentiate).sum(), logits


def _by_kernel(
    logits: Tensor, labels: Tensor, ignore_index: int, accumulate: torch.dtype, differentiate: bool
) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(len(logits), dtype=accumulate)
    given = (int(ignore_index), int(differentiate), logits, labels, losses)
    kernels_of(logits.dtype).on_rows("cross_entropy", logits, *given)
    return losses.sum(dtype=torch.float64), logits


def _by_torch(
    logits: Tensor, labels: Tensor, ignore_index: int, accumulate: torch.dtype, differentiate: bool
) -> tuple[Tensor, Tensor]:
    total = torch.zeros((), dtype=accumulate, device=logits.device)
    for part in _parts(logits, accumulate):
        log_probs = logits[part].to(accumulate).log_softmax(-1)
        ignored = labels[part] == ignore_index
        targets = labels[part].masked_fill(ignored, 0)[:, None]
        total = total - log_probs.gather(1, targets)[:, 0].masked_fill(ignored, 0.0).sum()
        if differentiate:
            grad = log_probs.exp_()  # softmax − one-hot
            grad.scatter_add_(1, targets, grad.new_full((1, 1), -1.0).expand_as(targets))
            grad.masked_fill_(ignored[:, None], 0.0)
            if logits.dtype == accumulate:
                logits = grad
            else:
                logits[part] = grad
    return total, logits


def _blocks(num_rows: int, most: int) -> list[slice]:
    """Slices of at most `most` rows. The compiler unrolls the loop over them, so that it gets a power of two of slices and few graphs."""
    if not torch.compiler.is_compiling():
        return [slice(start, min(start + most, num_rows)) for start in range(0, num_rows, most)]
    number = 1
    while number * most < num_rows:
        number *= 2
    return [slice(index * num_rows // number, (index + 1) * num_rows // number) for index in range(number)]


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raises IndexError for a label (n,) outside the vocabulary, as torch's own loss does."""
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if wrong.any():
        raise IndexError(
            f"Target {labels[wrong][0].item()} is out of bounds: expected 0 to {vocabulary - 1} or {ignore_index}"
        )


def _parts(rows: Tensor, accumulate: torch.dtype) -> list[slice]:
    """Blocks of rows that fit the cache of a CPU when they are upcast to `accumulate`. One block under the compiler."""
    if rows.dtype == accumulate or torch.compiler.is_compiling():
        return [slice(None)]
    return list(row_blocks(rows))


LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy",
    (
        Backend("triton", _by_triton, refusal=eager_triton_refusal, shortfall=triton_shortfall),
        Backend("cpp", _by_kernel, refusal=_kernel_refusal, shortfall=cpp_shortfall),
        Backend("torch", _by_torch),
    ),
)
