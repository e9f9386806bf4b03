"""Causal attention equals its formula, with gradients, whatever the sizes, the strides, the keys that are hidden and who computes it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.tolerances import NEGLIGIBLE, assert_close
from transxssm.ops import causal_attention
from transxssm.ops.causal_attention import has_attention_kernels
from transxssm.ops.csrc import launch

SCALING = 0.2
# One token, a block of 64 queries or 128 keys ± 1, several of them, primes; a head or many, shared keys.
SHAPES = [
    (1, 1, 1, 1, 32),
    (3, 2, 2, 5, 64),
    (1, 2, 1, 63, 32),
    (2, 4, 2, 64, 64),
    (1, 2, 2, 65, 96),
    (1, 3, 1, 127, 128),
    (1, 2, 2, 129, 64),
    (2, 6, 2, 331, 32),
]


def inputs(batch, heads, key_heads, length, head_dim, dtype=torch.bfloat16):
    """q, k, v and the output's gradient, laid out as projections give them."""
    shapes = [(batch, length, count, head_dim) for count in (heads, key_heads, key_heads, heads)]
    return [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]


def gradients(attend, q, k, v, grad):
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    output = attend(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, grad)


def formula(first_keys=None):
    def attend(q, k, v):
        q, k, v = q.double(), *(t.double().repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        places = torch.arange(q.shape[2])
        hidden = places > places[:, None]
        if first_keys is not None:
            hidden = (hidden | (places < first_keys[..., None]))[:, None]
        scores = (SCALING * q @ k.mT).masked_fill(hidden, -torch.inf)
        return scores.softmax(-1) @ v

    return attend


def ours(first_keys=None):
    return lambda q, k, v: causal_attention(q, k, v, first_keys, scaling=SCALING)


def assert_equals_the_formula(q, k, v, grad, first_keys=None):
    got = gradients(ours(first_keys), q, k, v, grad)
    expected = gradients(formula(first_keys), *(tensor.double() for tensor in (q, k, v, grad)))
    # The gradient of a score is a difference, with the product of a row's output and its gradient. Of few keys little is left of it
    # (of one key nothing), so that its error is held to a tenth of that product's part at least.
    products = (grad.double().norm(dim=-1) * expected[0].norm(dim=-1)).norm()
    sizes = {name: tensor.double().norm(dim=-1).mean() for name, tensor in (("q", k), ("k", q))}
    scales = {name: 0.1 * (SCALING * products * size).item() for name, size in sizes.items()}
    for name, actual, wanted in zip(("output", "q", "k", "v"), got, expected, strict=True):
        assert actual.dtype == q.dtype
        assert_close(actual, wanted, q.dtype, name, scales.get(name, NEGLIGIBLE))


def window(batch, length, size=37):
    return (torch.arange(length) - size + 1).clamp(min=0).int().expand(batch, -1)


def documents(batch, length):
    """Each row with boundaries of its own, some of them neighbours."""
    rows = []
    for _ in range(batch):
        begins = torch.zeros(length, dtype=torch.int32)
        places = torch.randint(0, length, (4,))
        begins[places] = places.int()
        rows.append(begins.cummax(0).values)
    return torch.stack(rows)


HIDDEN = {"nothing": lambda batch, length: None, "window": window, "documents": documents}


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("with_and_without_kernels")
def test_equals_the_formula(shape, hidden):
    assert_equals_the_formula(*inputs(*shape), HIDDEN[hidden](shape[0], shape[3]))


@given(
    batch=st.integers(1, 2),
    key_heads=st.integers(1, 2),
    per_key_head=st.integers(1, 3),
    length=st.integers(1, 300),
    head_dim=st.sampled_from([32, 64, 96, 128]),
    hidden=st.sampled_from(sorted(HIDDEN)),
)
def test_any_shape(batch, key_heads, per_key_head, length, head_dim, hidden):
    given_inputs = inputs(batch, key_heads * per_key_head, key_heads, length, head_dim)
    assert_equals_the_formula(*given_inputs, HIDDEN[hidden](batch, length))


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float32, 64), (torch.bfloat16, 40), (torch.float64, 8)], ids=str
)
def test_what_has_no_kernels_is_computed_all_the_same(dtype, head_dim):
    q, k, v, grad = inputs(2, 4, 2, 33, head_dim, dtype)
    assert not has_attention_kernels(q, k, v)
    assert_equals_the_formula(q, k, v, grad, documents(2, 33))


def test_any_strides():
    q, k, v, grad = inputs(2, 2, 2, 70, 64)
    expected = gradients(ours(), q, k, v, grad)
    for layout in (lambda t: t.contiguous(), lambda t: t.mT.contiguous().mT, lambda t: torch.cat((t, t), -1)[..., 64:]):
        for actual, wanted in zip(gradients(ours(), *map(layout, (q, k, v, grad))), expected, strict=True):
            assert_close(actual, wanted.double(), torch.bfloat16)


def test_what_is_hidden_does_not_matter():
    """To the last bit: a window's queries see the same keys whatever stands before and behind."""
    q, k, v, _ = inputs(1, 1, 1, 300, 64)
    output = ours(window(1, 300))(q, k, v)
    other_k, other_v = k.clone(), v.clone()
    other_k[:, :, 200:], other_v[:, :, 200:] = 7.0, 7.0
    assert torch.equal(ours(window(1, 300))(q, other_k, other_v)[:, :, :200], output[:, :, :200])
    other_k, other_v = k.clone(), v.clone()
    other_k[:, :, :163], other_v[:, :, :163] = 7.0, 7.0
    assert torch.equal(ours(window(1, 300))(q, other_k, other_v)[:, :, 199:], output[:, :, 199:])
    assert not torch.equal(ours()(q, k, v), output)


@pytest.mark.usefixtures("with_and_without_kernels")
def test_large_scores_overflow_nothing():
    q, k, v, grad = inputs(1, 2, 2, 150, 64)
    output, *grads = gradients(ours(), q * 30, k * 30, v, grad)
    assert_close(output, formula()(q * 30, k * 30, v), torch.bfloat16)
    assert all(each.isfinite().all() for each in grads)


def test_nan_is_seen():
    q, k, v, _ = inputs(1, 1, 1, 140, 32)
    k[0, 0, 70, 3] = torch.nan
    output = ours()(q, k, v)
    assert output[:, :, 70:].isnan().all()
    assert output[:, :, :64].isfinite().all()


def test_negative_first_keys_are_the_first_one():
    q, k, v, grad = inputs(1, 2, 2, 300, 64)
    unclamped = (torch.arange(300) - 199).int()[None]
    for actual, wanted in zip(
        gradients(ours(unclamped), q, k, v, grad), gradients(ours(unclamped.clamp(min=0)), q, k, v, grad), strict=True
    ):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("scaling", [0.0, -0.3])
def test_a_scaling_is_positive(scaling):
    with pytest.raises(ValueError, match="more than 0"):
        causal_attention(*inputs(1, 2, 2, 4, 64)[:3], scaling=scaling)


def test_gradients_of_one_input_alone_and_of_expanded_ones():
    q, k, v, _ = inputs(2, 2, 2, 40, 64)
    grad = torch.ones(()).bfloat16().expand(q.shape)
    _, *expected = gradients(formula(), q.double(), k.double(), v.double(), grad.double())
    for index, wanted in enumerate(expected):
        tensors = [q, k, v]
        tensors[index] = tensors[index].detach().requires_grad_()
        (actual,) = torch.autograd.grad(ours()(*tensors), tensors[index], grad)
        assert_close(actual, wanted, torch.bfloat16, scale=wanted.norm().item() or 1.0)
    shared = k[:, :1].expand(-1, 2, -1, -1)
    assert_close(ours()(q, shared, shared), formula()(q, shared, shared), torch.bfloat16)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_nothing_gives_nothing(batch, length):
    assert ours()(*inputs(batch, 2, 2, length, 64)[:3]).shape == (batch, 2, length, 64)


def test_a_graph_of_another_machine_is_refused(monkeypatch):
    """One that was compiled where there are kernels, and runs where there are none."""
    monkeypatch.setattr(launch, "compiled_library", lambda: None)
    q, k, v, _ = inputs(1, 4, 2, 70, 64)
    with pytest.raises(RuntimeError, match="compile it again on this machine"):
        torch.ops.transxssm.causal_attention(q, k, v, None, SCALING)


def test_threads_change_nothing():
    given_inputs = inputs(2, 3, 3, 200, 64)
    expected = gradients(ours(), *given_inputs)
    torch.set_num_threads(2)
    try:
        again = gradients(ours(), *given_inputs)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(expected, again, strict=True))


def test_is_an_operator_that_compiles_whole():
    q, k, v, grad = inputs(1, 4, 2, 70, 64)
    if not has_attention_kernels(q, k, v):
        pytest.skip("no attention kernels here")
    compiled = torch.compile(ours(), fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(gradients(compiled, q, k, v, grad), gradients(ours(), q, k, v, grad), strict=True):
        assert torch.equal(actual, wanted)
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    torch.library.opcheck(torch.ops.transxssm.causal_attention, (*leaves, None, SCALING))
    torch.library.opcheck(torch.ops.transxssm.causal_attention, (*leaves, window(1, 70).contiguous(), SCALING))


def test_agrees_with_torch():
    q, k, v, _ = inputs(1, 2, 2, 90, 64, torch.float32)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALING)
    assert_close(ours()(q, k, v), expected, torch.float32)


@pytest.mark.parametrize(
    ("shapes", "first", "message"),
    [
        (((1, 2, 3, 32), (1, 2, 4, 32), (1, 2, 4, 32)), None, "expected q"),
        (((1, 3, 3, 32), (1, 2, 3, 32), (1, 2, 3, 32)), None, "multiple"),
        (((1, 2, 3, 32), (1, 2, 3, 32), (1, 2, 3, 64)), None, "expected q"),
        (((1, 2, 3, 32), (1, 2, 3, 32), (1, 2, 3, 32)), (1, 4), "first_keys"),
    ],
)
def test_shapes_that_do_not_fit(shapes, first, message):
    q, k, v = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        causal_attention(q, k, v, None if first is None else torch.zeros(first, dtype=torch.int32), scaling=1.0)
