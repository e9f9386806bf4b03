"""Attention of one query equals its formula, whatever the blocks, the strides, the mask and the sharing of keys."""

from importlib import import_module

import pytest
import torch

from tests.tolerances import assert_close
from transxssm.ops import single_query_attention
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
    assert_close(single_query_attention(q, k, v, mask, scaling=SCALING), formula(q, k, v, mask), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["blocks", "sdpa"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_every_implementation_equals_the_formula(backend, key_heads, dtype, device):
    """Asked for past the table, which would not take all of them on this device."""
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
