"""The chunked SSD scan in torch's own operations, without a loop: one exported graph serves any length, and runs without this package.

Letters: b batch, t time, m chunks, q and k positions in a chunk, g groups, r heads of a group, p head_dim, n state size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from transxssm.ops.rotary import apply_rotary
from transxssm.ops.ssd.decays import sums_between


def ssd_portable(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Mamba-2, Listing 1, over chunks of `chunk_size` tokens, of which the last ones hold pads.

    Arguments, results and errors: `transxssm.ops.ssd.ssd_chunk_scan`. Computes in float32 or float64; differentiable.
    """
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    x_acc, dt, A, B, C = (tensor.to(accumulate) for tensor in (x, dt, A, B, C))
    if rotary is not None:
        B, C = apply_rotary(B, *rotary), apply_rotary(C, *rotary)
    # At least two chunks, since a traced size that is 1 for some lengths would need a graph of its own. Rounded up by one division,
    # so that the tracer sees that the padded length is a multiple of the number of chunks.
    num_chunks = (length + 2 * chunk_size - 1) // chunk_size
    num_pads = num_chunks * chunk_size - length

    def in_chunks(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, num_pads)).unflatten(1, (-1, chunk_size))

    dt = in_chunks(dt).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)  # (b, m, g, r, q)
    dt_x = in_chunks(x_acc).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5) * dt[..., None]  # (b, m, g, r, q, p)
    B, C = in_chunks(B).transpose(2, 3), in_chunks(C).transpose(2, 3)  # (b, m, g, q, n)
    log_decay = dt * A.view(groups, -1, 1)  # (b, m, g, r, q)
    between = sums_between(log_decay)  # (b, m, g, r, q, k)
    from_start, to_end = log_decay.cumsum(-1), between[..., -1, :]
    across = log_decay.sum(-1)  # (b, m, g, r)
    if seq_idx is not None:
        places = torch.arange(num_chunks * chunk_size, device=x.device).clamp(
            max=length - 1
        )  # pads are of the last document
        documents = seq_idx.index_select(1, places).unflatten(1, (-1, chunk_size))  # (b, m, q)
        before = torch.cat((documents[:, :1, :1], documents[:, :-1, -1:]), dim=1)  # (b, m, 1)
        is_other = documents[:, :, :, None] != documents[:, :, None]
        between = between.masked_fill(is_other[:, :, None, None], -torch.inf)
        from_start = from_start.masked_fill((documents != before)[:, :, None, None], -torch.inf)
        to_end = to_end.masked_fill((documents != documents[..., -1:])[:, :, None, None], -torch.inf)
        across = across.masked_fill((before != documents[..., -1:])[..., None], -torch.inf)

    weights = (C @ B.mT)[:, :, :, None] * between.exp()  # (b, m, g, r, q, k)
    updates = (dt_x * to_end.exp()[..., None]).mT @ B[:, :, :, None]  # (b, m, g, r, p, n)
    start = x_acc.new_zeros(batch, 1, groups, heads // groups, head_dim, state_size)
    if initial_state is not None:
        start = initial_state.to(accumulate).reshape(start.shape)
    # The state behind each chunk sums what entered and all updates so far, each with the decay of the chunks since.
    decays = sums_between(F.pad(across.permute(0, 2, 3, 1), (1, 0))).exp()  # (b, g, r, m + 1, m + 1)
    terms = torch.cat((start, updates), dim=1).permute(0, 2, 3, 1, 4, 5)  # (b, g, r, m + 1, p, n)
    states = (decays @ terms.flatten(-2)).unflatten(-1, (head_dim, state_size))
    entering = states[..., :-1, :, :].permute(0, 3, 1, 2, 5, 4)  # (b, m, g, r, n, p)
    y = weights @ dt_x + (C[:, :, :, None] @ entering) * from_start.exp()[..., None]  # (b, m, g, r, q, p)
    tokens = torch.arange(
        length, device=x.device
    )  # indexed, since the tracer would compare a slice's strides with the length
    y = y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)[:, tokens // chunk_size, tokens % chunk_size]  # (b, t, h, p)
    if D is not None:
        y = y + D.to(accumulate)[:, None] * x_acc
    return y.to(x.dtype), states[..., -1, :, :].reshape(batch, heads, head_dim, state_size)
