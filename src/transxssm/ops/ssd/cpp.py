"""The backends "cpp" and "cpp_gemm" of the scan: everything between its matrix products is done by C++ kernels (ops/csrc/scan.cpp).
"cpp_gemm" fuses the products into the kernels as well, by a bfloat16 GEMM of its own (ops/csrc/scan_bf16.cpp).

The same blocks and products as in chunked.py, whose docstring has the letters; the joint axis a has the chunks outermost here, (m, b),
as in the states that are saved for the backward pass: (chunks, b, g, n, r p).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from transxssm.ops.csrc import arena_bytes, has_bf16_gemm, kernels_of
from transxssm.ops.devices import has_fast_products
from transxssm.ops.dispatch import CPU_SWITCH, EXPORTED, ON_CPU, cpp_shortfall, is_exporting, switched_off
from transxssm.ops.ssd.blocks import Block, ScanInputs, blocks_of

BACKENDS = ("cpp_gemm", "cpp")
GEMM_COLUMNS = 32  # the GEMM takes head_dim and state sizes that are multiples of this
# Workspaces of `struct Block`, in scan.h.
_WORKSPACES = (
    *(
        "rotated_B",
        "rotated_C",
        "dt_x",
        "weighted_x",
        "dy",
        "weighted_dy",
        "sums",
        "remainders",
        "from_start",
        "to_end",
    ),
    *("across", "grad_log_decay", "grad_log_across", "arenas"),
)


def refusal(inputs: ScanInputs) -> str | None:
    """Why the C++ kernels are not meant for this scan, or None if they are. They run inside the operator, where all tensors have memory."""
    if any(each is not None and each.device.type != "cpu" for each in inputs):
        return ON_CPU
    if inputs.x.dtype not in (torch.float32, torch.bfloat16):
        return "the C++ kernels take float32 and bfloat16"
    return EXPORTED if is_exporting() else switched_off(CPU_SWITCH)


def gemm_refusal(inputs: ScanInputs) -> str | None:
    """Why the C++ kernels with their own GEMM are not meant for this scan, or None if they are."""
    x, state_size = inputs.x, inputs.B.shape[-1]
    if x.dtype != torch.bfloat16 or _operand(x) != torch.bfloat16:
        return "its matrix products are in bfloat16"
    if x.shape[-1] % GEMM_COLUMNS or state_size % GEMM_COLUMNS:
        return f"it takes head_dim and state sizes that are multiples of {GEMM_COLUMNS}: got {x.shape[-1]} and {state_size}"
    return refusal(inputs)


def gemm_shortfall(inputs: ScanInputs) -> str | None:
    """Why the C++ kernels have no GEMM of their own on this machine, or None if they have."""
    reason = cpp_shortfall()
    return "this processor has no AVX-512 BF16" if reason is None and not has_bf16_gemm() else reason


def _operand(x: Tensor) -> torch.dtype:
    return x.dtype if has_fast_products(x.device.type, x.dtype) else torch.float32


def forward_by_kernels(
    backend: str, inputs: ScanInputs, y: Tensor, state: Tensor, states: Tensor, chunk_size: int
) -> None:
    """Fills y; carries the state (b, g, n, r p), in place, to the end; fills the states that chunks begin with, unless empty."""
    scan = _Scan(backend, inputs, chunk_size)
    kept = states if states.numel() else None  # (chunks, b, g, n, r p)
    for block in scan.blocks():
        work = scan.work
        updates = work["updates"]
        if scan.has_fused_products:
            scan.run("chunk_states", updates)
        else:
            scan.run("load_block")
            torch.bmm(work["rotated_B"].mT, work["weighted_x"], out=updates)
        keep = None if kept is None else kept[block.chunks].view_as(updates)
        entering = keep if keep is not None and keep.dtype == updates.dtype else work["entering"]
        scan.run("carry_states", state, updates, entering)
        if keep is not None and keep is not entering:
            keep.copy_(entering)
        if scan.has_fused_products:
            scan.run("chunk_outputs", entering, y)
            continue
        from_states = torch.bmm(work["rotated_C"], entering, out=work["rows"])
        scores = torch.bmm(work["rotated_C"], work["rotated_B"].mT, out=work["scores"])
        scan.run("weigh_scores", scores, work["weights"])
        inside = torch.bmm(work["weights"], work["dt_x"], out=work["by_head"])
        scan.run("finish_outputs", from_states, inside, y)


def backward_by_kernels(
    backend: str,
    inputs: ScanInputs,
    grad_y: Tensor,
    grad_state: Tensor,
    states: Tensor,
    chunk_size: int,
    gradients: tuple[Tensor, ...],
) -> None:
    """Fills the gradients of x, dt, A, B, C and D (if any); carries that of the state (b, g, n, r p), in place, to the start."""
    grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D = gradients
    scan = _Scan(backend, inputs, chunk_size, grad_y)
    per_group = inputs.x.shape[2] // inputs.B.shape[2]
    partial = torch.zeros(2, scan.max_tasks, per_group, dtype=torch.float64, device="cpu")
    for block in scan.blocks(backwards=True):
        work = scan.work
        updates, leaving = work["updates"], work["entering"]
        entering = states[block.chunks].view_as(updates).to(updates.dtype)
        if scan.has_fused_products:
            scan.run("chunk_state_gradients", updates)
            scan.run("carry_gradients", grad_state, updates, entering, leaving)
            scan.run("chunk_gradients", entering, leaving, *(grad_x, grad_dt, grad_B, grad_C, partial[0], partial[1]))
            continue
        B, C, dy, dt_x, weighted_x = (work[name] for name in ("rotated_B", "rotated_C", "dy", "dt_x", "weighted_x"))
        weighted_dy = work["weighted_dy"]
        scan.run("load_block")
        torch.bmm(C.mT, weighted_dy, out=updates)
        scan.run("carry_gradients", grad_state, updates, entering, leaving)
        scores = torch.bmm(C, B.mT, out=work["scores"])
        grad_weights = torch.bmm(dy, dt_x.mT, out=work["grad_weights"])
        grad_scores = work["grad_scores"]
        scan.run("differentiate_weights", scores, grad_weights, work["weights"], grad_scores)
        inside = torch.bmm(work["weights"].mT, dy, out=work["by_head"])
        through_state = torch.bmm(B, leaving, out=work["rows"])
        from_state = torch.bmm(C, entering, out=work["more_rows"])
        dB = torch.bmm(weighted_x, leaving.mT, out=work["dB"])
        dB = torch.baddbmm(dB, grad_scores.mT, C, out=dB)
        dC = torch.bmm(weighted_dy, entering.mT, out=work["dC"])
        dC = torch.baddbmm(dC, grad_scores, B, out=dC)
        scan.run(
            "finish_gradients",
            *(through_state, inside, from_state, dB, dC),
            *(grad_x, grad_dt, grad_B, grad_C, partial[0], partial[1]),
        )
    heads = partial.view(2, -1, inputs.B.shape[0], inputs.x.shape[2]).sum((1, 2))
    grad_A.copy_(heads[0])
    if inputs.D is not None:
        grad_D.copy_(heads[1])


class _Scan:
    """The inputs in the layout that the kernels take, and the workspace of kernels and products, which all blocks share."""

    def __init__(self, backend: str, inputs: ScanInputs, chunk_size: int, grad_y: Tensor | None = None) -> None:
        x, B = inputs.x, inputs.B
        self._operand = _operand(x)
        self._kernels = kernels_of(x.dtype, self._operand)
        self._blocks = blocks_of(x, chunk_size)
        self._with_gradients = grad_y is not None
        batch, length, heads, head_dim = x.shape
        groups, state_size = B.shape[2:]
        self._shape = (batch, heads, groups, head_dim, state_size)
        self.has_fused_products = backend == "cpp_gemm"
        rows = {"x": _rows(x), "B": _rows(B), "C": _rows(inputs.C)}
        if grad_y is not None:
            rows["grad_y"] = _rows(grad_y.to(x.dtype))
        cos, sin = inputs.cos, inputs.sin
        if cos is not None and sin is not None:  # one of them may be the same for all rows
            cos, sin = torch.broadcast_tensors(cos, sin)
        whole = {"cos": cos, "sin": sin} | {name: getattr(inputs, name) for name in ("dt", "A", "D", "seq_idx")}
        tensors = rows | {name: tensor.contiguous() for name, tensor in whole.items() if tensor is not None}
        for name in ("cos", "sin"):
            if name in tensors:
                tensors[name] = tensors[name].float()
        if "seq_idx" in tensors:
            tensors["seq_idx"] = tensors["seq_idx"].long()
        self._sequences = inputs.sequences_of_chunks(chunk_size)
        strides = {
            f"{name}_{axis}": tensor.stride(d)
            for name, tensor in rows.items()
            for d, axis in enumerate(("row", "token"))
        }
        self._block = self._kernels.structure(
            "Block",
            batch=batch,
            heads=heads,
            groups=groups,
            head_dim=head_dim,
            state_size=state_size,
            length=length,
            rotary_rows=1 if cos is None else cos.shape[0],
            threads=torch.get_num_threads(),
            **strides,
            **tensors,
        )
        self.work: dict[str, Tensor] = {}
        self.max_tasks = max((block.chunks.stop - block.chunks.start) * batch * groups for block in self._blocks)

    def blocks(self, *, backwards: bool = False) -> Iterator[Block]:
        """Iterates over the blocks, and sets `work` to the size of each."""
        known: tuple[int, int] | None = None
        for block in reversed(self._blocks) if backwards else self._blocks:
            size = (block.chunks.stop - block.chunks.start, block.chunk_length)
            if size != known:
                self.work, known = self._workspace(*size), size
            self._block.fill(first_token=block.tokens.start, num_chunks=size[0], chunk_length=size[1])
            if self._sequences is not None:
                self._block.fill(sequences=self._sequences[block.chunks])
            yield block

    def run(self, name: str, *tensors: Tensor) -> None:
        """Runs a kernel on the current block."""
        self._kernels.run(name, self._block, *tensors)

    def _workspace(self, num_chunks: int, chunk_length: int) -> dict[str, Tensor]:
        batch, heads, groups, head_dim, state_size = self._shape
        tasks, per_group, length = num_chunks * batch * groups, heads // groups, chunk_length
        maps, rows = (tasks, length, state_size), (tasks, length, per_group * head_dim)
        by_head, square = (tasks * per_group, length, head_dim), (tasks * per_group, length, length)
        states, scores = (tasks, state_size, per_group * head_dim), (tasks, length, length)
        operands = {"updates": states, "entering": states}
        operands["rotated_C" if self._with_gradients else "rotated_B"] = maps
        products = {
            "rotated_B": maps,
            "rotated_C": maps,
            "dt_x": by_head,
            "weighted_x": rows,
            "rows": rows,
            "by_head": by_head,
            "scores": scores,
            "weights": square,
        }
        numbers = dict.fromkeys(("sums", "remainders", "from_start", "to_end"), by_head[:2]) | {"across": by_head[:1]}
        if self._with_gradients:
            products |= {
                "dy": by_head,
                "weighted_dy": rows,
                "more_rows": rows,
                "grad_weights": square,
                "grad_scores": scores,
            }
            products |= {"dB": maps, "dC": maps}
            numbers |= {"grad_log_decay": by_head[:2], "grad_log_across": by_head[:1]}
        if not self.has_fused_products:
            operands |= products
        # dtype and device are named, since the user may have set other defaults.
        work = {name: torch.empty(shape, dtype=self._operand, device="cpu") for name, shape in operands.items()}
        work |= {name: torch.empty(shape, dtype=torch.float32, device="cpu") for name, shape in numbers.items()}
        if self.has_fused_products:
            size, threads = arena_bytes(chunk_length, state_size, per_group, head_dim), self._block.threads
            work["arenas"] = torch.empty(threads * size, dtype=torch.uint8, device="cpu")
            self._block.fill(arena_bytes=size)
        self._block.fill(**{name: work[name] for name in _WORKSPACES if name in work})
        return work


def _rows(tensor: Tensor) -> Tensor:
    """(b, t, heads or groups, …) whose last two axes are contiguous, copied only if necessary."""
    if tensor.stride(3) == 1 and (tensor.stride(2) == tensor.shape[3] or tensor.shape[2] == 1):
        return tensor
    return tensor.contiguous()
