"""What the compiled passes add to the laws in test_chunked.py: that they are taken, views, threads, other formats, single numbers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.ssd.cases import assert_equal_laws, make_case, results
from tests.ops.ssd.oracle import ssd_oracle
from tests.tolerances import assert_close
from transxssm.ops.csrc import compiled_library, has_bf16_gemm
from transxssm.ops.ssd import chunked, cpp, ssd_chunk_scan

pytestmark = pytest.mark.skipif(compiled_library() is None, reason="no C++ compiler here")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
def test_they_are_what_a_scan_on_a_cpu_takes(dtype, monkeypatch):
    taken = []
    monkeypatch.setattr(chunked, "forward_by_kernels", lambda backend, *arguments: taken.append("forward"))
    monkeypatch.setattr(chunked, "backward_by_kernels", lambda backend, *arguments: taken.append("backward"))
    case = make_case(length=9, dtype=dtype)
    case.scan(ssd_chunk_scan)
    x = case.x.clone().requires_grad_()
    replace(case, x=x).scan(ssd_chunk_scan)[0].sum().backward()
    assert taken == ["forward", "forward", "backward"]


def test_a_format_that_the_cpu_does_not_multiply_becomes_float32(monkeypatch):
    """bfloat16 on a CPU that has no products of it."""
    monkeypatch.setattr(cpp, "has_fast_products", lambda device_type, dtype: False)
    case = make_case(batch=2, documents=(9, 7, 5), dtype=torch.bfloat16)

    def by_passes(case):
        return case.scan(ssd_chunk_scan, chunk_size=8)

    assert_equal_laws(by_passes, ssd_oracle, case, expected_case=case.double())


@DTYPES
@pytest.mark.parametrize(("head_dim", "size"), [(8, 16), (32, 64)])
def test_views_are_read_where_they_lie(head_dim, size, dtype):
    """x, B and C out of one projection, as in the model, and a gradient of y that is expanded."""
    batch, length, groups, heads = 2, 19, 2, 4
    torch.manual_seed(0)
    projected = torch.randn(batch, length, heads * head_dim + 2 * groups * size).to(dtype)
    x, B, C = projected.split([heads * head_dim, groups * size, groups * size], dim=-1)
    views = x.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
    dt, A = torch.rand(batch, length, heads), -torch.rand(heads)

    def outcome(x, B, C):
        x, B, C = (tensor.requires_grad_() for tensor in (x.detach(), B.detach(), C.detach()))
        y, _ = ssd_chunk_scan(x, dt, A, B, C, chunk_size=8)
        return y, *torch.autograd.grad(y.sum(), (x, B, C))

    for from_view, from_copy in zip(outcome(*views), outcome(*(view.contiguous() for view in views)), strict=True):
        assert torch.equal(from_view, from_copy)


@DTYPES
def test_threads_do_not_change_the_result(dtype):
    case = make_case(batch=2, length=70, dtype=dtype)
    one = case.scan(ssd_chunk_scan, chunk_size=16)
    torch.set_num_threads(3)
    try:
        three = case.scan(ssd_chunk_scan, chunk_size=16)
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, one, three))


@pytest.mark.parametrize("rows", [(1, 3), (3, 1)], ids=["one cos", "one sin"])
def test_a_table_may_be_the_same_for_all_rows(rows):
    """While the other is not."""
    case = make_case(batch=3, length=21, dtype=torch.float32)
    assert case.rotary is not None
    tables = tuple(torch.randn(count, *table.shape[1:]) for count, table in zip(rows, case.rotary, strict=True))
    whole = tuple(table.expand(3, -1, -1) for table in tables)
    assert_equal_laws(
        lambda case: case.scan(ssd_chunk_scan, chunk_size=8),
        lambda case: replace(case, rotary=whole).scan(ssd_chunk_scan, chunk_size=8),
        replace(case, rotary=tables),
    )


def test_a_default_dtype_is_none_of_its_business():
    case = make_case(length=21, dtype=torch.bfloat16)
    before = results(lambda case: case.scan(ssd_chunk_scan, chunk_size=8), case)
    torch.set_default_dtype(torch.float64)
    try:
        after = results(lambda case: case.scan(ssd_chunk_scan, chunk_size=8), case)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, expected in before.items():
        if not name.startswith("gradient"):  # the incoming gradients are other random numbers
            assert torch.equal(after[name], expected), name


def test_a_number_that_is_none_shows():
    """What went wrong before a scan is not hidden by it."""
    case = make_case(length=21, dtype=torch.bfloat16)
    x = case.x.clone()
    x[0, 9] = torch.nan
    y, state = replace(case, x=x).scan(ssd_chunk_scan, chunk_size=8)
    assert not y[0, :8].isnan().any()
    assert y[0, 9:].isnan().all()
    assert state[0].isnan().all()
    assert not y[1:].isnan().any()


def test_decays_have_the_digits_of_float32():
    """One token against exp itself, over all exponents that are not zero."""
    exponents = torch.linspace(-86.9, 0.0, 4001)
    ones = torch.ones(1, 1, 4001, 1)
    state = torch.ones(1, 4001, 1, 1)
    zero = torch.zeros(1, 1, 4001, 1)
    y, _ = ssd_chunk_scan(
        zero, -exponents[None, None], torch.tensor(-1.0).expand(4001), ones, ones, initial_state=state
    )
    expected = exponents.double().exp()
    assert_close(y.flatten().double(), expected, torch.float32, "exp")
    assert ((y.flatten().double() - expected).abs() / expected).max() < 3e-7


FUSED_PRODUCTS = pytest.mark.skipif(not has_bf16_gemm(), reason="this processor has no AVX-512 BF16")


def names_of_passes(case, monkeypatch):
    names, run = [], cpp._Scan.run
    monkeypatch.setattr(cpp._Scan, "run", lambda scan, name, *tensors: names.append(name) or run(scan, name, *tensors))
    x = case.x.clone().requires_grad_()
    replace(case, x=x).scan(ssd_chunk_scan)[0].sum().backward()
    return set(names)


@FUSED_PRODUCTS
@pytest.mark.parametrize(("head_dim", "state_size", "fits"), [(32, 96, True), (64, 48, False), (40, 64, False)])
def test_widths_that_products_are_fused_for(head_dim, state_size, fits, monkeypatch):
    case = make_case(head_dim=head_dim, state_size=state_size, dtype=torch.bfloat16)
    names = names_of_passes(case, monkeypatch)
    assert ("chunk_gradients" in names) == fits
    assert ("load_block" in names) != fits
    monkeypatch.undo()
    in_float32 = make_case(head_dim=head_dim, state_size=state_size, dtype=torch.float32)
    assert "load_block" in names_of_passes(in_float32, monkeypatch)


@FUSED_PRODUCTS
@given(data=st.data())
def test_any_shape_with_fused_products(data):
    # With fewer than some 16 tokens the gradient of dt, a sum over products of either sign, can be smaller than its rounding in bfloat16.
    documents = data.draw(
        st.lists(st.integers(1, 70), min_size=1, max_size=4).filter(lambda lengths: sum(lengths) >= 16)
    )
    case = make_case(
        batch=data.draw(st.sampled_from([1, 3])),
        groups=data.draw(st.integers(1, 2)),
        heads_per_group=data.draw(st.integers(1, 3)),
        head_dim=data.draw(st.sampled_from([32, 64, 96])),
        state_size=data.draw(st.sampled_from([32, 64, 96, 128])),
        documents=documents,
        without=data.draw(st.lists(st.sampled_from(["D", "initial_state", "rotary", "seq_idx"]), unique=True)),
        dtype=torch.bfloat16,
        seed=data.draw(st.integers(0, 2**16)),
    )
    chunk_size = data.draw(st.sampled_from([1, 5, 16, 33, 64, 128]))
    assert_equal_laws(
        lambda case: case.scan(ssd_chunk_scan, chunk_size=chunk_size), ssd_oracle, case, expected_case=case.double()
    )


@FUSED_PRODUCTS
def test_threads_do_not_change_the_result_with_fused_products():
    case = make_case(batch=2, length=150, head_dim=32, state_size=64, dtype=torch.bfloat16)

    def outcome():
        x = case.x.clone().requires_grad_()
        y, state = replace(case, x=x).scan(ssd_chunk_scan, chunk_size=64)
        return y, state, *torch.autograd.grad(y.sum() + state.sum(), x)

    one = outcome()
    torch.set_num_threads(3)
    try:
        three = outcome()
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, one, three))
