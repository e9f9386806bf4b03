"""The ways to run one scan that the laws hold to each other: in chunks, in pieces, token by token at the end, behind pads.

Letters: b batch, t time, h heads, p head_dim, n state size.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.ssd.cases import Case, Law, make_case
from transxssm.ops.ssd import ssd_chunk_scan, ssd_step


def chunks_of(size: int | None) -> Law:
    """The chunked scan; None: the device's default chunk."""
    return lambda case: case.scan(ssd_chunk_scan, chunk_size=size)


def in_pieces(case: Case, lengths: Sequence[int], scan: Law, *, carry_state: bool = True) -> tuple[Tensor, Tensor]:
    """One scan after the other over pieces of these lengths; without carrying, the state of each but the first is zero."""
    outputs, state = [], case.initial_state
    for start, stop in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        y, state = scan(replace(case.tokens(start, stop), initial_state=state))
        outputs.append(y)
        state_after = state
        state = state if carry_state else None
    return torch.cat(outputs, dim=1), state_after


def separately(documents: Sequence[int], scan: Law) -> Law:
    """Each document of a packed row in a scan of its own; the initial state is the first one's alone."""
    return lambda case: in_pieces(replace(case, seq_idx=None), documents, scan, carry_state=False)


def sequences_in_a_row(lengths: Sequence[int], **options) -> tuple[Case, Tensor]:
    """A case of one row that holds sequences of these lengths, with an initial state for each, and where they begin and end."""
    case = make_case(batch=1, length=sum(lengths), **options)
    states = make_case(batch=len(lengths), length=1, seed=1, **options).initial_state
    return replace(case, initial_state=states), torch.tensor([0, *itertools.accumulate(lengths)])


def one_call_each(lengths: Sequence[int], scan: Law) -> Law:
    """Each of the sequences in a row in a scan of its own."""

    def law(case: Case) -> tuple[Tensor, Tensor]:
        bounds = itertools.pairwise(itertools.accumulate(lengths, initial=0))
        results = [
            scan(replace(case.tokens(start, stop), initial_state=state[None]))
            for (start, stop), state in zip(bounds, case.initial_state, strict=True)
        ]
        outputs, states = zip(*results, strict=True)
        return torch.cat(outputs, dim=1), torch.cat(states)

    return law


def by_steps(case: Case, prompt: int, scan: Law) -> tuple[Tensor, Tensor]:
    """`scan` over the first `prompt` tokens, then `ssd_step` for each of the others."""
    y, state = scan(case.tokens(0, prompt))
    outputs = [y]
    for t in range(prompt, case.x.shape[1]):
        token = case.tokens(t, t + 1)
        rotary = None if token.rotary is None else tuple(table[:, 0] for table in token.rotary)
        arguments = (token.x[:, 0], token.dt[:, 0], token.A, token.B[:, 0], token.C[:, 0])
        y, state = ssd_step(state, *arguments, rotary=rotary, D=token.D)
        outputs.append(y[:, None])
    return torch.cat(outputs, dim=1), state


def between_pads(case: Case, left: int, right: int, scan: Law) -> tuple[Tensor, Tensor]:
    """y of the tokens alone, and the final state. Pads have dt = 0 and x = 0; what B, C and the positions hold there is anything."""

    def pad(tensor: Tensor, value: float) -> Tensor:
        return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (left, right), value=value)

    rotary = None if case.rotary is None else tuple(pad(table, 0.5) for table in case.rotary)
    with_pads = replace(case, x=pad(case.x, 0), dt=pad(case.dt, 0), B=pad(case.B, 7), C=pad(case.C, -7), rotary=rotary)
    y, state = scan(with_pads)
    return y[:, left : left + case.x.shape[1]], state
