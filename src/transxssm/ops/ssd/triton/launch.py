"""The launches of the scan's kernels: the sizes of their tiles, and the memory that they write.

Letters: b batch, t time, c chunks, h heads, g groups, p head_dim, n state size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from transxssm.ops.devices import launched_on, power_of_2
from transxssm.ops.ssd.blocks import ScanInputs
from transxssm.ops.ssd.triton import kernels

MIN_SIDE = 16  # of a tile that tensor cores multiply
_WIDEST_TILE = 64  # columns of x; a wider head is two heads that share their dt, A and D
_HEADS_PER_PROGRAM = 4  # at most, of a group, whose gradients of B and C one program sums
_CARRIED = 512  # numbers of a state that a program carries
_ROTATED = 16  # tokens whose B and C a program rotates


@dataclass(frozen=True)
class Tiles:
    """Sizes by measurement on an H100: docs/kernels.md.

    Args:
        chunk: tokens between two states in memory; a multiple of `block`.
        block: tokens that a program gives results for.
        inner: tokens that it reads at a time; divides `block`.
        warps, stages: warps of a program, and tiles that are loaded ahead.
    """

    chunk: int
    block: int
    inner: int
    warps: int
    stages: int


def tiles_of(x: Tensor, state_size: int, chunk_size: int | None) -> Tiles:
    """float32 operands and states beyond 128 take more registers, so that their tiles are smaller."""
    if x.dtype == torch.float32:
        tiles = Tiles(chunk=64, block=32, inner=16, warps=4, stages=1)
    elif state_size > 128:
        tiles = Tiles(chunk=128, block=64, inner=32, warps=8, stages=1)
    else:
        tiles = Tiles(chunk=128, block=64, inner=32, warps=4, stages=1)
    if chunk_size is None:
        return tiles
    chunk = max(MIN_SIDE, min(256, power_of_2(chunk_size)))
    return Tiles(chunk, min(tiles.block, chunk), min(tiles.inner, chunk), tiles.warps, tiles.stages)


def rotate(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """B and C at their positions, (b, t, g, n); themselves where there is no rotation."""
    B, C = _with_dense_rows(inputs.B), _with_dense_rows(inputs.C)
    if inputs.cos is None or inputs.sin is None:
        return B, C
    batch, length, groups, state_size = B.shape
    rotated_B, rotated_C = (torch.empty(B.shape, dtype=B.dtype, device=B.device) for _ in range(2))
    cos, sin, rotary_row = _angles(inputs)
    per_program = 4
    with launched_on(B.device):
        wrap_triton(kernels.rotate_maps)[(triton.cdiv(length, _ROTATED), triton.cdiv(groups, per_program), batch)](
            *(B, C, cos, sin, rotated_B, rotated_C, length, *B.stride()[:3], *C.stride()[:3], rotary_row),
            groups=groups,
            groups_per_program=per_program,
            state_size=state_size,
            block=_ROTATED,
            block_half=power_of_2(state_size // 2),
        )
    return rotated_B, rotated_C


def decays_like(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what one pass finds out of dt and A for all others: dt as the kernels read it, and the sums of dt A inside each chunk.

    Returns:
        Both (b, h, t), where a head that is wider than a tile counts as two.
    """
    batch, length, heads, head_dim = x.shape
    times = torch.empty(batch, heads * _parts_of_head(head_dim), length, dtype=torch.float32, device=x.device)
    return times, torch.empty_like(times, dtype=torch.float64 if x.dtype == torch.float32 else torch.float32)


def _parts_of_head(head_dim: int) -> int:
    return 1 if head_dim <= _WIDEST_TILE else 2


def forward(
    inputs: ScanInputs, y: Tensor, final_state: Tensor, states: Tensor, decays: tuple[Tensor, Tensor], tiles: Tiles
) -> None:
    """Fills y, the final state, the states (b, c, h, p, n) that chunks begin with, and what `decays_like` gave.

    Args:
        inputs: B and C in them are rotated.
    """
    call = _Call(inputs, decays, tiles)
    x, B, C = call.x, call.B, call.C
    with launched_on(x.device):
        call.sum_decays()
        call.carry_states(x, B, inputs.initial_state, states, final_state, backward=False)
        wrap_triton(kernels.scan_blocks)[(call.heads, call.num_blocks, call.batch)](
            *(x, B, C, call.D, call.times, call.sums, call.seq_idx, states, y),
            *(call.length, call.num_chunks, *x.stride()[:3], *B.stride()[:3], *C.stride()[:3]),
            has_D=inputs.D is not None,
            block=tiles.block,
            inner=tiles.inner,
            **call.constants,
        )


def backward(
    inputs: ScanInputs,
    grad_y: Tensor,
    grad_state: Tensor | None,
    states: Tensor,
    decays: tuple[Tensor, Tensor],
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D (empty without D) and the initial state.

    Args:
        inputs: B and C in them are rotated; the gradients are those of B and C before.
        states, decays: what `forward` filled.
    """
    call = _Call(inputs, decays, tiles)
    x, B, C, device = call.x, call.B, call.C, inputs.x.device
    grad_y = call.divided(grad_y)
    per_part = max(size for size in range(1, _HEADS_PER_PROGRAM + 1) if call.heads_per_group % size == 0)
    parts, groups = call.heads // per_part, call.groups
    # Where the heads of a group are in several programs each has a gradient of B and C of its own, summed below in a fixed order.
    of_maps = (call.batch, call.length, parts, call.state_size)
    grad_B, grad_C = (
        torch.empty(of_maps, dtype=B.dtype if parts == groups else torch.float32, device=device) for _ in range(2)
    )
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=device)
    grad_dt = torch.empty(call.batch, call.length, call.heads, dtype=torch.float32, device=device)
    grad_times, grad_sums = (torch.empty_like(call.times) for _ in range(2))
    of_blocks = (call.batch, call.heads, call.num_blocks)
    grad_ends, grad_D = (torch.empty(of_blocks, dtype=torch.float32, device=device) for _ in range(2))
    grad_kept = torch.empty(call.batch, call.heads, call.num_chunks, dtype=torch.float32, device=device)
    grad_A = torch.empty(call.batch, call.num_chunks, call.heads, dtype=torch.float32, device=device)
    grad_initial = torch.empty(inputs.num_states, *states.shape[2:], dtype=torch.float32, device=device)
    leaving = torch.empty_like(states)
    cos, sin, rotary_row = _angles(inputs)
    strides = (*x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *grad_y.stride()[:3], rotary_row)
    options = {
        **{"heads_per_part": per_part, "block": tiles.block, "inner": tiles.inner, "rotates": inputs.cos is not None},
        **call.constants,
    }
    with launched_on(device):
        call.carry_states(grad_y, C, grad_state, leaving, grad_initial, backward=True)
        wrap_triton(kernels.differentiate_queries)[(parts, call.num_blocks, call.batch)](
            *(x, B, C, grad_y, call.times, call.sums, cos, sin, call.seq_idx, states, grad_C, grad_sums),
            *(call.length, call.num_chunks, *strides),
            **options,
        )
        wrap_triton(kernels.differentiate_keys)[(parts, call.num_blocks, call.batch)](
            *(x, B, C, call.D, grad_y, call.times, call.sums, cos, sin, call.seq_idx, states, leaving),
            *(
                grad_x,
                grad_B,
                grad_times,
                grad_sums,
                grad_ends,
                grad_kept,
                grad_D,
                call.length,
                call.num_chunks,
                *strides,
            ),
            has_D=inputs.D is not None,
            **options,
        )
        wrap_triton(kernels.differentiate_decays)[call.grid_of_decays](
            *(
                call.A,
                call.times,
                grad_times,
                grad_sums,
                grad_ends,
                grad_kept,
                grad_dt,
                grad_A,
                call.length,
                call.num_blocks,
            ),
            heads=call.heads,
            chunk=tiles.chunk,
            blocks=tiles.chunk // tiles.block,
            block_h=call.block_h,
        )
    if parts != groups:
        grad_B, grad_C = (grad.unflatten(2, (groups, -1)).sum(3).to(B.dtype) for grad in (grad_B, grad_C))
    grad_D = grad_D.sum((0, 2)) if inputs.D is not None else grad_D.new_empty(0)
    grad_A = grad_A.sum((0, 1))
    if call.split > 1:
        grad_dt, grad_A = (grad.unflatten(-1, (-1, call.split)).sum(-1) for grad in (grad_dt, grad_A))
        grad_D = grad_D.unflatten(-1, (-1, call.split)).sum(-1) if inputs.D is not None else grad_D
    return grad_x.view(inputs.x.shape), grad_dt, grad_A, grad_B, grad_C, grad_D, grad_initial


class _Call:
    """What all launches of one scan share."""

    def __init__(self, inputs: ScanInputs, decays: tuple[Tensor, Tensor], tiles: Tiles) -> None:
        self.tiles = tiles
        self.times, self.sums = decays
        x, dt, A, D = inputs.x, inputs.dt, inputs.A, inputs.D
        self.B, self.C = _with_dense_rows(inputs.B), _with_dense_rows(inputs.C)
        self.split = _parts_of_head(x.shape[-1])
        if self.split > 1:
            x = self.divided(x)
            dt, A = dt.repeat_interleave(self.split, -1), A.repeat_interleave(self.split)
            D = None if D is None else D.repeat_interleave(self.split)
        self.x, self.dt, self.A = _with_dense_rows(x), dt, A.contiguous()
        self.batch, self.length, self.heads, head_dim = x.shape
        self.groups, self.state_size = self.B.shape[2:]
        self.heads_per_group = self.heads // self.groups
        # A stands for what is not there and not read.
        self.D = self.A if D is None else D.contiguous()
        self.seq_idx = self.A if inputs.seq_idx is None else inputs.seq_idx.to(torch.int32).contiguous()
        self.num_states = inputs.num_states
        self.first_chunks = None
        if inputs.cu_seqlens is not None:
            self.first_chunks = (inputs.cu_seqlens // tiles.chunk).to(device=x.device, dtype=torch.int32)
        self.num_chunks = triton.cdiv(self.length, tiles.chunk)
        self.num_blocks = triton.cdiv(self.length, tiles.block)
        is_exact = x.dtype == torch.float32
        self.block_h = min(32, power_of_2(self.heads))
        self.grid_of_decays = (self.num_chunks, triton.cdiv(self.heads, self.block_h), self.batch)
        # What the kernels with products are compiled for, and their launch options.
        self.constants: dict[str, Any] = {
            "heads": self.heads,
            "heads_per_group": self.heads_per_group,
            "head_dim": head_dim,
            "state_size": self.state_size,
            "has_documents": inputs.seq_idx is not None,
            "precision": "tf32x3" if is_exact else "tf32",  # of float32 operands; half types have no choice
            "chunk": tiles.chunk,
            "block_half": max(MIN_SIDE, power_of_2(-(-self.state_size // 2))),
            "block_p": max(MIN_SIDE, power_of_2(head_dim)),
            "stages": tiles.stages,
            "num_warps": tiles.warps,
        }

    def divided(self, rows: Tensor) -> Tensor:
        """x or the gradient of y, (b, t, h, p), the numbers of a head side by side; a wide head as two of half its width."""
        rows = _with_dense_rows(rows)
        if self.split == 1:
            return rows
        return rows.reshape(*rows.shape[:2], -1, rows.shape[-1] // self.split)

    def sum_decays(self) -> None:
        """Fills `times` and `sums`."""
        wrap_triton(kernels.sum_decays)[self.grid_of_decays](
            *(self.dt, self.A, self.times, self.sums, self.length, *self.dt.stride()),
            heads=self.heads,
            chunk=self.tiles.chunk,
            block_h=self.block_h,
        )

    def carry_states(
        self, rows: Tensor, maps: Tensor, given: Tensor | None, states: Tensor, carried: Tensor, *, backward: bool
    ) -> None:
        """Fills `states` with those that enter the chunks and `carried` with the last; `backward`, with the gradients of those that
        leave the chunks and that of the first."""
        wrap_triton(kernels.sum_chunks)[(self.heads, self.num_chunks, self.batch)](
            *(
                rows,
                maps,
                self.times,
                self.sums,
                self.seq_idx,
                states,
                self.length,
                self.num_chunks,
            ),
            *(*rows.stride()[:3], *maps.stride()[:3]),
            backward=backward,
            block=self.tiles.block,
            **(self.constants | {"stages": 2}),  # nothing but loads and two products, which hide behind each other
        )
        size = self.constants["head_dim"] * self.state_size
        wrap_triton(kernels.carry_states)[(triton.cdiv(size, _CARRIED), self.heads, self.num_states)](
            *(self.A if given is None else given.contiguous(), states, carried, self.sums, self.seq_idx),
            *(self.A if self.first_chunks is None else self.first_chunks, self.length, self.num_chunks),
            heads=self.heads,
            size=size,
            has_given=given is not None,
            has_documents=self.constants["has_documents"],
            has_sequences=self.first_chunks is not None,
            backward=backward,
            chunk=self.tiles.chunk,
            block=_CARRIED,
        )


def _angles(inputs: ScanInputs) -> tuple[Tensor, Tensor, int]:
    """cos and sin, dense, and the distance of their rows, 0 where one is for all; A stands for what is not there."""
    if inputs.cos is None or inputs.sin is None:
        return inputs.A, inputs.A, 0
    cos, sin = torch.broadcast_tensors(inputs.cos, inputs.sin)
    row = 0 if cos.shape[0] == 1 else cos.shape[1] * cos.shape[2]
    return cos.float().contiguous(), sin.float().contiguous(), row


def _with_dense_rows(tensor: Tensor) -> Tensor:
    """The numbers of a head side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
