"""The short convolution, with its SiLU, equals torch's on one document, and keeps the laws of documents, pads and splits."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tolerances import assert_close
from transxssm.ops import explain, short_convolution, short_convolution_

CHANNELS = 3


@pytest.fixture(autouse=True, scope="module", params=[1, 10**9], ids=["operator", "taps"])
def way(request):
    """Every law in either way to compute it, whatever the length."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["transxssm.ops.short_convolution"], "SHORTEST_FOR_OPERATOR", request.param)
        yield


PROMISES = ("test_schema", "test_faketensor")
KERNELS = pytest.mark.parametrize("kernel", [1, 2, 4])


def inputs(length: int, kernel: int, dtype=torch.float64, device=None, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """x (b, t, e), weight (e, k) and an initial state (b, k−1, e)."""
    tensors = (
        torch.randn(batch, length, CHANNELS, dtype=torch.float64),
        torch.randn(CHANNELS, kernel, dtype=torch.float64),
        torch.randn(batch, kernel - 1, CHANNELS, dtype=torch.float64),
    )
    return tuple(tensor.to(device, dtype) for tensor in tensors)


def assert_equal_results(actual, expected, tensors, dtype) -> None:
    """Values and gradients of two functions of the same tensors that give (y, state)."""
    results = []
    for function in (actual, expected):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        outputs = function(*leaves)
        generator = torch.Generator().manual_seed(1)
        incoming = [torch.randn(*o.shape, generator=generator).to(o) for o in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, incoming, materialize_grads=True)])
    names = ["y", "state", *(f"gradient {number}" for number in range(len(tensors)))]
    for name, one, other in zip(names, *results, strict=True):
        assert_close(one, other, dtype, name)


@KERNELS
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 97])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_conv1d_of_torch(kernel, length, dtype, device):
    def by_torch(x, weight):
        left_padded = F.pad(x.transpose(1, 2), (kernel - 1, 0))
        y = F.conv1d(left_padded, weight[:, None], groups=CHANNELS).transpose(1, 2)
        return F.silu(y), left_padded.transpose(1, 2)[:, length:]

    x, weight, _ = inputs(length, kernel, dtype, device)
    if dtype == torch.bfloat16:  # the same numbers, summed in float64
        y, state = short_convolution(x, weight)
        wanted_y, wanted_state = by_torch(x.double(), weight.double())
        assert y.dtype == dtype
        assert_close(y, wanted_y, dtype, "y")
        assert torch.equal(state.double(), wanted_state)
    else:
        # In float64 on the other side: on a GPU, torch's own float32 convolutions may round to TF32.
        assert_equal_results(
            short_convolution, lambda x, weight: by_torch(x.double(), weight.double()), (x, weight), dtype
        )


@KERNELS
def test_pieces_are_one_at_every_split(kernel, device):
    def whole(x, weight, state):
        return short_convolution(x, weight, initial_state=state)

    length = 9
    for split in range(1, length):

        def pieces(x, weight, state, at=split):
            first, state = short_convolution(x[:, :at], weight, initial_state=state)
            second, state = short_convolution(x[:, at:], weight, initial_state=state)
            return torch.cat((first, second), dim=1), state

        assert_equal_results(pieces, whole, inputs(length, kernel, device=device), torch.float64)


@KERNELS
def test_one_token_at_a_time_is_one_call(kernel, device):
    x, weight, state = inputs(9, kernel, device=device)
    wanted, wanted_state = short_convolution(x, weight, initial_state=state)
    outputs = []
    for t in range(9):
        y, state = short_convolution(x[:, t : t + 1], weight, initial_state=state)
        outputs.append(y)
    assert_close(torch.cat(outputs, dim=1), wanted, torch.float64, "y")
    assert_close(state, wanted_state, torch.float64, "state")


@given(documents=st.lists(st.integers(1, 6), min_size=1, max_size=6), kernel=st.integers(1, 5))
def test_packed_documents_are_separate_ones(documents, kernel, device):
    """The initial state enters the first document only, and the state left behind is the last document's."""
    numbers = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents)).expand(2, -1).to(device)

    def packed(x, weight, state):
        return short_convolution(x, weight, initial_state=state, seq_idx=numbers)

    def separate(x, weight, state):
        outputs = []
        for start, stop in itertools.pairwise(itertools.accumulate(documents, initial=0)):
            y, state_after = short_convolution(x[:, start:stop], weight, initial_state=state)
            outputs.append(y)
            state = torch.zeros_like(state)
        return torch.cat(outputs, dim=1), state_after

    assert_equal_results(packed, separate, inputs(sum(documents), kernel, device=device), torch.float64)


@pytest.mark.parametrize("documents", [(9,), (4, 1, 4)], ids=str)
def test_a_bias_is_added_before_the_silu(documents, device):
    x, weight, _ = inputs(9, 3, device=device)
    bias = torch.randn(CHANNELS, dtype=torch.float64, device=device)
    numbers = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents)).expand(2, -1).to(device)

    def by_torch(x, weight, bias):
        pieces = []
        for piece in x.split(documents, dim=1):
            left_padded = F.pad(piece.transpose(1, 2), (2, 0))
            pieces.append(F.conv1d(left_padded, weight[:, None], bias, groups=CHANNELS).transpose(1, 2))
        last = F.pad(x.split(documents, dim=1)[-1], (0, 0, 2, 0))[:, -2:]
        return F.silu(torch.cat(pieces, dim=1)), last

    def ours(x, weight, bias):
        return short_convolution(x, weight, bias=bias, seq_idx=numbers)

    assert_equal_results(ours, by_torch, (x, weight, bias), torch.float64)


@pytest.mark.parametrize("fast", [True, False], ids=["products in hardware", "no products in hardware"])
def test_documents_in_half_precision(fast, monkeypatch):
    """On any CPU, and under autocast, which the operator leaves alone."""
    monkeypatch.setattr(sys.modules["transxssm.ops.short_convolution"], "has_fast_products", lambda *_: fast)
    x, weight, _ = inputs(40, 4, torch.bfloat16)
    numbers = torch.arange(4).repeat_interleave(10).expand(2, -1)
    results = {}
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, _ = short_convolution(*leaves, seq_idx=numbers)
        results[dtype] = (y, *torch.autograd.grad(y, leaves, torch.ones_like(y)))
    for name, one, other in zip(("y", "x", "weight"), *results.values(), strict=True):
        assert_close(one, other, torch.bfloat16, name, num_ops=2)


def test_autocast_leaves_float32_alone():
    x, weight, _ = inputs(40, 4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = short_convolution(x, weight)
    assert_close(y, short_convolution(x.double(), weight.double())[0], torch.float32)


@pytest.mark.parametrize("packed", [False, True])
def test_keeps_what_an_operator_promises(packed):
    """Shapes, strides, aliasing and autograd as `torch.compile` relies on them."""
    module = sys.modules["transxssm.ops.short_convolution"]
    history, weight, bias = torch.randn(2, 12, 8), torch.randn(8, 4), torch.randn(8)
    documents = torch.arange(2).repeat_interleave(6).expand(2, -1).contiguous() if packed else None
    leaves = [tensor.requires_grad_() for tensor in (history, weight, bias)]
    grad = torch.randn(2, 9, 8)
    detached = [leaf.detach() for leaf in leaves]
    for activation in ("silu", None):
        torch.library.opcheck(module._convolution, (*leaves, documents, activation))
        torch.library.opcheck(
            module._convolution_backward, (grad, *detached, documents, activation), test_utils=PROMISES
        )


@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
def test_without_an_activation_it_is_the_sum_itself(packed, device):
    """Values and gradients: silu of what it gives is what it gives with the activation."""
    numbers = torch.tensor([[0] * 5 + [1] * 2 + [2] * 6], device=device).expand(2, -1) if packed else None

    def silu_outside(x, weight, state):
        y, new_state = short_convolution(x, weight, initial_state=state, seq_idx=numbers, activation=None)
        return F.silu(y), new_state

    def silu_inside(x, weight, state):
        return short_convolution(x, weight, initial_state=state, seq_idx=numbers)

    assert_equal_results(silu_outside, silu_inside, inputs(13, 4, device=device), torch.float64)


@given(left=st.integers(0, 6), right=st.integers(0, 6), kernel=st.integers(1, 5), length=st.integers(1, 7))
def test_pads_leave_no_trace(left, right, kernel, length, device):
    """Whatever stands at the pads: the tokens see zeros before them, and the state is the tokens' own."""
    mask = F.pad(torch.ones(2, length, device=device), (left, right))

    def padded(x, weight):
        with_pads = F.pad(x, (0, 0, left, right), value=7.0)
        y, state = short_convolution(with_pads, weight, mask=mask)
        return y[:, left : left + length], state

    x, weight, _ = inputs(length, kernel, device=device)
    assert_equal_results(padded, short_convolution, (x, weight), torch.float64)


@given(
    patterns=st.lists(st.integers(0, 1), min_size=9, max_size=9).map(lambda row: [row, row[::-1]]),
    kernel=st.integers(1, 5),
    boundary=st.integers(0, 9),
    is_looked_at=st.booleans(),
)
def test_pads_between_tokens_leave_no_trace(patterns, kernel, boundary, is_looked_at, device):
    """Each row is that of its tokens alone, whatever documents they are of, behind a state; pads are numbered as they come."""
    mask = torch.tensor(patterns, device=device)
    numbers = (torch.arange(9, device=device) >= boundary).long().expand(2, -1)

    def padded(x, weight, state):
        with_pads = torch.where(mask[..., None].bool(), x, 7.0)
        with pytest.MonkeyPatch.context() as patch:
            if not is_looked_at:
                patch.setattr(sys.modules["transxssm.ops.short_convolution"], "is_watched", lambda: True)
            y, after = short_convolution(with_pads, weight, initial_state=state, mask=mask, seq_idx=numbers)
        return y[mask.bool()], after

    def alone(x, weight, state):
        outputs, after = [], []
        for row, real in enumerate(mask.bool()):
            one = {"initial_state": state[row : row + 1], "seq_idx": numbers[row : row + 1, real]}
            y, s = x[:1, :0] * weight.sum(), one["initial_state"]
            if real.any():
                y, s = short_convolution(x[row : row + 1, real], weight, **one)
            outputs.append(y[0])
            after.append(s)
        return torch.cat(outputs), torch.cat(after)

    assert_equal_results(padded, alone, inputs(9, kernel, device=device), torch.float64)


@KERNELS
def test_rows_may_be_padded_differently(kernel, device):
    x, weight, _ = inputs(7, kernel, device=device)
    lengths = (7, 3)
    mask = torch.tensor([[1] * 7, [0] * 4 + [1] * 3], device=device)
    y, state = short_convolution(x, weight, mask=mask)
    for row, length in enumerate(lengths):
        wanted_y, wanted_state = short_convolution(x[row : row + 1, 7 - length :], weight)
        assert_close(y[row : row + 1, 7 - length :], wanted_y, torch.float64, "y")
        assert_close(state[row : row + 1], wanted_state, torch.float64, "state")


@KERNELS
def test_a_row_of_right_pads_keeps_its_state(kernel, device):
    """A batch of prompts fed in pieces: where a row has ended, its state waits for what comes next."""
    x, weight, state = inputs(4, kernel, device=device)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]], device=device)
    _, after = short_convolution(x, weight, initial_state=state, mask=mask)
    assert torch.equal(after[1], state[1])


@pytest.mark.parametrize("kernel", [2, 4])
def test_left_pads_do_not_part_a_state_from_its_tokens(kernel, device):
    """A second turn, padded on the left to the batch's longest, still continues the row's first turn."""

    def padded(x, weight, state):
        mask = F.pad(torch.ones(2, 5, device=device), (3, 0))
        y, state = short_convolution(F.pad(x, (0, 0, 3, 0)), weight, initial_state=state, mask=mask)
        return y[:, 3:], state

    def plain(x, weight, state):
        return short_convolution(x, weight, initial_state=state)

    assert_equal_results(padded, plain, inputs(5, kernel, device=device), torch.float64)


def test_a_state_does_not_hold_the_row(device):
    state = short_convolution(torch.randn(2, 99, 8, device=device), torch.randn(8, 4, device=device))[1]
    assert state.untyped_storage().nbytes() == state.nbytes


SEQUENCES = pytest.mark.parametrize("lengths", [(1, 1, 1), (5, 1, 19), (20,)], ids=str)


def sequences_in_a_row(lengths, kernel, dtype=torch.float64, device=None):
    """x of one row, the weight, an earlier state of each sequence, and where they begin and end."""
    x, weight, _ = inputs(sum(lengths), kernel, dtype, device, batch=1)
    states = inputs(1, kernel, dtype, device, batch=len(lengths))[2]
    return x, weight, states, torch.tensor([0, *itertools.accumulate(lengths)])


@SEQUENCES
@KERNELS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sequences_in_a_row_are_one_call_each(dtype, kernel, lengths, device):
    x, weight, states, cu_seqlens = sequences_in_a_row(lengths, kernel, dtype, device)

    def in_a_row(x, weight, states):
        return short_convolution(x, weight, initial_state=states, cu_seqlens=cu_seqlens)

    def one_call_each(x, weight, states):
        pieces = zip(x.split(lengths, dim=1), states.split(1), strict=True)
        results = [short_convolution(piece, weight, initial_state=state) for piece, state in pieces]
        return torch.cat([y for y, _ in results], dim=1), torch.cat([state for _, state in results])

    assert_equal_results(in_a_row, one_call_each, (x, weight, states), dtype)
    as_they_are, _ = short_convolution(x, weight, initial_state=states, cu_seqlens=cu_seqlens, activation=None)
    assert_close(F.silu(as_they_are), in_a_row(x, weight, states)[0], dtype)
    y, after = short_convolution(x, weight, cu_seqlens=cu_seqlens)
    from_zero = short_convolution(x, weight, initial_state=torch.zeros_like(states), cu_seqlens=cu_seqlens)
    assert torch.equal(y, from_zero[0])
    assert torch.equal(after, from_zero[1])


@SEQUENCES
@KERNELS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_states_are_read_from_slots_and_written_to_them(index_dtype, dtype, kernel, lengths, device):
    """Slots lie apart; one sequence begins anew, whatever its slot holds; what is not named stays as it is, bit by bit."""
    x, weight, states, cu_seqlens = sequences_in_a_row(lengths, kernel, dtype, device)
    bias, named = torch.randn(CHANNELS, dtype=dtype, device=device), [4, 0, 3][: len(lengths)]
    indices, going_on = torch.tensor(named, dtype=index_dtype, device=device), torch.tensor([True, False, True])
    memory = torch.full((6, states[0].numel() + 5), torch.nan, dtype=dtype, device=device)
    cache = memory[:, :-5].unflatten(1, states.shape[1:])
    cache[named] = states
    has_state = going_on[: len(lengths)].to(device)
    cache[named[1:2]] = torch.nan  # that of the sequence that begins anew
    expected_y, expected_states = short_convolution(
        x, weight, bias=bias, initial_state=states * has_state[:, None, None], cu_seqlens=cu_seqlens
    )
    before, options = memory.clone(), {"bias": bias, "cu_seqlens": cu_seqlens, "has_initial_state": has_state}
    y = short_convolution_(cache, x, weight, state_indices=indices, **options)
    assert_close(y, expected_y, dtype, "y")
    assert torch.equal(cache[named], expected_states)
    before[:, :-5].unflatten(1, states.shape[1:])[named] = cache[named]
    assert torch.equal(memory.nan_to_num(99.0), before.nan_to_num(99.0))


@KERNELS
@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_of_each_row_goes_on_from_its_slot(dtype, has_bias, backend, kernel, device):
    """x is a view into a projection, as in a model."""
    x, weight, states = inputs(1, kernel, dtype, device, batch=3)
    bias = torch.randn(CHANNELS, dtype=dtype, device=device) if has_bias else None
    wide = torch.randn(3, 1, CHANNELS + 2, device=device).to(dtype)
    wide[..., :CHANNELS] = x
    x, named = wide[..., :CHANNELS], torch.tensor([5, 1, 2], device=device)
    memory = torch.randn(6, states[0].numel() + 5, device=device).to(dtype)
    cache = memory[:, :-5].unflatten(1, states.shape[1:])
    cache[named] = states
    before = memory.clone()
    options = {"state_indices": named, "bias": bias}
    choice = explain(short_convolution_, cache, x, weight, **options)
    if choice.refusals[backend] is not None:
        pytest.skip(choice.refusals[backend])
    expected_y, expected_states = short_convolution(x, weight, bias=bias, initial_state=states)
    assert_close(short_convolution_(cache, x, weight, **options, backend=backend), expected_y, dtype, "y")
    assert torch.equal(cache[named], expected_states)
    before[:, :-5].unflatten(1, states.shape[1:])[named] = cache[named]
    assert torch.equal(memory, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_indices": torch.tensor([1, 1])}, "none twice: got slot 1"),
        ({"state_indices": torch.tensor([1, 6])}, "slots 0 … 5: got 6"),
        ({"cu_seqlens": torch.tensor([0, 9])}, r"state_indices must be \(1,\)"),
        ({"cu_seqlens": torch.tensor([0, 4, 8])}, "increase from 0 to the number of tokens, 9"),
        ({"state": torch.zeros(6, 2, CHANNELS)}, r"state must have shape \(slots, 3, 3\): got \(6, 2, 3\)"),
        ({"has_initial_state": torch.tensor([True])}, r"has_initial_state must be \(2,\) bool"),
        ({"backend": "cpp"}, "'cpp': it is for one token of each row"),
        ({"weight": torch.ones(CHANNELS, 4, requires_grad=True)}, "written in place has no gradients"),
    ],
)
def test_slots_that_do_not_fit_are_refused(changes, message):
    x, weight, _ = inputs(9, 4, torch.float32, batch=1)
    given = {"state": torch.randn(6, 3, CHANNELS), "x": x, "weight": weight} | {
        "state_indices": torch.tensor([1, 2]),
        "cu_seqlens": torch.tensor([0, 4, 9]),
    }
    state = given["state"].clone()
    with pytest.raises(ValueError, match=message):
        short_convolution_(**(given | changes))
    assert torch.equal(given["state"], state)


@pytest.mark.parametrize("option", ["seq_idx", "mask"])
def test_sequences_have_neither_documents_nor_pads(option):
    x, weight, _ = inputs(9, 4, batch=1)
    with pytest.raises(ValueError, match="neither documents nor pads"):
        short_convolution(x, weight, cu_seqlens=torch.tensor([0, 4, 9]), **{option: torch.ones(1, 9, dtype=torch.long)})


def test_a_single_tap_needs_no_memory(device):
    x, weight, _ = inputs(5, 1, device=device)
    y, state = short_convolution(x, weight)
    assert_close(y, F.silu(x * weight[:, 0]), torch.float64)
    assert state.shape == (2, 0, CHANNELS)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5), (3, 4), None), r"x \(b, t, e\).*got \(2, 5\) and \(3, 4\)"),
        (((2, 5, 3), (4, 4), None), r"got \(2, 5, 3\) and \(4, 4\)"),
        (((2, 5, 3), (3, 4), (2, 4, 3)), r"initial_state must have shape \(2, 3, 3\): got \(2, 4, 3\)"),
    ],
)
def test_wrong_shapes_are_named(shapes, message):
    x, weight, state = (None if shape is None else torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        short_convolution(x, weight, initial_state=state)
