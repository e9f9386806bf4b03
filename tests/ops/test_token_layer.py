"""The two sides of a layer around its mixer equal their formulas, in one call and in torch's operations."""

import pytest
import torch
import torch.nn.functional as F

from tests.tolerances import assert_close
from transxssm.ops import explain, layer_end, layer_start

EPS = 1e-5
MIXED, WIDTH, INNER = 22, 37, 70


def normed(x, norm):
    return F.rms_norm(x, x.shape[-1:], norm, EPS)


def start_inputs(tokens, dtype, num_weights=3, width=WIDTH):
    x, norm = torch.randn(*tokens, width), 1 + 0.1 * torch.randn(width)
    weights = [torch.randn(1 + 9 * index, width) for index in range(num_weights)]
    return x.to(dtype), norm.to(dtype), tuple(each.to(dtype) for each in weights)


def end_inputs(tokens, dtype, width=WIDTH):
    mixed, residual, norm = torch.randn(*tokens, MIXED), torch.randn(*tokens, width), 1 + 0.1 * torch.randn(width)
    shapes = (width, MIXED), (INNER, width), (INNER, width), (width, INNER)
    output, gate, up, down = (torch.randn(shape) / shape[1] ** 0.5 for shape in shapes)
    return [each.to(dtype) for each in (mixed, residual, output, norm)], [each.to(dtype) for each in (gate, up, down)]


def end_formula(mixed, residual, output, norm, gate, up, down):
    hidden = residual + mixed @ output.T
    n = normed(hidden, norm)
    return hidden + (F.silu(n @ gate.T) * (n @ up.T)) @ down.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "num_weights", "width"), [((1, 1), 1, 64), ((2, 2), 5, 37), ((4,), 3, 200), ((3, 2), 6, 8)], ids=str
)
@pytest.mark.usefixtures("with_and_without_kernels")
def test_the_start_equals_its_formula(tokens, num_weights, width, dtype):
    x, norm, weights = start_inputs(tokens, dtype, num_weights, width)
    expected = [normed(x.double(), norm.double()) @ weight.double().T for weight in weights]
    for given in (x, x.mT.contiguous().mT):
        outputs = layer_start(given, norm, EPS, weights)
        for index, (one, other) in enumerate(zip(outputs, expected, strict=True)):
            assert one.dtype == dtype
            assert_close(one, other, dtype, f"product {index}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [(1, 1), (2, 2), (3,), (5, 1)], ids=str)
@pytest.mark.usefixtures("with_and_without_kernels")
def test_the_end_equals_its_formula(tokens, dtype):
    before, ffn = end_inputs(tokens, dtype)
    expected = end_formula(*(each.double() for each in (*before, *ffn)))
    output = layer_end(*before, EPS, *ffn)
    assert output.dtype == dtype
    assert_close(output, expected, dtype)
    apart = [each.mT.contiguous().mT for each in before[:2]]
    assert_close(layer_end(*apart, *before[2:], EPS, *ffn), expected, dtype)


def test_the_number_of_threads_changes_nothing():
    """Of weights that are large enough for two."""
    start, (before, ffn) = start_inputs((2,), torch.bfloat16, 4, 4096), end_inputs((2,), torch.bfloat16, 600)
    outputs, threads = [], torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            outputs.append((*layer_start(*start[:2], EPS, start[2]), layer_end(*before, EPS, *ffn)))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *outputs))


def test_what_they_take():
    x, norm, weights = start_inputs((1, 4), torch.bfloat16)
    kernel = explain(layer_start, x, norm, EPS, weights).refusals["cpp"]
    assert kernel is None or "C++" in kernel
    for given, reason in (
        ((x.expand(2, 4, WIDTH), norm, EPS, weights), "1 to 4 tokens"),
        ((x, norm.float(), EPS, weights), "weights of x's dtype"),
        ((x, norm, EPS, (weights[1].T.contiguous().T,)), "contiguous weights"),
        ((x, norm, EPS, weights * 2), "up to 5 weights"),
        ([x.double(), norm.double(), EPS, [each.double() for each in weights]], "float32 and bfloat16"),
    ):
        assert reason in explain(layer_start, *given).refusals["cpp"]
    before, ffn = end_inputs((5,), torch.bfloat16)
    assert "1 to 4 tokens" in explain(layer_end, *before, EPS, *ffn).refusals["cpp"]
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in explain(layer_start, x, norm, EPS, weights).refusals["cpp"]


def test_shapes_that_do_not_fit_are_refused():
    x, norm, weights = start_inputs((1,), torch.float32)
    with pytest.raises(ValueError, match=r"expected x \(…, i\), norm \(i,\) and weights \(o, i\): got \[\(1, 37\)"):
        layer_start(x, norm[1:], EPS, weights)
    with pytest.raises(ValueError, match=r"weights \(o, i\)"):
        layer_start(x, norm, EPS, (*weights, weights[0].T))
    before, ffn = end_inputs((1,), torch.float32)
    with pytest.raises(ValueError, match=r"expected \(…, m\), \(…, i\) and weights \(i, m\)"):
        layer_end(*before, EPS, ffn[0], ffn[1][1:], ffn[2])
    with pytest.raises(ValueError, match=r"expected \(…, m\)"):
        layer_end(before[0][:, 1:], *before[1:], EPS, *ffn)
