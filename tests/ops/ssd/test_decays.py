"""Decays of chunks against their definition: products of what single tokens multiply the state by, none across documents."""

import pytest
import torch

from tests.tolerances import assert_close
from transxssm.ops.ssd import decays
from transxssm.ops.ssd.decays import cumulative_sum, decays_of

CHUNKS, GROUPS, HEADS, LENGTH = 3, 2, 2, 7


def expected_decays(log_decay, seq_idx=None, before=None):
    """By loops in float64: between, from_start, to_end, across."""
    log_decay = log_decay.double()
    length = log_decay.shape[-1]
    seq_idx = torch.zeros(len(log_decay), length) if seq_idx is None else seq_idx
    before = seq_idx[:, 0] if before is None else before
    shape = log_decay.shape[:-1]
    between, from_start = torch.zeros(*shape, length, length).double(), torch.zeros(*shape, length).double()
    to_end, across = torch.zeros_like(from_start), torch.zeros(shape).double()
    for a in range(len(log_decay)):
        for q in range(length):
            for k in range(q + 1):
                between[a, ..., q, k] = log_decay[a, ..., k + 1 : q + 1].sum(-1).exp() * (
                    seq_idx[a, k] == seq_idx[a, q]
                )
            from_start[a, ..., q] = log_decay[a, ..., : q + 1].sum(-1).exp() * (before[a] == seq_idx[a, q])
            to_end[a, ..., q] = log_decay[a, ..., q + 1 :].sum(-1).exp() * (seq_idx[a, q] == seq_idx[a, -1])
        across[a] = log_decay[a].sum(-1).exp() * (before[a] == seq_idx[a, -1])
    return between, from_start, to_end, across


@pytest.fixture(params=[True, False], ids=["with-float64", "without-float64"])
def with_float64(request, monkeypatch) -> bool:
    """Both ways to form decays: on a device that has float64, and on one that doesn't."""
    monkeypatch.setattr(decays, "has_float64", lambda device: request.param)
    return request.param


def random_log_decay(dtype, device):
    return -torch.rand(CHUNKS, GROUPS, HEADS, LENGTH, dtype=torch.float64).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_equals_the_products(exact, dtype, device, with_float64):
    log_decay = random_log_decay(dtype, device)
    for actual, expected in zip(
        decays_of(log_decay, None, None, exact=exact), expected_decays(log_decay.cpu()), strict=True
    ):
        assert_close(actual.cpu(), expected, dtype)


def test_nothing_passes_from_document_to_document(device, with_float64):
    log_decay = random_log_decay(torch.float64, device)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [2] * 7, [3] * 7])
    before = torch.tensor([0, 2, 2])  # each chunk begins inside a document, but the last
    expected = expected_decays(log_decay.cpu(), seq_idx, before)
    assert (expected[3] == 0).all(dim=(1, 2)).tolist() == [True, False, True]
    for actual, wanted in zip(
        decays_of(log_decay, seq_idx.to(device), before.to(device), exact=True), expected, strict=True
    ):
        assert_close(actual.cpu(), wanted, torch.float64)


def test_exact_keeps_small_decays_behind_a_large_one(device, with_float64):
    log_decay = torch.tensor([-3000.0, -1e-4, -1e-4, -2e-4], device=device).view(1, 1, 1, 4)
    [last_row] = decays_of(log_decay, None, None, exact=True).between[..., -1, 1:].view(1, 3)
    expected = torch.tensor([-3e-4, -2e-4, 0.0], dtype=torch.float64).exp()
    assert_close(1 - last_row.cpu(), 1 - expected, torch.bfloat16)  # 1 − decay has few digits
    if not with_float64:
        return  # nothing is rounded there that could be left out
    rounded = decays_of(log_decay, None, None, exact=False).between[..., -1, 1:].view(3)
    assert (1 - rounded.cpu()).tolist() != pytest.approx((1 - expected).tolist(), rel=0.1)


def test_sums(device, with_float64):
    values = torch.randn(2, 5, dtype=torch.float64)
    assert_close(cumulative_sum(values.to(device)).cpu(), values.cumsum(-1), torch.float64)
