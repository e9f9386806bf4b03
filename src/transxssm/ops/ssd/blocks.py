"""The blocks of chunks that the scan iterates over: their extent, and their operands as views of the inputs.

Letters as in chunked.py: b batch, t time, m chunks of a block, a = b m their joint batch axis, q and k positions in a chunk, h heads,
g groups, r = h/g heads of a group, p head_dim, n state size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from transxssm.ops.devices import has_fast_products
from transxssm.ops.rotary import rotate, rotate_into
from transxssm.ops.ssd.decays import decays_of

# Scores of a block over all heads and rows. On a CPU 2 MiB of float32 stay in the cache. A GPU needs large blocks to be busy, and the
# limit is memory: 256 MiB for each such tensor.
BLOCK_SCORES = {"cpu": 2**19, "cuda": 2**26}


class ScanInputs(NamedTuple):
    """The tensors that the forward and the backward operator take, in the order of their schemas."""

    x: Tensor  # (b, t, h, p)
    dt: Tensor  # (b, t, h)
    A: Tensor  # (h,)
    B: Tensor  # (b, t, g, n)
    C: Tensor  # (b, t, g, n)
    D: Tensor | None  # (h,)
    initial_state: Tensor | None  # (b, h, p, n)
    cos: Tensor | None  # (b or 1, t, n/2)
    sin: Tensor | None
    seq_idx: Tensor | None  # (b, t)
    # (s + 1,) int64 on the CPU: where the sequences begin and end that are side by side in one row, each with a state of its own. In
    # chunks they begin at multiples of the chunk size (`in_whole_chunks`).
    cu_seqlens: Tensor | None = None

    @property
    def num_states(self) -> int:
        """Number of sequences, each of which has an initial and a final state."""
        # Not len(), which makes a number of a symbolic size: each batch size would be compiled anew.
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def sequences_of_chunks(self, chunk_size: int) -> Tensor | None:
        """(chunks,) int64 on the CPU: the number of each chunk's sequence, or None if a row is one sequence."""
        if self.cu_seqlens is None:
            return None
        numbers = torch.arange(self.num_states, device="cpu")
        return numbers.repeat_interleave(self.cu_seqlens.diff() // chunk_size)


class WholeChunks(NamedTuple):
    """Sequences side by side in one row, with pads behind each up to the next multiple of a chunk."""

    inputs: ScanInputs
    places: Tensor | None  # (t,): where each token of the row went; None if all stayed


def in_whole_chunks(inputs: ScanInputs, chunk_size: int) -> WholeChunks:
    """Lays the sequences of `inputs.cu_seqlens` out so that each begins with a chunk."""
    assert inputs.cu_seqlens is not None
    device, lengths = inputs.x.device, inputs.cu_seqlens.diff()
    if not bool((lengths % chunk_size).any()):
        return WholeChunks(inputs, None)
    widths = (lengths + chunk_size - 1) // chunk_size * chunk_size
    ends, new_ends = lengths.cumsum(0), F.pad(widths.cumsum(0), (1, 0))
    moved = new_ends[:-1] - (ends - lengths)  # (s,): how far each sequence goes to the right
    places = torch.arange(int(ends[-1]), device="cpu") + moved.repeat_interleave(lengths)  # (t,)
    # A pad is a copy of the last token of its own sequence, so that nothing of another sequence can reach it, with a time step of 0.
    source = torch.arange(int(new_ends[-1]), device="cpu") - moved.repeat_interleave(widths)
    last = (ends - 1).repeat_interleave(widths)
    is_token = (source <= last).to(device)
    source = torch.minimum(source, last).to(device)

    def spread(tensor: Tensor) -> Tensor:
        return tensor[0].index_select(0, source)[None]

    cos, sin = (None if table is None else spread(table) for table in (inputs.cos, inputs.sin))
    x, dt, B, C = (spread(tensor) for tensor in (inputs.x, inputs.dt, inputs.B, inputs.C))
    spread_inputs = inputs._replace(
        x=x, dt=dt * is_token[:, None].to(dt.dtype), B=B, C=C, cos=cos, sin=sin, cu_seqlens=new_ends
    )
    return WholeChunks(spread_inputs, places.to(device))


class Block(NamedTuple):
    """Chunks that are computed together: enough of them to amortise the calls, few enough to fit the cache."""

    chunks: slice
    tokens: slice
    chunk_length: int


def blocks_of(x: Tensor, chunk_size: int) -> list[Block]:
    """All whole chunks in blocks of equal size, then the last chunk if it is shorter."""
    batch, length, heads, _ = x.shape
    num_whole = length // chunk_size
    scores = BLOCK_SCORES.get(x.device.type, BLOCK_SCORES["cuda"])
    size = max(1, scores // (batch * heads * chunk_size * chunk_size))
    blocks = []
    for first in range(0, num_whole, size):
        stop = min(first + size, num_whole)
        blocks.append(Block(slice(first, stop), slice(first * chunk_size, stop * chunk_size), chunk_size))
    rest = length - num_whole * chunk_size
    if rest:
        blocks.append(Block(slice(num_whole, num_whole + 1), slice(length - rest, length), rest))
    return blocks


class Chunk(NamedTuple):
    """The operands of a block's chunks; B and C are rotated, decays are zero across document boundaries.

    All but dt and the decays from chunk to chunk have the dtype of the products' operands, since a CPU would copy what it has to convert.
    """

    x: Tensor  # (a, g, r, q, p): dt x
    B: Tensor  # (a, g, q, n)
    C: Tensor  # (a, g, q, n)
    dt: Tensor  # (a, g, r, q)
    L: Tensor  # (a, g, r, q, k): decay from token k to token q ≥ k
    from_start: Tensor  # (a, g, r, q): decay from the state that enters to token q
    to_end: Tensor  # (a, g, r, q): decay from token q to the state that leaves
    across: Tensor  # (b, m, g, r): decay from the state that enters to the state that leaves


def load(block: Block, inputs: ScanInputs) -> Chunk:
    x, A, tokens = inputs.x, inputs.A, block.tokens
    batch, groups = inputs.B.shape[0], inputs.B.shape[2]
    dt = heads_of(inputs.dt[:, tokens], block, groups).contiguous().flatten(0, 1)  # (a, g, r, q)
    documents = before = None
    if inputs.seq_idx is not None:
        documents = inputs.seq_idx[:, tokens].unflatten(1, (-1, block.chunk_length))  # (b, m, q)
        first = inputs.seq_idx[:, max(tokens.start - 1, 0), None]  # (b, 1)
        before = torch.cat((first, documents[:, :-1, -1]), dim=1).flatten()  # (a,)
        documents = documents.flatten(0, 1)
    decays = decays_of(dt * A.view(groups, -1, 1), documents, before, exact=x.dtype == torch.float32)
    operand = x.dtype if has_fast_products(x.device.type, x.dtype) else torch.float32
    block_x = heads_of(x[:, tokens], block, groups)  # (b, m, g, r, q, p)
    return Chunk(
        x=product(block_x, dt.to(operand).view(block_x.shape[:-1])[..., None]).flatten(0, 1),
        B=_load_rotated(inputs.B, inputs, block, operand),
        C=_load_rotated(inputs.C, inputs, block, operand),
        dt=dt,
        L=decays.between.to(operand),
        from_start=decays.from_start.to(operand),
        to_end=decays.to_end.to(operand),
        across=decays.across.unflatten(0, (batch, -1)),
    )


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether writing into existing memory saves time. On a GPU, fewer calls that the compiler can fuse are faster."""
    return tensor.device.type == "cpu"


def is_traced(tensor: Tensor) -> bool:
    """Whether the compiler traces. It does not support `out=`, which would leave the strides of a result undetermined."""
    return isinstance(tensor, FunctionalTensor)


def heads_of(tensor: Tensor, block: Block, groups: int) -> Tensor:
    """(b, m q, h, …) → (b, m, g, r, q, …), a view."""
    return tensor.unflatten(1, (-1, block.chunk_length)).unflatten(3, (groups, -1)).movedim(2, 4)


def by_head(tensor: Tensor, head_dim: int) -> Tensor:
    """(a, g, q, r p) → (a, g, r, q, p), a view."""
    return tensor.unflatten(-1, (-1, head_dim)).transpose(2, 3)


def as_rows(tensor: Tensor) -> Tensor:
    """(a, g, r, q, …) → (a, g, q, r, …), a view: the heads of a group side by side, for one product with their B or C."""
    return tensor.transpose(2, 3)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left · right in right's dtype, contiguous whatever the layout of the factors: reading a view costs less than copying it first."""
    if is_traced(left):
        return (left * right).to(right.dtype).contiguous()
    shape = torch.broadcast_shapes(left.shape, right.shape)
    return torch.mul(left, right, out=torch.empty(shape, dtype=right.dtype, device=left.device))


def _groups(tensor: Tensor, block: Block) -> Tensor:
    """A block's B or C: (b, t, g, n) → (b, m, g, q, n), a view."""
    return tensor[:, block.tokens].unflatten(1, (-1, block.chunk_length)).transpose(2, 3)


def _angles(inputs: ScanInputs, block: Block) -> tuple[Tensor, Tensor] | None:
    """A block's cos and sin, (b or 1, m, 1, q, n/2)."""
    if inputs.cos is None or inputs.sin is None:
        return None
    cos, sin = (
        t[:, block.tokens].unflatten(1, (-1, block.chunk_length)).unsqueeze(2) for t in (inputs.cos, inputs.sin)
    )
    return cos, sin


def _load_rotated(tensor: Tensor, inputs: ScanInputs, block: Block, dtype: torch.dtype) -> Tensor:
    """A block's B or C at its positions: (b, t, g, n) → (a, g, q, n) in `dtype`."""
    source, angles = _groups(tensor, block), _angles(inputs, block)
    if angles is None:
        return source.to(dtype, memory_format=torch.contiguous_format, copy=True).flatten(0, 1)
    if not is_on_cpu(source):
        return rotate(source, *angles).to(dtype).flatten(0, 1)
    rotated = torch.empty(source.shape, dtype=inputs.dt.dtype, device=source.device)
    rotate_into(rotated, source, *angles)
    return rotated.to(dtype).flatten(0, 1)


def store_unrotated(gradient: Tensor, inputs: ScanInputs, block: Block, out: Tensor) -> None:
    """The gradient (a, g, q, n) of a rotated B or C, rotated back, written into its tokens of `out` (b, t, g, n)."""
    target, angles = _groups(out, block), _angles(inputs, block)
    gradient = gradient.view(target.shape)
    if angles is None:
        target.copy_(gradient)
    elif not is_on_cpu(out):
        target.copy_(rotate(gradient, angles[0], -angles[1]))
    elif out.dtype == inputs.dt.dtype:
        rotate_into(target, gradient, angles[0], -angles[1])
    else:  # rounded once at the end
        turned = torch.empty(target.shape, dtype=inputs.dt.dtype, device=out.device)
        rotate_into(turned, gradient, angles[0], -angles[1])
        target.copy_(turned)
