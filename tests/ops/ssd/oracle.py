"""The state-space layer once more, straight from the paper's sums and independent of the package.

Positions are phases of complex numbers: a score comes from the *difference* of two phases (Eq. 1 and 4), without rotating
either side. The mask L is built row by row, L_tj = a_t L_(t−1)j (Appendix A), without exponentiating a cumulative sum.

Letters: b batch, t and j time, h heads, g groups, p head_dim, n state size, f = n/2 frequencies.
"""

import torch
from torch import Tensor

from tests.ops.ssd.cases import Case


def ssd_oracle(case: Case) -> tuple[Tensor, Tensor]:
    """y_t = Σ_j L_tj <R_t C_t, R_j B_j> dt_j x_j + D x_t, plus what is left of the initial state; all in x's float64."""
    assert case.x.dtype == torch.float64
    heads, groups = case.x.shape[2], case.B.shape[2]
    group_of_head = [head // (heads // groups) for head in range(heads)]
    B, C = case.B[:, :, group_of_head], case.C[:, :, group_of_head]  # (b, t, h, n)
    L, left_of_initial = _one_semiseparable(case)

    if case.rotary is None:
        scores = torch.einsum("bthn,bjhn->bhtj", C, B)
    else:
        phase = torch.complex(*case.rotary).expand(case.x.shape[0], -1, -1)  # e^{imθ}: (b, t, f)
        difference = phase[:, :, None] * phase[:, None, :].conj()  # e^{i(m−n)θ}: (b, t, j, f)
        scores = torch.einsum("bthf,bjhf,btjf->bhtj", _as_complex(C), _as_complex(B).conj(), difference).real
        B, C = (_as_real(_as_complex(u) * phase[:, :, None]) for u in (B, C))  # for the states alone
    y = torch.einsum("bhtj,bhtj,bjh,bjhp->bthp", L, scores, case.dt, case.x)
    state = torch.einsum("bhj,bjh,bjhp,bjhn->bhpn", L[:, :, -1], case.dt, case.x, B)
    if case.D is not None:
        y = y + case.D[:, None] * case.x
    if case.initial_state is not None:
        y = y + torch.einsum("bht,bhpn,bthn->bthp", left_of_initial, case.initial_state, C)
        state = state + left_of_initial[:, :, -1, None, None] * case.initial_state
    return y, state


def _one_semiseparable(case: Case) -> tuple[Tensor, Tensor]:
    """L (b, h, t, j), and Π a_1 … a_t (b, h, t); a document's first token has a = 0, except the row's first."""
    batch, length, heads = case.dt.shape
    eye = torch.eye(length, dtype=torch.float64, device=case.dt.device)
    row, left = eye.new_zeros(batch, heads, length), eye.new_ones(batch, heads)
    rows, lefts = [], []
    for t in range(length):
        a = torch.exp(case.dt[:, t] * case.A)  # (b, h)
        if case.seq_idx is not None and t > 0:
            a = a * (case.seq_idx[:, t] == case.seq_idx[:, t - 1])[:, None]
        row, left = a[..., None] * row + eye[t], a * left
        rows.append(row)
        lefts.append(left)
    return torch.stack(rows, dim=2), torch.stack(lefts, dim=2)


def _as_complex(u: Tensor) -> Tensor:
    """Coordinates i and i + n/2 as the real and imaginary part of one number (the half-split layout)."""
    return torch.complex(*u.chunk(2, dim=-1))


def _as_real(z: Tensor) -> Tensor:
    return torch.cat((z.real, z.imag), dim=-1)
