"""Unified RoPE: one rotation for attention's Q and K and for the state-space layers' C and B.

Letters: b batch, t time, h heads, g groups of heads that rotate alike, d width of a head (head_dim in attention, state size in an SSD
layer), e angles of a token.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from transxssm.ops.devices import has_float64


def rotary_frequencies(dim: int, theta: float = 10000.0, *, device: torch.device | None = None) -> Tensor:
    """Angular frequencies θ_i = theta^(−2i/dim), i = 0 … dim/2 − 1 (paper, Eq. 3).

    Args:
        dim: even width that is rotated.
        theta: base of the frequencies.
        device: device of the result.

    Returns:
        (dim/2,) float64, radians per position.

    Raises:
        ValueError: `dim` is not a positive even number, or `theta` is not positive.
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"dim must be a positive even number, since a rotation pairs coordinates: got {dim}")
    if theta <= 0:
        raise ValueError(f"theta must be positive: got {theta}")
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    return theta**-exponents


def rotary_cos_sin(
    position_ids: Tensor, frequencies: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation angles m·θ_i (paper, Eq. 2 and 5).

    Angles are formed in float64: in float32 the angle itself is off by 1e-2 rad at position 100 000, and with it every
    score between distant tokens. For a device without float64 they are formed on the CPU.

    Args:
        position_ids: (b or 1, t) integer positions m.
        frequencies: (d/2,) θ_i in radians per position; may be on the CPU whatever the device of position_ids.
        dtype: dtype of the results: float32, or float64 for float64 inputs.

    Returns:
        cos, sin: each (b or 1, t, d/2), on the device of position_ids.
    """
    device = position_ids.device
    if not has_float64(device):
        position_ids, frequencies = position_ids.cpu(), frequencies.cpu()
    angles = position_ids.unsqueeze(-1).to(torch.float64) * frequencies.to(position_ids.device, torch.float64)
    return angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each token's heads by its position: R_{Θ,m} x_m (paper, Eq. 3 and 5), in the half-split layout.

    Coordinate i is paired with i + d/2 (the layout of pretrained Llama weights), which permutes the paper's pairs
    (2i, 2i+1) and changes no score. The same function serves Q, K, C and B (Eq. 2); since it is orthogonal,
    <R_m c, R_n b> = c^T R_{n−m} b depends on the distance only (Eq. 1).

    Args:
        x: (b, t, h, d) or, for one decoded token, (b, h, d).
        cos, sin: (b or 1, t, d/2), or (b or 1, d/2) for one token; float32 or float64.

    Returns:
        Rotated x, of x's shape and dtype; the products are formed in the precision of cos and sin.

    Raises:
        ValueError: the widths or the numbers of dimensions do not fit.
    """
    if cos.shape != sin.shape:
        raise ValueError(f"cos and sin must have one shape: got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if x.shape[-1] != 2 * cos.shape[-1] or x.dim() != cos.dim() + 1:
        raise ValueError(
            f"rotary tables of shape {tuple(cos.shape)} rotate (b, t, heads, {2 * cos.shape[-1]}): got x of shape {tuple(x.shape)}"
        )
    return rotate(x, cos.unsqueeze(-2), sin.unsqueeze(-2)).to(x.dtype)  # one angle for all heads


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation of `apply_rotary` for any layout, unchecked and not rounded: x (…, d) in the precision of cos and sin.

    Args:
        x: (…, d).
        cos, sin: broadcastable to (…, d/2); −sin inverts the rotation.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`rotate` into existing memory, which saves two passes over the memory of a CPU. Not differentiable.

    Args:
        out: a tensor of x's shape in any layout, in the dtype of cos and sin. It must not overlap x.
        x: (…, d), any floating dtype.
        cos, sin: broadcastable to (…, d/2); −sin inverts the rotation.
    """
    first, second = x.to(out.dtype).chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)


def subsample_rotary(rotary: tuple[Tensor, Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Subsamples a wider table for `dim` coordinates: it takes every (width/dim)-th frequency.

    theta^(−2i/64) = theta^(−2(2i)/128), so attention (64 wide) reads the even entries of the table of a 128-wide state and all
    layers share one set of angles ("Unified" RoPE).

    Args:
        rotary: (cos, sin), each (…, width/2).
        dim: width to rotate; must divide width.

    Returns:
        (cos, sin), each (…, dim/2), views.

    Raises:
        ValueError: `dim` is odd or does not divide the table's width.
    """
    cos, sin = rotary
    width = 2 * cos.shape[-1]
    if dim % 2 or width % dim:
        raise ValueError(
            f"dim must be even and divide the table's width {width}, so that both share its frequencies: got {dim}"
        )
    stride = width // dim
    return cos[..., ::stride], sin[..., ::stride]


def keep_pairs(rotary: tuple[Tensor, Tensor], num_pairs: int) -> tuple[Tensor, Tensor]:
    """A table that rotates only the first `num_pairs` pairs, those of the highest frequencies (partial rotation).

    Those pairs rotate as they do under the whole table (p-RoPE, arXiv 2410.06205): angles stay shared with every other layer, and a
    product of two rotated vectors still depends on their distance only (Eq. 1).

    Args:
        rotary: (cos, sin), each (…, d/2), highest frequency first.
        num_pairs: between 1 and d/2.

    Returns:
        (cos, sin), each (…, d/2): as they are where all pairs are kept, else copies with cos 1 and sin 0 behind `num_pairs`.

    Raises:
        ValueError: `num_pairs` is not between 1 and d/2.
    """
    cos, sin = rotary
    if not 1 <= num_pairs <= cos.shape[-1]:
        raise ValueError(f"num_pairs must be between 1 and the table's {cos.shape[-1]} pairs: got {num_pairs}")
    if num_pairs == cos.shape[-1]:
        return rotary
    stands = torch.arange(cos.shape[-1], device=cos.device) >= num_pairs
    return cos.masked_fill(stands, 1.0), sin.masked_fill(stands, 0.0)


class DocumentBounds(NamedTuple):
    """Where the documents of packed rows begin and end."""

    first: Tensor  # (b, t) int64: the place in the row of the first token of each token's document
    last: Tensor  # (b, t) int64: of its last token


def running_angles(
    turns: Tensor, *, initial: Tensor | None = None, bounds: DocumentBounds | None = None
) -> tuple[Tensor, Tensor]:
    """Running angles 2π Σ_{s ≤ t} turns_s, in radians and modulo 2π, of a rotation whose steps depend on the tokens.

    The sum is formed in fixed-point fractions of a turn, whose integers wrap around where an angle does. So it is exact at any length, and
    does not depend on the parts in which it is formed.

    Args:
        turns: (b, t, e) steps, as fractions of a turn; float32 or float64. 0 at pads.
        initial: (b, e) radians before the first token, of the first token's document. Defaults to 0.
        bounds: bounds of the documents of packed rows, each of which begins at angle 0. Defaults to one document in each row.

    Returns:
        angles: (b, t, e) in turns' dtype, within some turns of 0; state: (b, e), that of the last token in [−π, π].

    Raises:
        ValueError: turns are of another dtype.
    """
    if turns.dtype not in _FIXED_POINT:
        raise ValueError(f"turns must be float32 or float64, in which angles are summed: got {turns.dtype}")
    first, last = (None, None) if bounds is None else bounds
    angles: Tensor = _RunningAngles.apply(turns, first, last)
    if initial is not None:
        before = initial.to(turns.dtype)[:, None]
        if first is not None:
            before = before * (first == 0)[..., None].to(turns.dtype)
        angles = angles + before
    state = angles[:, -1]
    return angles, state - 2 * math.pi * (state.detach() / (2 * math.pi)).round()


# For each dtype the integer type and its bits, and the bits of a fraction of a turn: as many as the mantissa can use, and fewer than the
# integers have, so that half a turn is representable.
_FIXED_POINT = {torch.float32: (torch.int32, 32, 31), torch.float64: (torch.int64, 64, 52)}


class _RunningAngles(torch.autograd.Function):
    @staticmethod
    def forward(turns: Tensor, first: Tensor | None, last: Tensor | None) -> Tensor:
        integers, num_bits, fraction_bits = _FIXED_POINT[turns.dtype]
        steps = ((turns - turns.round()) * 2.0**fraction_bits).round().to(integers)
        sums = steps.cumsum(1, dtype=integers)
        if first is not None:
            sums = sums - (sums - steps).gather(1, first[..., None].expand_as(sums))
        # Whole turns overflow, and the sign is that of the angle.
        return (sums << (num_bits - fraction_bits)).to(turns.dtype) * (2 * math.pi * 0.5**num_bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor | None], output: Tensor) -> None:
        _, _, last = inputs
        ctx.save_for_backward(last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (last,) = ctx.saved_tensors
        sums = grad.flip(1).cumsum(1).flip(1)  # of each token's angle and all later ones
        if last is not None:
            sums = sums - (sums - grad).gather(1, last[..., None].expand_as(sums))
        return 2 * math.pi * sums, None, None


def rotate_by_angles(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate each group of heads by angles of its own, in the half-split layout of `apply_rotary`.

    Args:
        x: (b, t, h, d).
        angles: (b, t, g, up to d/2) radians, for the first pairs; h % g == 0. Pairs without an angle are not rotated.

    Returns:
        Rotated x, of x's shape and dtype; the products are formed in the precision of angles.

    Raises:
        ValueError: the widths or the numbers of heads do not fit.
    """
    num_groups, num_pairs = angles.shape[-2:]
    if x.shape[:2] != angles.shape[:2] or x.shape[2] % num_groups or x.shape[-1] % 2 or 2 * num_pairs > x.shape[-1]:
        raise ValueError(
            f"angles of shape {tuple(angles.shape)} rotate (b, t, a multiple of {num_groups} heads, {2 * num_pairs} or more): "
            f"got x of shape {tuple(x.shape)}"
        )
    angles = F.pad(angles, (0, x.shape[-1] // 2 - num_pairs))[:, :, :, None]  # (b, t, g, 1, d/2)
    grouped = x.unflatten(2, (num_groups, -1))  # (b, t, g, h/g, d)
    return rotate(grouped, angles.cos(), angles.sin()).to(x.dtype).flatten(2, 3)
