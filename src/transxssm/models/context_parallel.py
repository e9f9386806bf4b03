"""Context parallelism: each process of a group computes its part of every row, and layers exchange what crosses the boundaries.

All processes get the whole rows; process i of r takes the i-th of r equal parts, in order. An SSD layer scans its part from zero and
gathers the final states and sums of time steps of all parts; its convolution gets the last inputs of the part before. Attention gathers
keys and values; without a mask its queries move, so that every process has the same number of scores to form.

Letters: b batch, t time, r parts, h heads, k key-value heads, d head_dim, p head_dim of SSD, n state size.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _functional_collectives

from transxssm.models.linear import HALF_PRECISION
from transxssm.ops.ssd.parts import state_before_part

# The compiler traces these functions, and they have gradients. torch 2.13 warns of the former's old name.
_collectives: Any = _functional_collectives
_all_gather = getattr(_collectives, "all_gather_single_autograd", None) or _collectives.all_gather_tensor_autograd
_all_to_all = _collectives.all_to_all_single_autograd


class _DenseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def with_dense_gradient(tensor: Tensor) -> Tensor:
    """Returns the tensor, with a contiguous gradient. NCCL sends no other, and the gradient of a sum is an expanded scalar."""
    dense: Tensor = _DenseGradient.apply(tensor)
    return dense


class SequencePart(NamedTuple):
    """The part of each row that this process has."""

    group: str  # name of the process group, since a compiled graph cannot hold the group itself
    rank: int
    size: int

    def of(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor (b or 1, t, …)."""
        length = whole.shape[1] // self.size
        return whole[:, self.rank * length : (self.rank + 1) * length]

    def gathered(self, tensor: Tensor) -> Tensor:
        """(r, …) the tensors of all processes. The gradient of this process's tensor is the sum over all processes."""
        return with_dense_gradient(_all_gather(tensor[None].contiguous(), 0, self.group))

    def sum(self, scalar: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.gathered(scalar).sum(0)


class ContextPart(NamedTuple):
    """A part of packed rows, and the earlier parts whose last document continues in it."""

    part: SequencePart
    joins: Tensor  # (b or 1, r), whether an earlier part ends in the document in which this one begins
    continues: Tensor | None  # (b, t of all) whether a token is of that document, or None if each row is one document


def part_of_group(group: dist.ProcessGroup) -> SequencePart:
    """This process's part, if each process of the group has one."""
    return SequencePart(group.group_name, dist.get_rank(group), dist.get_world_size(group))


def refusal_of_parts(
    part: SequencePart, length: int, smallest: int, has_pads: bool, has_cache: bool, implementation: str | None
) -> str | None:
    """Why rows cannot be computed in parts, or None if they can.

    Args:
        length: tokens in a row.
        smallest: fewest tokens in a part.
        implementation: name of the attention implementation, or None if the model has no attention.
    """
    if has_cache:
        return (
            "context parallelism is for training and scoring: got past_key_values, expected none; generate without it"
        )
    if length % part.size or length // part.size < smallest:
        return (
            f"context parallelism cuts rows into {part.size} equal parts of {smallest} tokens or more: got {length} tokens; expected a "
            f"multiple of {part.size}, {part.size * smallest} or more"
        )
    if has_pads:
        return (
            "context parallelism takes rows without pads: got an attention_mask; pack documents (seq_idx), or pad on the right with labels "
            "of -100 and leave the mask out"
        )
    if implementation not in (None, "sdpa"):
        return f"context parallelism attends through torch's SDPA: got attn_implementation={implementation!r}, expected 'sdpa'"
    return None


def context_part(part: SequencePart, seq_idx: Tensor | None, device: torch.device) -> ContextPart:
    """The information on other parts that layers need.

    Args:
        seq_idx: (b, t) documents of the whole rows.
    """
    is_earlier = torch.arange(part.size, device=device)[None] < part.rank
    if seq_idx is None:
        return ContextPart(part, is_earlier, None)
    length = seq_idx.shape[1] // part.size
    first = seq_idx[:, part.rank * length, None]
    last = seq_idx[:, length - 1 :: length]  # (b, r)
    return ContextPart(part, is_earlier & (last == first), seq_idx == first)


def state_before(context: ContextPart, final_state: Tensor, dt: Tensor, A: Tensor) -> Tensor:
    """(b, h, p, n): the state before this part, by one all-gather of the parts' final states and sums of time steps.

    Args:
        final_state: (b, h, p, n), the final state of this part scanned from zero.
        dt: (b, t, h), the time steps of this part.
        A: (h,).
    """
    heads = final_state.shape[1]
    sent = torch.cat((final_state.flatten(1), dt.sum(1).to(final_state.dtype)), dim=1)  # (b, h p n + h)
    gathered = context.part.gathered(sent).transpose(0, 1)  # (b, r, h p n + h)
    states = gathered[..., :-heads].unflatten(-1, final_state.shape[1:])
    return state_before_part(states, gathered[..., -heads:], A, context.joins, context.part.rank)


def inputs_before(context: ContextPart, inputs: Tensor, number: int) -> Tensor:
    """(b, number, e): the inputs right before this part. They are zero before a row and for another document's tokens.

    Args:
        inputs: (b, t, e), the inputs of this part.
    """
    part, length = context.part, inputs.shape[1]
    last = part.gathered(inputs[:, length - number :])  # (r, b, number, e)
    before, start = last[max(part.rank - 1, 0)], part.rank * length
    if part.rank == 0:  # zeros that depend on the gathered tensor, so that all processes take part in its backward pass
        return before.masked_fill(torch.ones_like(before, dtype=torch.bool), 0.0)
    if context.continues is None:
        return before
    return before.masked_fill(~context.continues[:, start - number : start, None], 0.0)


def mask_of_part(
    context: ContextPart, length: int, seq_idx: Tensor | None, window: int | None, device: torch.device
) -> Tensor | None:
    """(b or 1, 1, t of this part, t of all): the keys that each query sees. None if each query sees all keys up to its own.

    Args:
        length: tokens in a whole row.
        seq_idx: (b, t) documents of the whole rows.
        window: number of last tokens that each query sees, or None for all of them.
    """
    if seq_idx is None and (window is None or window >= length):
        return None
    keys = torch.arange(length, device=device)
    queries = context.part.of(keys[None])[0][:, None]
    seen = (keys <= queries)[None]
    if window is not None:
        seen = seen & (keys > queries - window)
    if seq_idx is not None:
        seen = seen & (context.part.of(seq_idx)[..., None] == seq_idx[:, None])
    return seen[:, None]


def attention_in_parts(
    context: ContextPart, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float, dropout: float
) -> Tensor:
    """(b, h, t, d): causal attention of this part's queries to the keys of all parts.

    Args:
        q: (b, h, t, d). k, v: (b, k, t, d). All are of this part.
        mask: the mask from `mask_of_part`.
    """
    part = context.part
    gathered = part.gathered(torch.stack((k, v)))  # (r, 2, b, k, t, d)
    k, v = gathered.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)  # (b, k, t of all, d) each
    is_grouped = q.shape[1] != k.shape[1]
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": is_grouped}
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, mask, **options)
    if q.shape[2] % 2:  # cannot be halved
        return _last_queries(q, k, v, part.rank + 1, part.size, options)
    pieces = _moved(part, torch.stack(q.chunk(2, dim=2)), back=False)  # (2, b, h, t/2, d)
    number_of_pieces = 2 * part.size
    ends = (part.rank + 1, number_of_pieces - part.rank)
    outputs = [
        _last_queries(piece, k, v, end, number_of_pieces, options) for piece, end in zip(pieces, ends, strict=True)
    ]
    first, second = _moved(part, torch.stack(outputs), back=True)
    return torch.cat((first, second), dim=2)


def _last_queries(q: Tensor, k: Tensor, v: Tensor, end: int, of: int, options: dict[str, Any]) -> Tensor:
    """Attention of queries that are the last ones before `end`, of `of` equal pieces of the keys."""
    seen = k.shape[2] // of * end
    k, v = k[:, :, :seen], v[:, :, :seen]
    if q.shape[2] == seen:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    if q.device.type == "cuda" and q.dtype in HALF_PRECISION:
        # SDPA aligns causal queries with the first keys. This function, which torch's `causal_lower_right` calls, aligns them with the
        # last ones. The compiler does not trace `causal_lower_right` itself.
        if q.shape[1] != k.shape[1]:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, options["dropout_p"], True, scale=options["scale"]
        )[0]
        return output
    places = torch.arange(seen, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, places <= places[seen - q.shape[2] :, None], **options)


def _moved(part: SequencePart, pieces: Tensor, *, back: bool) -> Tensor:
    """Sends halves of parts to the processes that compute them, or back.

    Process i owns pieces 2i and 2i + 1 of 2r, and computes pieces i and 2r − 1 − i. A piece has scores with all keys before it, so
    that every process computes the same number of scores.
    """
    last = 2 * part.size - 1
    own = (2 * part.rank, 2 * part.rank + 1)
    computed = (part.rank, last - part.rank)
    to = [min(piece, last - piece) for piece in own]  # the process that computes it
    of = [piece // 2 for piece in computed]  # the process that owns it
    have, destinations, sources = (computed, of, to) if back else (own, to, of)
    order = sorted(range(2), key=lambda index: (destinations[index], have[index]))
    sent = pieces if order == [0, 1] else pieces.flip(0)
    sent_sizes, received_sizes = (
        [places.count(process) for process in range(part.size)] for places in (destinations, sources)
    )
    received = with_dense_gradient(_all_to_all(sent.contiguous(), received_sizes, sent_sizes, part.group))
    # Pieces arrive ordered by process, and those of one process by their numbers.
    arrival = sorted(range(2), key=lambda index: (sources[index], (own if back else computed)[index]))
    return received if arrival == [0, 1] else received.flip(0)
