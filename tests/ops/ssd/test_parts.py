"""Parts scanned from zero, with the state before each added, are the whole scan; gradients included."""

from dataclasses import replace

import pytest
import torch

from tests.ops.ssd.cases import Case, assert_equal_laws, make_case
from transxssm.ops import ssd_chunk_scan
from transxssm.ops.ssd.parts import add_state_before, state_before_part


def in_parts(case: Case, num_parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the final state of equal parts, each of which knows of the others their final states and sums of dt."""
    length = case.x.shape[1] // num_parts
    parts = [case.tokens(length * i, length * (i + 1)) for i in range(num_parts)]
    scanned = [part.scan(ssd_chunk_scan) for part in parts]
    finals = torch.stack([final for _, final in scanned], dim=1)
    sums = torch.stack([part.dt.sum(1) for part in parts], dim=1)
    outputs, states = [], []
    for number, (part, (y, _)) in enumerate(zip(parts, scanned, strict=True)):
        joins = torch.arange(num_parts)[None] < number
        if part.seq_idx is not None:
            joins = joins & (case.seq_idx[:, length - 1 :: length] == part.seq_idx[:, :1])
        before = state_before_part(finals, sums, case.A, joins, number)
        outputs.append(add_state_before(y, before, part.dt, case.A, part.C, rotary=part.rotary, seq_idx=part.seq_idx))
        states.append(before)
    last = parts[-1]
    decay = torch.exp(case.A * last.dt.sum(1))
    if last.seq_idx is not None:
        decay = decay * (last.seq_idx[:, -1:] == last.seq_idx[:, :1])
    return torch.cat(outputs, dim=1), decay[..., None, None] * states[-1] + finals[:, -1]


@pytest.mark.parametrize("num_parts", [1, 2, 4, 24])
@pytest.mark.parametrize("documents", [None, (24,), (5, 12, 5, 2), (6, 6, 12), (23, 1), (1,) * 24])
@pytest.mark.parametrize("without", [(), ("rotary", "D")])
def test_parts_are_the_whole(num_parts, documents, without):
    case = replace(make_case(length=24, documents=documents, without=without), initial_state=None)
    assert_equal_laws(lambda case: in_parts(case, num_parts), lambda case: case.scan(ssd_chunk_scan), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    case = replace(make_case(length=64, dtype=dtype, head_dim=8, state_size=16), initial_state=None)
    assert_equal_laws(
        lambda case: in_parts(case, 4), lambda case: case.scan(ssd_chunk_scan), case, expected_case=case.double()
    )


def test_a_part_far_behind_has_no_share_and_no_overflow():
    finals, sums = torch.ones(1, 4, 1, 1, 1), torch.full((1, 4, 1), 1e4)
    joins = torch.ones(1, 4, dtype=torch.bool)
    state = state_before_part(finals, sums, torch.tensor([-16.0]), joins & (torch.arange(4) < 3), 3)
    torch.testing.assert_close(state, torch.ones(1, 1, 1, 1))
