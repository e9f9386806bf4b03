"""Unified RoPE: one rotation for attention's Q and K and for the state-space layers' C and B.

Letters: b batch, t time, h heads (or groups), d width of a head (head_dim in attention, state size in an SSD layer).
"""

import torch
from torch import Tensor

from transxssm.ops.devices import has_float64


def rotary_frequencies(dim: int, theta: float = 10000.0, *, device: torch.device | None = None) -> Tensor:
    """Angular frequencies θ_i = theta^(−2i/dim), i = 0 … dim/2 − 1 (paper, Eq. 3).

    Args:
        dim: width that is rotated; even.
        theta: base of the frequencies.
        device: of the result.

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
        dtype: of the results; float32, or float64 for float64 inputs.

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
        out: x's shape, any layout, in the dtype of cos and sin; no part of x.
        x: (…, d), any floating dtype.
        cos, sin: broadcastable to (…, d/2); −sin inverts the rotation.
    """
    first, second = x.to(out.dtype).chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)


def subsample_rotary(rotary: tuple[Tensor, Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """The part of a wider table that rotates `dim` coordinates: every (width/dim)-th frequency.

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
        ValueError: there are not as many pairs.
    """
    cos, sin = rotary
    if not 1 <= num_pairs <= cos.shape[-1]:
        raise ValueError(f"num_pairs must be between 1 and the table's {cos.shape[-1]} pairs: got {num_pairs}")
    if num_pairs == cos.shape[-1]:
        return rotary
    stands = torch.arange(cos.shape[-1], device=cos.device) >= num_pairs
    return cos.masked_fill(stands, 1.0), sin.masked_fill(stands, 0.0)
