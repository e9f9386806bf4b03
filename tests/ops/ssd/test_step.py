"""The step in place is the pure step: the same y, the new state where the old one was, by kernels and by torch's operations."""

import pytest
import torch

from tests.ops.ssd.cases import make_case
from tests.ops.ssd.ways import chunks_of
from tests.tolerances import assert_close
from transxssm.ops.csrc import compiled_library
from transxssm.ops.ssd import ssd_step, ssd_step_, step

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
SIZES = pytest.mark.parametrize(
    ("groups", "heads_per_group", "head_dim", "state_size"),
    [(2, 2, 3, 4), (1, 4, 8, 16), (3, 1, 5, 6), (4, 2, 64, 128)],
)


def token_of(case, t=0):
    """The arguments of a step behind the state, and its options."""
    rotary = None if case.rotary is None else tuple(table[:, t] for table in case.rotary)
    return (case.x[:, t], case.dt[:, t], case.A, case.B[:, t], case.C[:, t]), {"rotary": rotary, "D": case.D}


@DTYPES
@SIZES
@pytest.mark.parametrize("without", [(), ("rotary",), ("D",)], ids=str)
def test_in_place_is_pure(
    without, groups, heads_per_group, head_dim, state_size, dtype, device, with_and_without_kernels
):
    sizes = {"groups": groups, "heads_per_group": heads_per_group, "head_dim": head_dim, "state_size": state_size}
    case = make_case(length=1, batch=3, dtype=dtype, device=device, without=without, **sizes)
    arguments, options = token_of(case)
    expected_y, expected_state = ssd_step(case.initial_state, *arguments, **options)
    state = case.initial_state.clone()
    place = state.data_ptr()
    y = ssd_step_(state, *arguments, **options)
    assert state.data_ptr() == place
    assert (y.dtype, state.dtype) == (expected_y.dtype, expected_state.dtype)
    assert_close(y, expected_y, dtype, "y")
    assert_close(state, expected_state, torch.float64 if dtype == torch.float64 else torch.float32, "state")


@DTYPES
def test_many_steps_keep_to_the_scan(dtype, device, with_and_without_kernels):
    case = make_case(length=101, batch=2, dtype=dtype, device=device)
    expected_y, expected_state = chunks_of(16)(case)
    state, outputs = case.initial_state.clone(), []
    for t in range(101):
        arguments, options = token_of(case, t)
        outputs.append(ssd_step_(state, *arguments, **options))
    assert_close(torch.stack(outputs, dim=1), expected_y, dtype, "y")
    assert_close(state, expected_state, dtype, "state")


@pytest.mark.parametrize("without", [(), ("rotary",), ("D",)], ids=str)
def test_compiled_it_is_the_same(without, device):
    case = make_case(length=1, batch=3, dtype=torch.float32, device=device, without=without)
    arguments, options = token_of(case)
    expected_y, expected_state = ssd_step(case.initial_state, *arguments, **options)
    state = case.initial_state.clone()
    with torch.no_grad():
        y = torch.compile(ssd_step_, fullgraph=True)(state, *arguments, **options)
    assert_close(y, expected_y, torch.float32, "y")
    assert_close(state, expected_state, torch.float32, "state")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    case = make_case(length=1, batch=3, groups=3, head_dim=8, state_size=16, dtype=torch.float32)
    arguments, options = token_of(case)
    results, before = [], torch.get_num_threads()
    for number in (1, threads):
        torch.set_num_threads(number)
        try:
            state = case.initial_state.clone()
            results.append((ssd_step_(state, *arguments, **options), state))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.skipif(compiled_library() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_takes_the_kernel_and_reads_views(dtype, monkeypatch):
    """x, B and C as the model splits them out of one projection."""
    taken, kernels_of = [], step.kernels_of
    monkeypatch.setattr(step, "kernels_of", lambda dtype: taken.append(1) or kernels_of(dtype))
    torch.manual_seed(0)
    x, B, C = torch.randn(3, 4 * 8 + 2 * 2 * 16).to(dtype).split([32, 32, 32], dim=-1)
    views = x.unflatten(-1, (4, 8)), B.unflatten(-1, (2, 16)), C.unflatten(-1, (2, 16))
    dt, A, states = torch.rand(3, 4), -torch.rand(4), torch.randn(3, 4, 8, 16).repeat(2, 1, 1, 1, 1)
    from_views = ssd_step_(states[0], views[0], dt, A, *views[1:])
    from_copies = ssd_step_(states[1], views[0].contiguous(), dt, A, *(view.contiguous() for view in views[1:]))
    assert torch.equal(from_views, from_copies)
    assert torch.equal(*states)
    assert len(taken) == 2


def test_a_strided_state_is_written_where_it_lies(device):
    case = make_case(length=1, dtype=torch.float32, device=device)
    arguments, options = token_of(case)
    expected_y, expected_state = ssd_step(case.initial_state, *arguments, **options)
    strided = case.initial_state.transpose(2, 3).contiguous().transpose(2, 3)
    assert_close(ssd_step_(strided, *arguments, **options), expected_y, torch.float32)
    assert_close(strided, expected_state, torch.float32)


def test_a_padded_step_leaves_the_state_alone(device, with_and_without_kernels):
    case = make_case(length=1, dtype=torch.float32, device=device)
    (x, dt, *maps), options = token_of(case)
    state = case.initial_state.clone()
    ssd_step_(state, x, torch.zeros_like(dt), *maps, **options)
    assert torch.equal(state, case.initial_state)


def test_a_state_of_another_precision_is_refused():
    case = make_case(length=1, dtype=torch.bfloat16)
    arguments, options = token_of(case)
    with pytest.raises(ValueError, match=r"must be torch.float32 to be written in place: got torch.bfloat16"):
        ssd_step_(case.initial_state.bfloat16(), *arguments, **options)


@pytest.mark.parametrize("index", range(9))
def test_gradients_are_refused(index):
    case = make_case(length=1, dtype=torch.float32)
    arguments, options = token_of(case)
    given = [tensor.clone() for tensor in (case.initial_state, *arguments, options["D"], *options["rotary"])]
    given[index].requires_grad_()
    *arguments, D, cos, sin = given
    with pytest.raises(ValueError, match="written in place has no gradients"):
        ssd_step_(*arguments, D=D, rotary=(cos, sin))


def test_autograd_notices_that_the_state_has_changed(with_and_without_kernels):
    case = make_case(length=1, dtype=torch.float32)
    arguments, options = token_of(case)
    state, weight = case.initial_state.clone(), torch.ones_like(case.initial_state, requires_grad=True)
    loss = (weight * state).sum()
    ssd_step_(state, *arguments, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_may_share_a_position(dtype, device, with_and_without_kernels):
    """One row of cos and sin for the whole batch, as the model has it."""
    case = make_case(length=1, batch=3, dtype=dtype, device=device)
    arguments, options = token_of(case)
    shared = tuple(table[:1] for table in options["rotary"])
    expected_y, expected_state = ssd_step(
        case.initial_state, *arguments, rotary=tuple(table.expand(3, -1).contiguous() for table in shared)
    )
    state = case.initial_state.clone()
    assert_close(ssd_step_(state, *arguments, rotary=shared), expected_y, dtype, "y")
    assert_close(state, expected_state, torch.float32, "state")


def test_formats_may_differ(with_and_without_kernels):
    case = make_case(length=1, dtype=torch.bfloat16)
    (x, dt, A, B, C), options = token_of(case)
    expected_y, expected_state = ssd_step(case.initial_state, x, dt, A, B.float(), C, **options)
    state = case.initial_state.clone()
    assert_close(ssd_step_(state, x, dt, A, B.float(), C, **options), expected_y, torch.bfloat16, "y")
    assert_close(state, expected_state, torch.float32, "state")


def test_no_rows_are_no_rows(with_and_without_kernels):
    case = make_case(length=1, dtype=torch.float32)
    (x, dt, A, B, C), _ = token_of(case)
    y = ssd_step_(case.initial_state[:0], x[:0], dt[:0], A, B[:0], C[:0])
    assert y.shape == (0, *x.shape[1:])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_it_can_be_mapped():
    case = make_case(length=1, batch=4, dtype=torch.float32)
    (x, dt, A, B, C), _ = token_of(case)
    expected_y, expected_state = ssd_step(case.initial_state, x, dt, A, B, C)
    state = case.initial_state.clone()
    batched = [tensor.unflatten(0, (2, 2)) for tensor in (state, x, dt, B, C)]
    y = torch.func.vmap(lambda state, x, dt, B, C: ssd_step_(state, x, dt, A, B, C))(*batched)
    assert_close(y.flatten(0, 1), expected_y, torch.float32)
    assert_close(state, expected_state, torch.float32)


@pytest.fixture
def slots(device):
    """A cache of seven slots that lie apart, as in a serving engine's memory, for a case's heads; the gaps hold a number of their own."""

    def make(case):
        size = case.initial_state[0].numel()
        memory = torch.full((7, size + 5), 3.5, dtype=case.initial_state.dtype, device=device)
        cache = memory[:, :size].unflatten(1, case.initial_state.shape[1:])
        cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(2)))
        return memory, cache

    return make


@DTYPES
@SIZES
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_states_in_slots(
    index_dtype, groups, heads_per_group, head_dim, state_size, dtype, device, slots, with_and_without_kernels
):
    """One call with slots is a call for each row, bit by bit; no other slot, and nothing between two of them, is touched."""
    sizes = {"groups": groups, "heads_per_group": heads_per_group, "head_dim": head_dim, "state_size": state_size}
    case = make_case(length=1, batch=3, dtype=dtype, device=device, **sizes)
    (x, dt, A, B, C), options = token_of(case)
    memory, cache = slots(case)
    before, named = memory.clone(), [5, 0, 3]
    expected = [
        ssd_step(cache[slot, None], x[i, None], dt[i, None], A, B[i, None], C[i, None], D=options["D"],
                 rotary=tuple(table[i, None] for table in options["rotary"]))
        for i, slot in enumerate(named)
    ]  # fmt: skip
    y = ssd_step_(cache, x, dt, A, B, C, **options, state_indices=torch.tensor(named, dtype=index_dtype, device=device))
    assert_close(y, torch.cat([y for y, _ in expected]), dtype, "y")
    for slot, (_, state) in zip(named, expected, strict=True):
        assert_close(cache[slot], state[0], torch.float64 if dtype == torch.float64 else torch.float32, "state")
        before[slot, : state.numel()] = cache[slot].flatten()
    assert torch.equal(memory, before)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 7, 1], r"slots 0 … 6: got 7"),
        ([0, -1, 1], r"slots 0 … 6: got -1"),
        ([4, 2, 4], r"none twice: got slot 4"),
        ([0, 1], r"\(3,\) int32 or int64, a slot for each state: got \(2,\)"),
        ([0.0, 1.0, 2.0], r"\(3,\) int32 or int64, a slot for each state: got \(3,\) torch.float32"),
    ],
)
def test_slots_that_are_not_there_are_refused(indices, message, slots):
    case = make_case(length=1, batch=3, dtype=torch.float32)
    arguments, options = token_of(case)
    memory, cache = slots(case)
    before = memory.clone()
    with pytest.raises(ValueError, match=message):
        ssd_step_(cache, *arguments, **options, state_indices=torch.tensor(indices))
    assert torch.equal(memory, before)


def test_compiled_it_finds_its_slots(slots):
    case = make_case(length=1, batch=3, dtype=torch.float32)
    arguments, options = token_of(case)
    _, cache = slots(case)
    expected, indices = cache.clone(), torch.tensor([6, 1, 2])
    expected_y = ssd_step_(expected, *arguments, **options, state_indices=indices)
    with torch.no_grad():
        y = torch.compile(ssd_step_, fullgraph=True)(cache, *arguments, **options, state_indices=indices)
    assert_close(y, expected_y, torch.float32, "y")
    assert_close(cache, expected, torch.float32, "states")
