"""The GPU's kernels equal torch's operations: on a GPU, and on a CPU through Triton's interpreter."""

import pytest
import torch

from tests import gpu_kernels
from tests.ops.ssd.cases import make_case
from tests.tolerances import assert_close
from transxssm.ops import has_single_query_attention, single_query_attention
from transxssm.ops.gpu import dispatch, has_gpu_kernels
from transxssm.ops.ssd import ssd_step, ssd_step_

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
TOLERANCE = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.bfloat16}


@pytest.fixture
def kernels(monkeypatch, device):
    return gpu_kernels.install(monkeypatch, device)


def counted(monkeypatch, module, name):
    """A list that grows by one at each call of a module's function."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs))
    return calls


def step_of(case):
    rotary = None if case.rotary is None else tuple(table[:, 0] for table in case.rotary)
    return (case.x[:, 0], case.dt[:, 0], case.A, case.B[:, 0], case.C[:, 0]), {"rotary": rotary, "D": case.D}


@DTYPES
@pytest.mark.parametrize("elements", [1, 64, 8192])
@pytest.mark.parametrize(
    ("groups", "heads_per_group", "head_dim", "state_size"), [(2, 2, 3, 4), (3, 1, 5, 6), (1, 2, 16, 32)]
)
@pytest.mark.parametrize("without", [(), ("rotary",), ("D",)], ids=str)
def test_a_step(without, groups, heads_per_group, head_dim, state_size, elements, dtype, device, kernels, monkeypatch):
    monkeypatch.setattr(kernels.step, "_ELEMENTS", elements)
    calls = counted(monkeypatch, kernels.step, "step_over_state")
    sizes = {"groups": groups, "heads_per_group": heads_per_group, "head_dim": head_dim, "state_size": state_size}
    case = make_case(length=1, batch=2, dtype=dtype, device=device, without=without, **sizes)
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


def by_formula(q, k, v, mask=None):
    scores = 0.3 * torch.einsum("bhqd,bhtd->bhqt", q.double(), k.double())
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e30)
    return torch.einsum("bhqt,bhtd->bhqd", scores.softmax(-1), v.double())


@DTYPES
@pytest.mark.parametrize("per_processor", [1, 100])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 33, 8), (2, 1, 600, 24), (1, 2, 1030, 64)], ids=str)
@pytest.mark.parametrize("pads", ["none", "of rows", "of all"])
def test_attention_of_a_query(pads, shape, per_processor, dtype, device, kernels, monkeypatch):
    """Parts of keys are put together, keys behind the last one and hidden ones count for nothing, a row that sees none takes the mean."""
    monkeypatch.setattr(kernels.single_query_attention, "_PROGRAMS_PER_PROCESSOR", per_processor)
    calls = counted(monkeypatch, kernels.single_query_attention, "attend_once")
    batch, heads, length, head_dim = shape
    q = torch.randn(batch, heads, 1, head_dim, device=device).mul(2).to(dtype)
    k, v = torch.randn(2, batch, heads, length + 7, head_dim, device=device).mul(2).to(dtype)[..., :length, :]
    mask = None
    if pads != "none":
        mask = torch.rand(batch if pads == "of rows" else 1, 1, 1, length, device=device) < 0.7
        mask[0] = mask[0] & (torch.arange(length, device=device) > 300)  # whole blocks
    output = single_query_attention(q, k, v, mask, scaling=0.3)
    assert len(calls) == 1
    assert output.dtype == dtype
    assert_close(output, by_formula(q, k, v, mask), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("head_dim", "itemsize", "num_keys"),
    [(32, 2, 128), (64, 2, 128), (64, 4, 64), (128, 2, 64), (256, 4, 16), (512, 4, 16)],
)
def test_blocks_fit_into_a_processor(head_dim, itemsize, num_keys, kernels):
    assert kernels.single_query_attention._num_keys(head_dim * itemsize, torch.device("cpu")) == num_keys


def test_attention_reads_queries_as_projections_lay_them(device, kernels):
    q, k, v = torch.randn(3, 2, 5, 3, 8, device=device).transpose(2, 3)  # (b, h, t, d) out of (b, t, h, d)
    q = q[:, :, -1:]
    assert_close(single_query_attention(q, k, v, scaling=0.3), by_formula(q, k, v), torch.float32)
    apart = [torch.stack((tensor, tensor), dim=-1)[..., 0] for tensor in (q, k, v)]
    assert_close(single_query_attention(*apart, scaling=0.3), by_formula(q, k, v), torch.float32)


def test_shared_keys_are_left_to_torch(device, kernels, monkeypatch):
    calls = counted(monkeypatch, kernels.single_query_attention, "attend_once")
    q, k = torch.randn(1, 4, 1, 8, device=device), torch.randn(1, 2, 5, 8, device=device)
    assert not has_single_query_attention(q, k, k)
    expected = by_formula(q, *(k.repeat_interleave(2, dim=1),) * 2)
    assert_close(single_query_attention(q, k, k, scaling=0.3), expected, torch.float32)
    assert not calls


def test_no_rows_are_no_rows(device, kernels):
    q, k = torch.randn(0, 4, 1, 8, device=device), torch.randn(0, 4, 5, 8, device=device)
    assert single_query_attention(q, k, k, scaling=0.3).shape == q.shape
    case = make_case(length=1, dtype=torch.float32, device=device)
    (x, dt, A, B, C), _ = step_of(case)
    assert ssd_step_(case.initial_state[:0], x[:0], dt[:0], A, B[:0], C[:0]).shape == (0, *x.shape[1:])


def test_who_has_kernels(device, kernels, monkeypatch):
    tensor = torch.zeros(2, device=device)
    assert has_gpu_kernels(tensor, None, tensor.bfloat16())
    assert not has_gpu_kernels(tensor, tensor.double())
    assert not has_gpu_kernels(tensor, torch.zeros(2, device="meta"))

    class Subclass(torch.Tensor):
        pass

    assert not has_gpu_kernels(tensor, tensor.as_subclass(Subclass))
    assert has_gpu_kernels(tensor, torch.nn.Parameter(tensor))
    compiled = torch.compile(lambda x: x + has_gpu_kernels(x), fullgraph=True, backend="eager")
    assert [compiled(each).sum() for each in (tensor, tensor.double(), tensor.as_subclass(Subclass))] == [2, 0, 0]
    answers = []
    torch.vmap(lambda row: answers.append(has_gpu_kernels(row)) or row)(torch.zeros(2, 2, device=device))
    assert answers == [False]
    monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
    assert not has_gpu_kernels(tensor)


@pytest.mark.parametrize("number", range(1, 70))
def test_power_of_2(number):
    side = dispatch.power_of_2(number)
    assert side.bit_count() == 1
    assert side // 2 < number <= side
