"""Attention of one query equals its formula, whatever the blocks, the strides, the mask and the sharing of keys."""

from importlib import import_module

import pytest
import torch

from tests.tolerances import assert_close
from transxssm.ops import single_query_attention
from transxssm.ops.csrc import compiled_library
from transxssm.ops.single_query_attention import SINGLE_QUERY_ATTENTION

SCALING = 0.3


def formula(q, k, v, mask=None):
    q, k, v = q.double(), *(t.double().repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = SCALING * torch.einsum("bhqd,bhtd->bhqt", q, k)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhqt,bhtd->bhqd", scores.softmax(-1), v)


def inputs(batch, heads, key_heads, length, head_dim, dtype=torch.bfloat16):
    shapes = (batch, heads, 1, head_dim), *((batch, key_heads, length, head_dim),) * 2
    return [torch.randn(shape).mul(2).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (2, 4, 4, 33, 8), (3, 6, 2, 70, 16)], ids=str)
def test_equals_the_formula(shape, dtype):
    q, k, v = inputs(*shape, dtype=dtype)
    before = q.clone()
    output = single_query_attention(q, k, v, scaling=SCALING)
    assert output.dtype == dtype
    assert_close(output, formula(q, k, v), dtype)
    assert torch.equal(q, before)


@pytest.mark.parametrize("elements", [1, 2 * 2 * 8 * 7, 2 * 2 * 8 * 33, 10**6])
def test_any_block(elements, monkeypatch):
    monkeypatch.setattr(import_module("transxssm.ops.single_query_attention"), "BLOCK_ELEMENTS", elements)
    q, k, v = inputs(2, 4, 2, 33, 8)
    mask = torch.rand(2, 1, 1, 33) < 0.5
    mask[..., 0] = True
    output = single_query_attention(q, k, v, mask, scaling=SCALING, backend="blocks")
    assert_close(output, formula(q, k, v, mask), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 3, 511, 512, 513, 1600])
def test_any_number_of_splits_and_threads(length, dtype):
    """Of strided heads, as projections and caches leave them, with a score in each split that the others must yield to."""
    q, k, v = inputs(3, 6, 2, length + 5, 40, dtype=dtype)
    q, k, v = q.transpose(1, 2).contiguous().transpose(1, 2), k[:, :, 2:-3], v[:, :, 2:-3]
    k[:, :, ::500] *= 3
    mask = torch.rand(3, 1, 1, length) < 0.7
    mask[..., 0] = True
    mask[1, ..., 512:] = False  # whole splits that a row does not see
    outputs, threads = [], torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            outputs.append(single_query_attention(q, k, v, mask, scaling=SCALING))
    finally:
        torch.set_num_threads(threads)
    assert_close(outputs[0], formula(q, k, v, mask), dtype)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("shapes", [(2, 4, 2, 3, 5), (2, 4, 1, 3, 0), (2, 4, 1, 0, 5), (1, 4, 1, 2, 5)], ids=str)
def test_shapes_that_do_not_fit_are_refused(shapes):
    batch, heads, queries, key_heads, length = shapes
    q, k = torch.randn(2, heads, queries, 8), torch.randn(batch, key_heads, length, 8)
    with pytest.raises(ValueError, match=r"expected q \(b, h, 1, d\) and k, v \(b, k, t, d\)"):
        single_query_attention(q, k, k, scaling=SCALING)


def test_the_kernel_says_what_it_does_not_take():
    q, k, v = inputs(1, 2, 2, 3, 8)
    with pytest.raises(ValueError, match="q, k and v of one dtype"):
        single_query_attention(q, k.float(), v.float(), scaling=SCALING, backend="cpp")
    with pytest.raises(ValueError, match="float32 and bfloat16"):
        single_query_attention(q.half(), k.half(), v.half(), scaling=SCALING, backend="cpp")
    assert single_query_attention(q.half(), k.half(), v.half(), scaling=SCALING).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpp", "blocks", "sdpa"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_every_implementation_equals_the_formula(backend, key_heads, dtype, device):
    """Asked for past the table, which would not take all of them on this device."""
    if backend == "cpp" and (device.type != "cpu" or compiled_library() is None):
        pytest.skip("no C++ kernels here")
    q, k, v = (each.to(device) for each in inputs(2, 4, key_heads, 37, 8, dtype=dtype))
    mask = torch.rand(2, 1, 1, 37, device=device) < 0.5
    mask[..., 3] = True
    for seen in (None, mask, mask[:1]):
        output = SINGLE_QUERY_ATTENTION.named(backend).forward(q, k, v, seen, SCALING)
        assert output.dtype == dtype
        assert_close(output, formula(q, k, v, seen), dtype)
    blind = torch.zeros_like(mask)
    mean = v.double().mean(-2, keepdim=True).repeat_interleave(4 // key_heads, dim=1)
    assert_close(SINGLE_QUERY_ATTENTION.named(backend).forward(q, k, v, blind, SCALING), mean, dtype)


def test_one_mask_for_all_rows():
    q, k, v = inputs(3, 2, 2, 12, 8)
    mask = (torch.arange(12) % 3 != 1)[None, None, None]
    assert_close(single_query_attention(q, k, v, mask, scaling=SCALING), formula(q, k, v, mask), torch.bfloat16)


def test_a_row_that_sees_nothing_stays_finite():
    q, k, v = inputs(2, 2, 2, 5, 8)
    mask = torch.tensor([True, False]).view(2, 1, 1, 1).expand(2, 1, 1, 5)
    output = single_query_attention(q, k, v, mask, scaling=SCALING)
    assert_close(output[0], formula(q, k, v)[0], torch.bfloat16)
    assert_close(output[1], v[1].double().mean(-2, keepdim=True), torch.bfloat16)


def test_keys_of_a_cache_with_room():
    q, k, v = inputs(2, 4, 2, 40, 8)
    k, v = k[:, :, :29], v[:, :, :29]
    assert_close(single_query_attention(q, k, v, scaling=SCALING), formula(q, k, v), torch.bfloat16)


def test_autocast_does_not_round_the_scores():
    q, k, v = inputs(1, 2, 2, 64, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = single_query_attention(q, k, v, scaling=SCALING)
    assert_close(output, formula(q, k, v), torch.float32)
