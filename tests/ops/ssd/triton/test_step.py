"""The GPU's kernel of a step is the pure step, written over the old state."""

import itertools

import pytest
import torch

from tests.gpu_kernels import DTYPES, TOLERANCE, counted
from tests.ops.ssd.cases import make_case
from tests.tolerances import assert_close
from transxssm.ops.ssd import ssd_step, ssd_step_


def step_of(case):
    rotary = None if case.rotary is None else tuple(table[:, 0] for table in case.rotary)
    return (case.x[:, 0], case.dt[:, 0], case.A, case.B[:, 0], case.C[:, 0]), {"rotary": rotary, "D": case.D}


SIZES = [(2, 2, 3, 4), (3, 1, 5, 6), (1, 2, 16, 32)]
# The sizes with every number of elements that a program may have, and in every format; the smallest ones with everything.
CASES = [
    (sizes, elements, dtype, without)
    for sizes, elements, dtype, without in itertools.product(SIZES, (1, 64, 8192), DTYPES, ((), ("rotary",), ("D",)))
    if (dtype == torch.float32 and not without) or (elements == 64 and (not without or sizes == SIZES[0]))
]


@pytest.mark.parametrize(("sizes", "elements", "dtype", "without"), CASES, ids=str)
def test_a_step(sizes, elements, dtype, without, device, kernels, monkeypatch):
    monkeypatch.setattr(kernels.step, "_ELEMENTS", elements)
    calls = counted(monkeypatch, kernels.step, "step_over_state")
    named = dict(zip(("groups", "heads_per_group", "head_dim", "state_size"), sizes, strict=True))
    case = make_case(length=1, batch=2, dtype=dtype, device=device, without=without, **named)
    arguments, options = step_of(case)
    expected_y, expected_state = ssd_step(case.initial_state, *arguments, **options)
    state = case.initial_state.clone()
    y = ssd_step_(state, *arguments, **options)
    assert len(calls) == 1
    assert y.dtype == dtype
    assert_close(y, expected_y, TOLERANCE[dtype], "y")
    assert_close(state, expected_state, torch.float32, "state")


def test_a_step_reads_views_and_one_row_of_angles(device, kernels, monkeypatch):
    """x, B and C as the model splits them out of one projection; cos and sin of one row for the batch."""
    calls = counted(monkeypatch, kernels.step, "step_over_state")
    x, B, C = torch.randn(3, 4 * 8 + 2 * 2 * 16, device=device).split([32, 32, 32], dim=-1)
    x, B, C = x.unflatten(-1, (4, 8)), B.unflatten(-1, (2, 16)), C.unflatten(-1, (2, 16))
    dt, A = torch.rand(4, 3, device=device).T, -torch.rand(4, device=device)
    angles = torch.rand(1, 8, device=device)
    rotary = angles.cos(), angles.sin()
    state = torch.randn(3, 4, 8, 16, device=device)
    expected_y, expected_state = ssd_step(state, x, dt, A, B, C, rotary=rotary)
    assert_close(ssd_step_(state, x, dt, A, B, C, rotary=rotary), expected_y, torch.float32, "y")
    assert_close(state, expected_state, torch.float32, "state")
    mixed = torch.stack((B, C), dim=-1).unbind(-1)  # numbers of a row that lie apart
    expected_y, expected_state = ssd_step(state, x, dt, A, *mixed, rotary=rotary)
    assert_close(ssd_step_(state, x, dt, A, *mixed, rotary=rotary), expected_y, torch.float32, "y")
    assert_close(state, expected_state, torch.float32, "state")
    assert len(calls) == 2


@pytest.mark.parametrize("one", ["cos", "sin"])
def test_one_table_may_be_the_same_for_all_rows(one, device, kernels):
    case = make_case(length=1, batch=3, dtype=torch.float32, device=device)
    arguments, options = step_of(case)
    cos, sin = options["rotary"]
    rotary = (cos[:1], sin) if one == "cos" else (cos, sin[:1])
    whole = tuple(torch.broadcast_tensors(*rotary))
    expected_y, expected_state = ssd_step(case.initial_state, *arguments, rotary=whole)
    state = case.initial_state.clone()
    assert_close(ssd_step_(state, *arguments, rotary=rotary), expected_y, torch.float32, "y")
    assert_close(state, expected_state, torch.float32, "state")


def test_a_strided_state_takes_torch(device, kernels, monkeypatch):
    calls = counted(monkeypatch, kernels.step, "step_over_state")
    case = make_case(length=1, dtype=torch.float32, device=device)
    arguments, options = step_of(case)
    expected_y, expected_state = ssd_step(case.initial_state, *arguments, **options)
    strided = case.initial_state.transpose(2, 3).contiguous().transpose(2, 3)
    assert_close(ssd_step_(strided, *arguments, **options), expected_y, torch.float32)
    assert_close(strided, expected_state, torch.float32)
    assert not calls


def test_autograd_notices_that_the_state_has_changed(device, kernels):
    case = make_case(length=1, dtype=torch.float32, device=device)
    arguments, options = step_of(case)
    state, weight = case.initial_state.clone(), torch.ones_like(case.initial_state, requires_grad=True)
    loss = (weight * state).sum()
    ssd_step_(state, *arguments, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_rows_are_no_rows(device, kernels):
    case = make_case(length=1, dtype=torch.float32, device=device)
    (x, dt, A, B, C), _ = step_of(case)
    assert ssd_step_(case.initial_state[:0], x[:0], dt[:0], A, B[:0], C[:0]).shape == (0, *x.shape[1:])


@pytest.mark.parametrize("index", range(1, 8))  # x decides on the state's format too
def test_every_input_is_asked_about(index, device, kernels, monkeypatch):
    """float64 in any of them is torch's."""
    calls = counted(monkeypatch, kernels.step, "step_over_state")
    case = make_case(length=1, dtype=torch.float32, device=device)
    arguments, options = step_of(case)
    given = [*arguments, options["D"], *options["rotary"]]
    given[index] = given[index].double()
    *arguments, D, cos, sin = given
    ssd_step_(case.initial_state.clone(), *arguments, D=D, rotary=(cos, sin))
    assert not calls


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_states_in_slots(index_dtype, device, kernels, monkeypatch):
    """Slots that lie apart, as in a serving engine's memory; what is not named stays as it is, bit by bit."""
    calls = counted(monkeypatch, kernels.step, "step_over_state")
    case = make_case(length=1, batch=3, head_dim=5, state_size=6, dtype=torch.float32, device=device)
    arguments, options = step_of(case)
    named = torch.tensor([5, 0, 3], dtype=index_dtype, device=device)
    memory = torch.randn(7, case.initial_state[0].numel() + 5, device=device)
    cache = memory[:, :-5].unflatten(1, case.initial_state.shape[1:])
    before = memory.clone()
    expected_y, expected_state = ssd_step(cache[named.long()], *arguments, **options)
    assert_close(ssd_step_(cache, *arguments, **options, state_indices=named), expected_y, torch.float32, "y")
    assert_close(cache[named.long()], expected_state, torch.float32, "state")
    before[named.long()] = memory[named.long()]
    assert torch.equal(memory, before)
    assert torch.equal(memory[:, -5:], before[:, -5:])
    assert len(calls) == 1
