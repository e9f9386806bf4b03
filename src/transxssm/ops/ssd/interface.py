"""State-space duality: argument checks and the choice of backend. Contracts and shapes: `ssd_chunk_scan`, `ssd_step`, and
`ssd_chunk_scan_`, `ssd_step_` in place.

Letters: b batch, s sequences, t time, h heads, g groups, p head_dim, n state size.
"""

import itertools
from collections.abc import Callable, Iterator
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transxssm.ops.dispatch import EXPORTED, Backend, Op, cpp_shortfall, is_exporting
from transxssm.ops.sequences import check_slots, checked_cu_seqlens, read_slots
from transxssm.ops.ssd import cpp as scan_cpp
from transxssm.ops.ssd.blocks import ScanInputs, in_whole_chunks, is_on_cpu
from transxssm.ops.ssd.chunked import ssd_chunked
from transxssm.ops.ssd.portable import ssd_portable
from transxssm.ops.ssd.reference import ssd_recurrence
from transxssm.ops.ssd.step import SSD_STEP, SSD_STEP_, TokenInputs
from transxssm.ops.ssd.triton import scan as scan_triton
from transxssm.ops.ssd.triton.scan import ssd_triton

# Measured: on a CPU the Q×Q scores of a head stay in the L2 cache; on a GPU 128 moves the fewest bytes (scores against states).
DEFAULT_CHUNK_SIZE = {"cpu": 64, "cuda": 128}


Scan = Callable[[ScanInputs, int | None], tuple[Tensor, Tensor]]


class SSDBackend(StrEnum):
    """How `ssd_chunk_scan` computes, in order of preference."""

    TRITON = "triton"  # on a GPU: kernels that read and write as few bytes as they can
    CPP_GEMM = "cpp_gemm"  # on a CPU, in chunks: C++ kernels with a bfloat16 GEMM of their own
    CPP = "cpp"  # on a CPU, in chunks: C++ kernels around torch's matrix products
    CHUNKED = "chunked"  # on any device, in chunks: torch's operations, a loop over blocks of chunks
    PORTABLE = "portable"  # on any device, in chunks: torch's operations without a loop, one graph for any length, for `torch.export`
    RECURRENCE = "recurrence"  # on any device, token by token: the reference


def _chunked(backend: str, inputs: ScanInputs, chunk_size: int | None) -> tuple[Tensor, Tensor]:
    chunk_size = _chunk_size_of(inputs.x, chunk_size)
    if inputs.cu_seqlens is not None:
        lengths = inputs.cu_seqlens.diff()
        chunk_size = min(chunk_size, int(lengths.max()))  # a longer one would hold pads for nothing
        # A GPU waits for launches. On a CPU pads, and the copies that make room for them, took up to twice the time of a call for each.
        if is_on_cpu(inputs.x) and bool((lengths % chunk_size).any()):
            return _one_by_one(partial(_chunked, backend), inputs, chunk_size)
    arguments, options, places = _unpacked(inputs, chunk_size)
    y, state = ssd_chunked(*arguments, **options, chunk_size=chunk_size, backend=backend)
    return y if places is None else y[0].index_select(0, places)[None], state


def _chunked_refusal(inputs: ScanInputs) -> str | None:
    return EXPORTED if is_exporting() else None


def _triton(inputs: ScanInputs, chunk_size: int | None) -> tuple[Tensor, Tensor]:
    kernels_chunk = 0
    if inputs.cu_seqlens is not None:
        from transxssm.ops.ssd.triton.launch import tiles_of  # which imports Triton

        kernels_chunk = tiles_of(inputs.x, inputs.B.shape[-1], chunk_size).chunk
    arguments, options, places = _unpacked(inputs, kernels_chunk)
    y, state = ssd_triton(*arguments, **options, chunk_size=chunk_size)
    return y if places is None else y[0].index_select(0, places)[None], state


def _portable(inputs: ScanInputs, chunk_size: int | None) -> tuple[Tensor, Tensor]:
    arguments, options = _of_one_sequence(inputs)
    return ssd_portable(*arguments, **options, chunk_size=_chunk_size_of(inputs.x, chunk_size))


def _portable_refusal(inputs: ScanInputs) -> str | None:
    if inputs.cu_seqlens is not None:
        return "one graph for any length knows no bounds of sequences within a row"
    return None


def _recurrence(inputs: ScanInputs, chunk_size: int | None) -> tuple[Tensor, Tensor]:
    if inputs.cu_seqlens is None:
        arguments, options = _of_one_sequence(inputs)
        return ssd_recurrence(*arguments, **options)
    return _one_by_one(_recurrence, inputs, chunk_size)


def _one_by_one(scan: Scan, inputs: ScanInputs, chunk_size: int | None) -> tuple[Tensor, Tensor]:
    """Each sequence of a row in a scan of its own."""
    outputs, states = zip(*(scan(each, chunk_size) for each in _each_sequence(inputs)), strict=True)
    return torch.cat(outputs, dim=1), torch.cat(states)


def _each_sequence(inputs: ScanInputs) -> Iterator[ScanInputs]:
    assert inputs.cu_seqlens is not None
    for number, (start, stop) in enumerate(itertools.pairwise(inputs.cu_seqlens.tolist())):
        state = None if inputs.initial_state is None else inputs.initial_state[number, None]
        x, dt, B, C = (each[:, start:stop] for each in (inputs.x, inputs.dt, inputs.B, inputs.C))
        cos, sin = (None if table is None else table[:, start:stop] for table in (inputs.cos, inputs.sin))
        yield ScanInputs(x, dt, inputs.A, B, C, inputs.D, state, cos, sin, None)


def _of_one_sequence(inputs: ScanInputs) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The positional arguments of an implementation and its options."""
    rotary = None if inputs.cos is None or inputs.sin is None else (inputs.cos, inputs.sin)
    options = {"rotary": rotary, "D": inputs.D, "initial_state": inputs.initial_state, "seq_idx": inputs.seq_idx}
    return inputs[:5], options


def _unpacked(inputs: ScanInputs, chunk_size: int) -> tuple[tuple[Tensor, ...], dict[str, Any], Tensor | None]:
    """The same for an implementation by chunks, in which each sequence of a row must begin with a chunk.

    Also returns the new place of each token of the row, (t,), or None if tokens were not moved.
    """
    places = None
    if inputs.cu_seqlens is not None:
        inputs, places = in_whole_chunks(inputs, chunk_size)
    arguments, options = _of_one_sequence(inputs)
    return arguments, options | {"cu_seqlens": inputs.cu_seqlens}, places


def _chunk_size_of(x: Tensor, chunk_size: int | None) -> int:
    return DEFAULT_CHUNK_SIZE.get(x.device.type, DEFAULT_CHUNK_SIZE["cuda"]) if chunk_size is None else chunk_size


def _call(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[ScanInputs]:
    cos, sin = (None, None) if rotary is None else rotary
    return (ScanInputs(x, dt, A, B, C, D, initial_state, cos, sin, seq_idx, cu_seqlens),)


SSD_CHUNK_SCAN = Op(
    "ssd_chunk_scan",
    (
        Backend(SSDBackend.TRITON, _triton, refusal=scan_triton.refusal, shortfall=scan_triton.shortfall),
        Backend(
            SSDBackend.CPP_GEMM,
            partial(_chunked, "cpp_gemm"),
            refusal=scan_cpp.gemm_refusal,
            shortfall=scan_cpp.gemm_shortfall,
        ),
        Backend(SSDBackend.CPP, partial(_chunked, "cpp"), refusal=scan_cpp.refusal, shortfall=cpp_shortfall),
        Backend(SSDBackend.CHUNKED, partial(_chunked, "chunked"), refusal=_chunked_refusal),
        Backend(SSDBackend.PORTABLE, _portable, refusal=_portable_refusal),
        Backend(SSDBackend.RECURRENCE, _recurrence),
    ),
    call=_call,
)


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    backend: SSDBackend | str | None = None,
) -> tuple[Tensor, Tensor]:
    """A whole sequence through the state-space layer's recurrence (paper, Eq. 6 and Appendix A; Mamba-2, Section 6).

    Per head h with group g(h), and R_t the rotation at the token's position:
        S_t = exp(dt_t A) S_{t−1} + dt_t x_t (R_t B_t)^T          y_t = S_t (R_t C_t) + D x_t

    Autocast is switched off inside: matrix operands have x's dtype; the state, dt, A, decays and cumulative sums are float32, or
    float64 where x is float64.

    Args:
        x: (b, t, h, p) inputs.
        dt: (b, t, h) time steps ≥ 0 after softplus; 0 marks a pad and leaves the state alone.
        A: (h,) decay rates < 0.
        B, C: (b, t, g, n), h a multiple of g: input and output maps, shared by the heads of a group.
        rotary: (cos, sin), each (b or 1, t, n/2): rotates B and C inside. Defaults to no rotation.
        D: (h,) skip. Defaults to none.
        initial_state: (b, h, p, n); belongs to the document of the first token. Defaults to zeros.
        seq_idx: (b, t) integers, non-decreasing: the documents of a packed row; score and state stop at a boundary. Defaults to one
            document for each row.
        cu_seqlens: (s + 1,) integers on the CPU, 0, where the second sequence begins, …, t: of s sequences side by side in one row,
            b = 1, each with an initial and a final state of its own, (s, h, p, n). Defaults to one sequence for each row.
        chunk_size: tokens in a chunk ≥ 1; results do not depend on it but for rounding, and "triton" takes the next power of 2 from
            16 to 256. Defaults to what is fastest on the device.
        backend: an `SSDBackend`. Defaults to the first that takes the inputs.

    Returns:
        y: (b, t, h, p) in x's dtype; final_state: (b, h, p, n), that of the last token's document, or (s, h, p, n).

    Raises:
        ValueError: shapes, the chunk size or the sequences do not fit, or the requested backend does not take the inputs; the message
            says why.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token: got {chunk_size}")
    if x.dim() != 4:
        raise ValueError(f"x must have shape (b, t, h, p): got {tuple(x.shape)}")
    batch, length = x.shape[:2]
    if length == 0:
        raise ValueError(f"the sequence must have at least one token: got x of shape {tuple(x.shape)}")
    if cu_seqlens is not None:
        cu_seqlens = checked_cu_seqlens(cu_seqlens, batch, length)
        if seq_idx is not None:
            raise ValueError("a row holds either documents (seq_idx) or sequences (cu_seqlens): got both")
    num_states = batch if cu_seqlens is None else len(cu_seqlens) - 1
    _check_shapes(x, dt, A, B, C, rotary, D, initial_state, time=(length,), num_states=num_states)
    if seq_idx is not None and seq_idx.shape != (batch, length):
        raise ValueError(f"seq_idx must have shape {(batch, length)}: got {tuple(seq_idx.shape)}")

    if num_states == 1:
        cu_seqlens = None  # a row is one sequence by default
    (inputs,) = _call(
        x, dt, A, B, C, rotary=rotary, D=D, initial_state=initial_state, seq_idx=seq_idx, cu_seqlens=cu_seqlens
    )
    chosen = SSD_CHUNK_SCAN.choose(backend, inputs)
    with torch.autocast(device_type=x.device.type, enabled=False):
        y, state = chosen.forward(inputs, chunk_size)
    return y, state


def ssd_chunk_scan_(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state_indices: Tensor,
    has_initial_state: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    D: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    backend: SSDBackend | str | None = None,
) -> Tensor:
    """`ssd_chunk_scan` over states in the slots of a cache: each sequence's final state is written where its initial one was. For prompts
    in a serving engine: nothing here is differentiable.

    Args:
        state: (slots, h, p, n) float32, float64 for float64 inputs; the slots may lie any distance apart, and those that are not named stay
            as they are.
        state_indices: (b,) or, with `cu_seqlens`, (s,) int32 or int64: the slot of each sequence, none of them twice.
        has_initial_state: bool of the same shape, whether a sequence continues from its slot's state. Others begin from zero, whatever the
            slot holds. Defaults to True for all.
        x, dt, A, B, C, rotary, D, cu_seqlens, chunk_size, backend: as in `ssd_chunk_scan`.

    Returns:
        y: (b, t, h, p) in x's dtype.

    Raises:
        ValueError: as for `ssd_chunk_scan`; or the state's dtype does not fit, a slot does not exist or is named twice (checked on a CPU
            only), or an input requires gradients.
    """
    given = (state, x, dt, A, B, C, *(rotary or ()), *(() if D is None else (D,)))
    _check_in_place(state, x, given)
    check_slots(state_indices, len(x) if cu_seqlens is None else len(cu_seqlens) - 1, len(state))
    with torch.no_grad():
        y, final_state = ssd_chunk_scan(
            *(x, dt, A, B, C),
            rotary=rotary,
            D=D,
            initial_state=read_slots(state, state_indices, has_initial_state),
            cu_seqlens=cu_seqlens,
            chunk_size=chunk_size,
            backend=backend,
        )
        state.index_copy_(0, state_indices.long(), final_state)
    return y


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: S' = exp(dt A) S + dt x (R B)^T, y = S' (R C) + D x. Constant work and memory at any length. Pure.

    Args:
        state: (b, h, p, n).
        x: (b, h, p). dt: (b, h) ≥ 0. A: (h,) < 0. B, C: (b, g, n). D: (h,).
        rotary: (cos, sin), each (b or 1, n/2).

    Returns:
        y: (b, h, p) in x's dtype; state: (b, h, p, n) float32 (float64 for float64 inputs), a new tensor.

    Raises:
        ValueError: shapes do not fit.
    """
    token = _token(state, x, dt, A, B, C, rotary, D, None)
    with torch.autocast(device_type=x.device.type, enabled=False):
        y, new_state = SSD_STEP.choose(None, state, token).forward(state, token)
    return y, new_state


def ssd_step_(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    D: Tensor | None = None,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`ssd_step` over the old state: the new one is written into `state`. For decoding: nothing here is differentiable.

    Backends, in order of preference: "triton" on a GPU and "cpp" on a CPU read and write the state once, where it lies in the cache;
    "torch" on any device, which copies states out of a cache of slots and back.

    Args:
        state: (b, h, p, n), float32, float64 for float64 inputs; with `state_indices` a cache (slots, h, p, n), whose slots may lie any
            distance apart. Slots that are not named stay as they are.
        x, dt, A, B, C, rotary, D: as in `ssd_step`.
        state_indices: (b,) int32 or int64, the slot of each row's state, none of them twice. Defaults to slot i for row i.
        backend: one of the names above. Defaults to the first that takes the call.

    Returns:
        y: (b, h, p) in x's dtype.

    Raises:
        ValueError: shapes or the state's dtype do not fit, a slot does not exist or is named twice (checked on a CPU only), an input
            requires gradients, or the requested backend does not take the call.
    """
    token = _token(state, x, dt, A, B, C, rotary, D, state_indices)
    _check_in_place(state, x, (state, x, dt, A, B, C, *(rotary or ()), *(() if D is None else (D,))))
    with torch.no_grad(), torch.autocast(device_type=x.device.type, enabled=False):
        y: Tensor = SSD_STEP_.choose(backend, state, token).forward(state, token)
    return y


def _check_in_place(state: Tensor, x: Tensor, given: tuple[Tensor, ...]) -> None:
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if state.dtype != wanted:
        raise ValueError(f"the state must be {wanted} to be written in place: got {state.dtype}")
    if torch.is_grad_enabled() and any(each.requires_grad for each in given):
        raise ValueError(
            "what is written in place has no gradients: got inputs that require them, expected torch.no_grad()"
        )


def _token(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    D: Tensor | None,
    state_indices: Tensor | None,
) -> TokenInputs:
    if x.dim() != 3:
        raise ValueError(f"x must have shape (b, h, p): got {tuple(x.shape)}")
    num_states = len(x)
    if state_indices is not None:
        num_states = len(state)
        check_slots(state_indices, len(x), num_states)
    _check_shapes(x, dt, A, B, C, rotary, D, state, time=(), num_states=num_states)
    return TokenInputs(x, dt, A, B, C, rotary, D, state_indices)


def _check_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    D: Tensor | None,
    state: Tensor | None,
    time: tuple[int, ...],
    num_states: int,
) -> None:
    batch, heads, head_dim = x.shape[0], x.shape[-2], x.shape[-1]
    if B.dim() != len(time) + 3 or B.shape[:-2] != (batch, *time):
        raise ValueError(f"B must have shape {(batch, *time, 'groups', 'state size')}: got {tuple(B.shape)}")
    groups, state_size = B.shape[-2:]
    if C.shape != B.shape:
        raise ValueError(f"C must have B's shape {tuple(B.shape)}: got {tuple(C.shape)}")
    if groups == 0 or heads % groups:
        raise ValueError(
            f"the number of heads must be a multiple of the number of groups: got {heads} heads and {groups} groups"
        )
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("dt", dt, (batch, *time, heads)),
        ("A", A, (heads,)),
        ("D", D, (heads,)),
        ("state", state, (num_states, heads, head_dim, state_size)),
    ]
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}: got {tuple(tensor.shape)}")
    if rotary is not None:
        half = state_size // 2
        for name, table in zip(("cos", "sin"), rotary, strict=True):
            if state_size % 2 or table.shape not in ((batch, *time, half), (1, *time, half)):
                wanted = f"({batch} or 1, {', '.join(str(size) for size in (*time, half))})"
                raise ValueError(
                    f"rotary {name} must have shape {wanted} to rotate a state of {state_size}: got {tuple(table.shape)}"
                )
