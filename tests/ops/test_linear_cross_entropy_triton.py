"""The GPU's kernel of the loss is torch's cross-entropy and its gradient."""

import pytest
import torch
import torch.nn.functional as F

from tests.gpu_kernels import DTYPES, TOLERANCE, counted
from tests.tolerances import assert_close
from transxssm.ops import linear_cross_entropy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 50, 4096, 4100])
def test_loss_and_gradient_of_logits(vocabulary, dtype, device, kernels):
    logits = (3 * torch.randn(5, vocabulary, device=device)).to(dtype)
    labels = torch.randint(vocabulary, (5,), device=device)
    labels[2] = -100
    leaf = logits.float().requires_grad_()
    expected = F.cross_entropy(leaf, labels, reduction="none")
    expected.sum().backward()
    losses = kernels.cross_entropy.cross_entropy_over_logits(logits, labels, -100, differentiate=True)
    assert_close(losses, expected, torch.float32, "losses", scale=1.0)
    assert_close(logits, leaf.grad, TOLERANCE[dtype], "gradient", scale=1.0)


def test_logits_stay_as_they_are_without_a_gradient(device, kernels):
    logits = torch.randn(3, 7, device=device)
    before = logits.clone()
    kernels.cross_entropy.cross_entropy_over_logits(
        logits, torch.zeros(3, dtype=torch.long, device=device), -1, differentiate=False
    )
    assert torch.equal(logits, before)


@pytest.mark.parametrize("label", [-1, 7, 10**9])
def test_a_label_beyond_the_vocabulary_gives_nan(label, device, kernels):
    labels = torch.tensor([0, label], device=device)
    losses = kernels.cross_entropy.cross_entropy_over_logits(
        torch.zeros(2, 7, device=device), labels, -100, differentiate=True
    )
    assert losses.isnan().tolist() == [False, True]


@pytest.mark.parametrize("block", [1, 2**28], ids=["several blocks", "one block"])
def test_the_head_with_its_loss(block, device, kernels, monkeypatch):
    monkeypatch.setitem(linear_cross_entropy.__globals__["_LOGITS_PER_BLOCK"], device.type, block)
    monkeypatch.setitem(linear_cross_entropy.__globals__, "_MIN_TOKENS_PER_BLOCK", 4)
    calls = counted(monkeypatch, kernels.cross_entropy, "cross_entropy_over_logits")
    hidden, weight = torch.randn(10, 6, device=device), torch.randn(9, 6, device=device)
    labels = torch.randint(9, (10,), device=device)
    leaves = [(hidden.clone().requires_grad_(), weight.clone().requires_grad_()) for _ in range(2)]
    loss = linear_cross_entropy(*leaves[0], labels)
    expected = F.cross_entropy(leaves[1][0] @ leaves[1][1].T, labels)
    (3 * loss).backward()
    (3 * expected).backward()
    assert len(calls) == (3 if block == 1 else 1)
    assert_close(loss, expected, torch.float32)
    for actual, wanted in zip(*leaves, strict=True):
        assert_close(actual.grad, wanted.grad, torch.float32)
