"""The short causal convolution of Mamba-2's positional scheme (paper, Table 2, column "Conv1d + D").

Letters: b batch, t time, e channels, k kernel size.
"""

import torch
from torch import Tensor


def short_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution y_t = Σ_j w_j x_{t−(k−1)+j}, which neither pads nor other documents enter.

    Args:
        x: (b, t, e) inputs.
        weight: (e, k); w_{k−1} multiplies the token itself.
        initial_state: (b, k−1, e), the inputs before the first token, of the first token's document; None: zeros.
        seq_idx: (b, t) integers, non-decreasing: documents of a packed row.
        mask: (b, t), 0 or False at pads (left or right of the row's tokens); None: no pads.

    Returns:
        y: (b, t, e) in x's dtype; state: (b, k−1, e), the last k−1 inputs that are no pads, of the last token's document.

    Raises:
        ValueError: shapes do not fit.
    """
    if x.dim() != 3 or weight.dim() != 2 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"expected x (b, t, e) and weight (e, k): got {tuple(x.shape)} and {tuple(weight.shape)}")
    batch, length, channels = x.shape
    memory = weight.shape[1] - 1
    if initial_state is None:
        initial_state = x.new_zeros(batch, memory, channels)
    elif initial_state.shape != (batch, memory, channels):
        raise ValueError(f"initial_state must have shape {(batch, memory, channels)}: got {tuple(initial_state.shape)}")
    if mask is not None:
        x = x * mask[..., None].to(x.dtype)
    history = torch.cat((initial_state.to(x.dtype), x), dim=1)  # (b, k−1+t, e)
    if mask is not None:  # the inputs before the first token stand right before it, behind the pads on its left
        num_left_pads = mask.to(torch.uint8).argmax(dim=1, keepdim=True)  # (b, 1)
        rows = num_left_pads + torch.arange(memory, device=x.device)  # (b, k−1)
        history = torch.cat((torch.zeros_like(initial_state, dtype=x.dtype), x), dim=1)
        history = history.scatter(1, rows[..., None].expand(-1, -1, channels), initial_state.to(x.dtype))
    weight = weight.to(x.dtype)

    documents = None
    if seq_idx is not None:
        documents = torch.cat((seq_idx[:, :1].expand(-1, memory), seq_idx), dim=1)  # (b, k−1+t)
    y = x * weight[:, memory]
    for j in range(memory):
        term = history[:, j : j + length]
        if documents is not None and seq_idx is not None:
            term = term * (documents[:, j : j + length] == seq_idx)[..., None].to(x.dtype)
        y = y + term * weight[:, j]
    return y, _last_inputs(history, documents, mask, memory)


def _last_inputs(history: Tensor, documents: Tensor | None, mask: Tensor | None, memory: int) -> Tensor:
    """The k−1 inputs up to each row's last token that is no pad."""
    batch, total, _ = history.shape
    steps = torch.arange(memory, device=history.device)
    if mask is None:
        rows = (total - memory + steps).expand(batch, -1)  # (b, k−1)
    else:
        positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        num_seen = (positions * mask.bool()).amax(dim=1, keepdim=True)  # (b, 1): up to and with the last token
        rows = num_seen + steps
    state = history.gather(1, rows[..., None].expand(-1, -1, history.shape[-1]))
    if documents is not None:
        last_document = documents.gather(1, rows[:, -1:]) if memory else documents[:, -1:]
        state = state * (documents.gather(1, rows) == last_document)[..., None].to(state.dtype)
    return state
