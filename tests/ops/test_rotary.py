"""Unified RoPE: the identity of Eq. 1, one table for two widths, and angles that hold at far positions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.apple_gpu import OnAppleGPU
from tests.tolerances import assert_close
from transxssm.ops import (
    DocumentBounds,
    apply_rotary,
    keep_pairs,
    rotary,
    rotary_cos_sin,
    rotary_frequencies,
    rotate_by_angles,
    running_angles,
    subsample_rotary,
)
from transxssm.ops.rotary import rotate_into

POSITIONS = st.integers(0, 131_072)


def table(positions, width, dtype=torch.float64, device=None):
    """(cos, sin) for one row with these positions, as the model makes it."""
    return rotary_cos_sin(torch.tensor([positions], device=device), rotary_frequencies(width, device=device), dtype)


def rotation_matrix(position: float, width: int) -> np.ndarray:
    """R_{Θ,m} of Eq. 5, its 2×2 blocks moved from the pairs (2i, 2i+1) to (i, i + d/2)."""
    R = np.zeros((width, width))
    half = width // 2
    for i in range(half):
        angle = position * 10000 ** (-2 * i / width)
        R[i, i] = R[i + half, i + half] = math.cos(angle)
        R[i, i + half], R[i + half, i] = -math.sin(angle), math.sin(angle)
    return R


@pytest.mark.parametrize(("width", "theta"), [(2, 10000.0), (64, 10000.0), (128, 500000.0)])
def test_frequencies_are_those_of_eq_3(width, theta):
    expected = torch.tensor([theta ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    actual = rotary_frequencies(width, theta)
    assert actual.dtype == torch.float64
    assert_close(actual, expected, torch.float64)


def test_a_device_without_float64_gets_the_same_table(monkeypatch):
    positions, frequencies = torch.tensor([[0, 1, 17, 131_071]]), rotary_frequencies(64)
    expected = rotary_cos_sin(positions, frequencies)
    monkeypatch.setattr(rotary, "has_float64", lambda device: False)
    for actual, wanted in zip(rotary_cos_sin(positions.as_subclass(OnAppleGPU), frequencies), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("width", [2, 6, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rotation_is_the_matrix_of_eq_5(width, dtype, device):
    positions = [0, 1, 17, 4096]
    x = torch.randn(1, 4, 3, width, dtype=torch.float64).to(device, dtype)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    actual = apply_rotary(x, *table(positions, width, precise, device))
    matrices = torch.tensor(np.stack([rotation_matrix(m, width) for m in positions]), device=device)
    assert actual.dtype == dtype
    assert_close(actual, torch.einsum("tij,bthj->bthi", matrices, x.double()), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rotating_into_place_is_the_same_rotation(dtype, device):
    """Any layout of the result, and −sin turns back."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(2, 4, 3, 8, dtype=torch.float64).to(device, dtype)
    cos, sin = table([0, 1, 17, 4096], 8, precise, device)
    heads_first = torch.empty(2, 3, 4, 8, dtype=precise, device=device)
    rotate_into(heads_first, x.transpose(1, 2), cos, sin)
    assert_close(heads_first.transpose(1, 2), apply_rotary(x.to(precise), cos, sin), precise)
    back = torch.empty(2, 4, 3, 8, dtype=precise, device=device).transpose(1, 2)
    rotate_into(back, heads_first, cos, -sin)
    assert_close(back.transpose(1, 2), x.to(precise), precise)


@pytest.mark.parametrize("num_pairs", [1, 3, 8])
def test_pairs_that_are_not_kept_stand_still(num_pairs):
    x, whole = torch.randn(1, 4, 3, 16, dtype=torch.float64), table([0, 1, 17, 4096], 16)
    kept = apply_rotary(x, *keep_pairs(whole, num_pairs)).unflatten(-1, (2, 8))
    assert_close(kept[..., :num_pairs], apply_rotary(x, *whole).unflatten(-1, (2, 8))[..., :num_pairs], torch.float64)
    assert torch.equal(kept[..., num_pairs:], x.unflatten(-1, (2, 8))[..., num_pairs:])


@pytest.mark.parametrize("num_pairs", [0, 9])
def test_pairs_that_are_not_there_cannot_be_kept(num_pairs):
    with pytest.raises(ValueError, match=rf"num_pairs must be between 1 and the table's 8 pairs: got {num_pairs}"):
        keep_pairs(table([0], 16), num_pairs)


@given(m=POSITIONS, n=POSITIONS, width=st.sampled_from([2, 8, 64, 128]))
def test_a_score_depends_on_the_distance_only(m, n, width):
    """<R_m c, R_n b> = c^T R_{n−m} b (Eq. 1), to 128K positions away."""
    c, b = torch.randn(2, 1, 1, 1, width, dtype=torch.float64)
    score = (apply_rotary(c, *table([m], width)) * apply_rotary(b, *table([n], width))).sum()
    relative = c.flatten().numpy() @ rotation_matrix(n - m, width) @ b.flatten().numpy()
    size = (c.norm() * b.norm()).item()
    assert_close(score, torch.tensor(relative), torch.float64, scale=size)


@given(m=POSITIONS, n=POSITIONS, shift=POSITIONS)
def test_a_score_does_not_move_with_both_positions_in_float32(m, n, shift):
    c, b = torch.randn(2, 1, 1, 1, 64)
    scores = [
        (
            apply_rotary(c, *table([m + by], 64, torch.float32)) * apply_rotary(b, *table([n + by], 64, torch.float32))
        ).sum()
        for by in (0, shift)
    ]
    assert_close(scores[0], scores[1], torch.float32, scale=(c.norm() * b.norm()).item())


def test_far_angles_keep_their_digits():
    """A float32 angle is off by 4e-3 rad at position 100 000; formed in float64 only the cosine is rounded."""
    cos, sin = table([99_999], 128, torch.float32)
    angles = [99_999 * 10000 ** (-2 * i / 128) for i in range(64)]
    expected_cos = torch.tensor([math.cos(angle) for angle in angles], dtype=torch.float64)
    expected_sin = torch.tensor([math.sin(angle) for angle in angles], dtype=torch.float64)
    assert cos.dtype == sin.dtype == torch.float32
    assert (cos.flatten() - expected_cos).abs().max() < 1e-7
    assert (sin.flatten() - expected_sin).abs().max() < 1e-7


@given(m=POSITIONS, dtype=st.sampled_from([torch.float64, torch.float32]))
def test_a_rotation_keeps_the_norm(m, dtype):
    x = torch.randn(1, 1, 2, 64, dtype=dtype)
    assert_close(apply_rotary(x, *table([m], 64, dtype)).norm(dim=-1), x.norm(dim=-1), dtype)


def test_position_zero_changes_nothing():
    x = torch.randn(1, 1, 2, 8)
    assert torch.equal(apply_rotary(x, *table([0], 8, torch.float32)), x)


def test_gradients_turn_back():
    """A rotation is orthogonal, so the gradient of R x is R^T applied to what comes in: a rotation by −m."""
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    incoming = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    cos, sin = table([3, 50, 700], 8)
    (gradient,) = torch.autograd.grad(apply_rotary(x, cos, sin), x, incoming)
    assert_close(gradient, apply_rotary(incoming, cos, -sin), torch.float64)


def test_one_token_is_a_row_of_one():
    cos, sin = table([5], 8)
    x = torch.randn(3, 1, 2, 8, dtype=torch.float64)
    assert torch.equal(apply_rotary(x[:, 0], cos[:, 0], sin[:, 0]), apply_rotary(x, cos, sin)[:, 0])


@pytest.mark.parametrize("dim", [2, 32, 64, 128])
def test_a_narrow_head_reads_the_wide_table(dim):
    """10000^(−2i/64) = 10000^(−2(2i)/128): attention's angles are every other one of the state's."""
    cos, sin = subsample_rotary(table([0, 1, 1000], 128), dim)
    own_cos, own_sin = table([0, 1, 1000], dim)
    assert_close(cos, own_cos, torch.float64)
    assert_close(sin, own_sin, torch.float64)


@pytest.mark.parametrize("dim", [96, 256, 63])
def test_a_width_that_does_not_share_the_table_is_refused(dim):
    with pytest.raises(ValueError, match=rf"width 128.*got {dim}"):
        subsample_rotary(table([0], 128), dim)


@pytest.mark.parametrize("width", [0, -2, 7])
def test_a_width_that_has_no_pairs_is_refused(width):
    with pytest.raises(ValueError, match=rf"positive even number.*got {width}"):
        rotary_frequencies(width)


@pytest.mark.parametrize("theta", [0.0, -1.0])
def test_a_base_that_is_not_positive_is_refused(theta):
    with pytest.raises(ValueError, match=rf"theta must be positive: got {theta}"):
        rotary_frequencies(64, theta)


@pytest.mark.parametrize(
    ("shape", "cos_shape", "sin_shape", "message"),
    [
        ((1, 3, 2, 6), (1, 3, 4), (1, 3, 4), r"\(b, t, heads, 8\): got x of shape \(1, 3, 2, 6\)"),
        ((1, 3, 8), (1, 3, 4), (1, 3, 4), r"got x of shape \(1, 3, 8\)"),
        ((1, 3, 2, 8), (1, 3, 4), (1, 2, 4), r"\(1, 3, 4\) and \(1, 2, 4\)"),
    ],
)
def test_tables_that_do_not_fit_are_refused(shape, cos_shape, sin_shape, message):
    with pytest.raises(ValueError, match=message):
        apply_rotary(torch.zeros(shape), torch.zeros(cos_shape), torch.zeros(sin_shape))


def on_the_circle(angles: torch.Tensor) -> torch.Tensor:
    """(…, 2): what is left of an angle once whole turns do not count."""
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def bounds_of(lengths: list[int]) -> DocumentBounds:
    """Of one row of documents."""
    ends = torch.tensor(lengths).cumsum(0)
    each = torch.tensor(lengths)
    return DocumentBounds((ends - each).repeat_interleave(each)[None], (ends - 1).repeat_interleave(each)[None])


class TestRunningAngles:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("length", [1, 2, 97])
    def test_are_sums_of_turns(self, length, dtype, device):
        turns = torch.randn(3, length, 5, device=device, dtype=dtype).requires_grad_()
        initial = torch.randn(3, 5, device=device, dtype=dtype).requires_grad_()
        incoming = torch.randn(3, length, 5, 2, device=device, dtype=dtype)
        angles, state = running_angles(turns, initial=initial)
        expected = initial[:, None] + 2 * math.pi * turns.double().cumsum(1)
        assert angles.dtype == dtype
        assert state.abs().max() <= math.pi * (1 + 1e-6)
        assert_close(on_the_circle(angles), on_the_circle(expected), dtype)
        assert_close(on_the_circle(state), on_the_circle(expected[:, -1]), dtype)
        results = [
            torch.autograd.grad(on_the_circle(each.to(dtype)), (turns, initial), incoming)
            for each in (angles, expected)
        ]
        for actual, wanted in zip(*results, strict=True):
            assert_close(actual, wanted, dtype, num_ops=4)

    def test_gradient_of_the_state_is_that_of_the_last_angle(self):
        turns, initial = torch.randn(2, 7, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
        bounds = DocumentBounds(*(each.expand(2, -1) for each in bounds_of([4, 3])))

        def states(turns, initial):
            return on_the_circle(running_angles(turns, initial=initial, bounds=bounds)[1])

        assert torch.autograd.gradcheck(states, (turns.requires_grad_(), initial.requires_grad_()))

    def test_a_million_tokens_lose_nothing(self):
        """Summed in float32 as they are, the same steps are off by a tenth of a radian and more."""
        turns = torch.rand(1, 2**20, 3) * torch.tensor([1.0, 1e-2, 1e-4])
        expected = on_the_circle(2 * math.pi * turns.double().cumsum(1))
        whole, _ = running_angles(turns)
        state, parts = None, []
        for part in turns.split(2**17 + 1, dim=1):
            angles, state = running_angles(part, initial=state)
            parts.append(angles)
        summed_in_float32 = torch.from_numpy(turns.numpy().cumsum(1, dtype=np.float32))
        assert (on_the_circle(whole) - expected).abs().max() < 1e-5
        assert (on_the_circle(torch.cat(parts, dim=1)) - expected).abs().max() < 1e-5
        assert (on_the_circle(2 * math.pi * summed_in_float32) - expected).abs().max() > 0.1

    @pytest.mark.parametrize("lengths", [[1, 1, 5], [4, 4], [8], [3, 2, 1, 2]])
    def test_documents_are_separate(self, lengths):
        turns = torch.randn(1, sum(lengths), 3, dtype=torch.float64, requires_grad=True)
        initial = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
        packed, state = running_angles(turns, initial=initial, bounds=bounds_of(lengths))
        first, *others = turns.split(lengths, dim=1)
        alone = [running_angles(first, initial=initial), *map(running_angles, others)]
        separate = torch.cat([angles for angles, _ in alone], dim=1)
        incoming = torch.randn(*packed.shape, 2, dtype=torch.float64)
        assert_close(on_the_circle(packed), on_the_circle(separate), torch.float64)
        assert_close(on_the_circle(state), on_the_circle(alone[-1][1]), torch.float64)
        results = [
            torch.autograd.grad(on_the_circle(angles), (turns, initial), incoming) for angles in (packed, separate)
        ]
        for actual, wanted in zip(*results, strict=True):
            assert_close(actual, wanted, torch.float64)

    def test_refuses_half_precision(self):
        with pytest.raises(ValueError, match=r"turns must be float32 or float64.*bfloat16"):
            running_angles(torch.zeros(1, 2, 3, dtype=torch.bfloat16))


class TestRotateByAngles:
    @pytest.mark.parametrize("num_pairs", [1, 3, 4])
    def test_is_the_rotation_of_each_group_of_heads(self, num_pairs, device):
        x = torch.randn(2, 5, 6, 8, dtype=torch.float64, device=device, requires_grad=True)
        angles = torch.randn(2, 5, 3, num_pairs, dtype=torch.float64, device=device, requires_grad=True)
        rotated = rotate_by_angles(x, angles)
        one_by_one = []
        for head in range(6):
            table = torch.zeros(2, 5, 4, dtype=torch.float64, device=device)
            table[..., :num_pairs] = angles[:, :, head // 2]
            one_by_one.append(apply_rotary(x[:, :, head : head + 1], table.cos(), table.sin()))
        expected = torch.cat(one_by_one, dim=2)
        assert_close(rotated, expected, torch.float64)
        incoming = torch.randn_like(rotated)
        results = [torch.autograd.grad(each, (x, angles), incoming) for each in (rotated, expected)]
        for actual, wanted in zip(*results, strict=True):
            assert_close(actual, wanted, torch.float64)

    def test_adding_an_angle_to_all_tokens_changes_no_product(self):
        """The law of shifts, of angles that depend on tokens."""
        c, b = (torch.randn(1, 4, 2, 8, dtype=torch.float64) for _ in range(2))
        angles = torch.randn(1, 4, 1, 4, dtype=torch.float64)
        products = [
            torch.einsum("bshn,bthn->bhst", rotate_by_angles(c, each), rotate_by_angles(b, each))
            for each in (angles, angles + torch.randn(4, dtype=torch.float64))
        ]
        assert_close(products[1], products[0], torch.float64)

    def test_refuses_heads_and_widths_that_do_not_fit(self):
        for shape in [(1, 2, 3, 8), (1, 2, 4, 4), (1, 3, 4, 8)]:
            with pytest.raises(ValueError, match=r"angles of shape .1, 2, 2, 4. rotate"):
                rotate_by_angles(torch.zeros(shape), torch.zeros(1, 2, 2, 4))
