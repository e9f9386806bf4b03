"""The loss without the full logits equals the loss with them, gradients included."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.tolerances import assert_close
from transxssm.ops import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("with_and_without_kernels")

REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum"])
VOCABULARY = 11


def inputs(num_tokens: int, dtype=torch.float64, device=None, ignored: float = 0.3):
    """hidden (n, 5), weight (11, 5), labels (n,) of which about `ignored` are −100."""
    hidden = torch.randn(num_tokens, 5, dtype=torch.float64).to(device, dtype)
    weight = torch.randn(VOCABULARY, 5, dtype=torch.float64).to(device, dtype)
    labels = torch.randint(VOCABULARY, (num_tokens,))
    labels[torch.rand(num_tokens) < ignored] = -100
    labels[:1] = 3  # at least one counts
    return hidden, weight, labels.to(device)


def full_logits(hidden, weight, labels, **options):
    """The loss as torch computes it, in float64."""
    return F.cross_entropy(hidden.double() @ weight.double().T, labels, **options)


def loss_and_gradients(function, hidden, weight, labels, **options):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(hidden, weight, labels, **options)
    # 1.75 and not 1: the gradient that comes in has to be applied.
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight), torch.full_like(loss, 1.75))


def assert_equals_full_logits(hidden, weight, labels, **options):
    actual = loss_and_gradients(linear_cross_entropy, hidden, weight, labels, **options)
    expected = loss_and_gradients(full_logits, hidden, weight, labels, **options)
    for name, one, other in zip(("loss", "gradient of hidden", "gradient of weight"), actual, expected, strict=True):
        assert_close(one, other, hidden.dtype, name)


@pytest.fixture
def blocks_of(monkeypatch, device):
    """Makes the loss work on blocks of this many tokens, so that a few tokens are many blocks."""

    def set_block(num_tokens: int) -> None:
        # By its path: the attribute `linear_cross_entropy` of `transxssm.ops` is the function.
        module = sys.modules["transxssm.ops.linear_cross_entropy"]
        monkeypatch.setitem(module._LOGITS_PER_BLOCK, device.type, num_tokens * VOCABULARY)

    return set_block


@REDUCTIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 16, 97])
def test_equals_the_loss_of_the_full_logits(num_tokens, dtype, reduction, device, blocks_of):
    blocks_of(8)
    assert_equals_full_logits(*inputs(num_tokens, dtype, device), reduction=reduction)


@pytest.mark.parametrize("fast", [True, False], ids=["products in hardware", "no products in hardware"])
def test_half_operands_on_any_cpu(fast, device, monkeypatch):
    monkeypatch.setattr(sys.modules["transxssm.ops.linear_cross_entropy"], "has_fast_products", lambda *_: fast)
    assert_equals_full_logits(*inputs(97, torch.bfloat16, device))


@pytest.mark.parametrize("fast", [True, False], ids=["products in hardware", "no products in hardware"])
@pytest.mark.parametrize("elements", [1, 2 * VOCABULARY, 5 * VOCABULARY + 3])
def test_half_logits_raised_in_any_parts(elements, fast, device, blocks_of, monkeypatch):
    blocks_of(8)
    monkeypatch.setattr(sys.modules["transxssm.ops.linear_cross_entropy"], "has_fast_products", lambda *_: fast)
    monkeypatch.setattr("transxssm.ops.devices.ELEMENTS_PER_BLOCK", elements)
    assert_equals_full_logits(*inputs(97, torch.bfloat16, device))


@REDUCTIONS
@pytest.mark.parametrize("block", [1, 2, 96, 97, 98, 1000])
def test_any_block(block, reduction, device, blocks_of):
    blocks_of(block)
    assert_equals_full_logits(*inputs(97, device=device), reduction=reduction)


def test_a_vocabulary_larger_than_a_block(device, monkeypatch):
    monkeypatch.setitem(sys.modules["transxssm.ops.linear_cross_entropy"]._LOGITS_PER_BLOCK, device.type, 1)
    assert_equals_full_logits(*inputs(5, device=device))


@REDUCTIONS
def test_ignored_tokens_do_not_count(reduction, device):
    """Neither in the loss, nor in its mean, nor in a gradient; any label can be the ignored one."""
    hidden, weight, labels = inputs(20, device=device)
    assert_equals_full_logits(
        hidden, weight, labels.masked_fill(labels == -100, 2), ignore_index=2, reduction=reduction
    )
    counted = labels != -100
    only = loss_and_gradients(linear_cross_entropy, hidden[counted], weight, labels[counted], reduction=reduction)
    among = loss_and_gradients(linear_cross_entropy, hidden, weight, labels, reduction=reduction)
    assert_close(among[0], only[0], torch.float64)
    assert_close(among[1][counted], only[1], torch.float64)
    assert not among[1][~counted].any()
    assert_close(among[2], only[2], torch.float64)


@REDUCTIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("few", [0.0, 1.1], ids=["all tokens computed", "counting tokens alone"])
def test_counting_tokens_alone_give_the_same(few, dtype, reduction, device, monkeypatch):
    monkeypatch.setattr(sys.modules["transxssm.ops.linear_cross_entropy"], "_FEW_SHARE", few)
    assert_equals_full_logits(*inputs(97, dtype, device), reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("label", [-1, VOCABULARY])
def test_a_label_outside_the_vocabulary_is_refused(label, dtype, device):
    if device.type != "cpu":
        pytest.skip("a GPU reports it at its next synchronisation, and is lost then")
    hidden, weight, labels = inputs(6, dtype, device)
    labels[4] = label
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, labels)


def test_a_sum_of_nothing_is_zero(device):
    hidden, weight, _ = inputs(6, device=device)
    labels = torch.full((6,), -100, device=device)
    loss, *gradients = loss_and_gradients(linear_cross_entropy, hidden, weight, labels, reduction="sum")
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


def test_a_mean_of_nothing_is_nan_as_in_torch(device):
    hidden, weight, _ = inputs(6, device=device)
    labels = torch.full((6,), -100, device=device)
    assert linear_cross_entropy(hidden, weight, labels).isnan()
    assert full_logits(hidden, weight, labels).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits_stay_finite(dtype, device):
    hidden, weight, labels = inputs(20, dtype, device)
    results = loss_and_gradients(linear_cross_entropy, 1000 * hidden, weight, labels)
    assert all(result.isfinite().all() for result in results)
    assert_equals_full_logits(1000 * hidden, weight, labels)


@given(
    num_tokens=st.integers(1, 40), ignored=st.sampled_from([0.0, 0.5, 0.95]), reduction=st.sampled_from(["mean", "sum"])
)
def test_any_mixture_of_labels(num_tokens, ignored, reduction, device):
    assert_equals_full_logits(*inputs(num_tokens, device=device, ignored=ignored), reduction=reduction)


def test_gradients_against_finite_differences(device):
    hidden, weight, labels = inputs(4, device=device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda hidden, weight: linear_cross_entropy(hidden, weight, labels), leaves)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_factor_may_be_frozen(frozen, device):
    """A frozen head passes gradients on; a frozen body still trains its head."""
    hidden, weight, labels = inputs(9, device=device)
    trained = weight if frozen == "hidden" else hidden
    trained.requires_grad_()
    (actual,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), trained)
    (expected,) = torch.autograd.grad(full_logits(hidden, weight, labels), trained)
    assert_close(actual, expected, torch.float64)


def test_without_gradients_it_is_the_same_loss(device):
    hidden, weight, labels = inputs(9, device=device)
    with torch.no_grad():
        assert_close(linear_cross_entropy(hidden, weight, labels), full_logits(hidden, weight, labels), torch.float64)


def test_products_take_autocast_precision_and_the_loss_stays_float32(device):
    hidden, weight, labels = inputs(50, torch.float32, device)

    def under_autocast(hidden, weight, labels):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return linear_cross_entropy(hidden, weight, labels)

    actual = loss_and_gradients(under_autocast, hidden, weight, labels)
    assert [result.dtype for result in actual] == [torch.float32] * 3
    rounded = loss_and_gradients(full_logits, hidden.bfloat16(), weight.bfloat16(), labels)
    for one, other in zip(actual, rounded, strict=True):
        assert_close(one, other, torch.bfloat16)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 5), (11, 5), (6,)), r"got \(2, 3, 5\), \(11, 5\) and \(6,\)"),
        (((6, 5), (11, 4), (6,)), r"got \(6, 5\), \(11, 4\) and \(6,\)"),
        (((6, 5), (11, 5), (5,)), r"got \(6, 5\), \(11, 5\) and \(5,\)"),
    ],
)
def test_wrong_shapes_are_named(shapes, message):
    hidden, weight, labels = shapes
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(torch.zeros(hidden), torch.zeros(weight), torch.zeros(labels, dtype=torch.int64))


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match='"mean" or "sum": got \'none\''):
        linear_cross_entropy(*inputs(3), reduction="none")


def test_compiles_once_for_lengths_that_are_alike(blocks_of):
    """A graph for one block of tokens, for up to two and for up to four; not one for every length."""
    blocks_of(1)  # 160 tokens, the least
    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(
        linear_cross_entropy, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for num_tokens, most in ((3, 1), (159, 1), (161, 2), (318, 2), (331, 3), (500, 3), (640, 3)):
        hidden, weight, labels = inputs(num_tokens)
        actual = loss_and_gradients(compiled, hidden, weight, labels)
        expected = loss_and_gradients(full_logits, hidden, weight, labels)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other, torch.float64)
        assert len(graphs) <= most, f"{num_tokens} tokens"
