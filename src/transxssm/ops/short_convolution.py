"""The short causal convolution of Mamba-2's positional scheme, with its SiLU (paper, Table 2, column "Conv1d + D").

On a CPU it is one operator with its own backward pass, around oneDNN's depthwise convolution, which reads and writes each number once. A
product for every tap passes over the whole sequence each time. The few outputs at document boundaries are computed separately.

Letters: b batch, s sequences, t time, e channels, k kernel size.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from transxssm.ops.csrc import kernels_of
from transxssm.ops.devices import has_fast_products, row_blocks
from transxssm.ops.dispatch import (
    EXPORTED,
    ON_CPU,
    Backend,
    Op,
    cpp_shortfall,
    eager_cpp_refusal,
    is_exporting,
    is_watched,
)
from transxssm.ops.sequences import check_slots, checked_cu_seqlens, has_dense_slots, read_slots

SHORTEST_FOR_OPERATOR = 16  # tokens; for fewer the operator's overhead dominates


def short_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    activation: Literal["silu"] | None = "silu",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution, y_t = silu(Σ_j w_j x_{t−(k−1)+j} + bias), over tokens of the same document, without pads.

    Backends, in order of preference:
        "onednn": an operator around oneDNN's depthwise convolution, on a CPU for rows of at least 16 tokens. Not twice differentiable.
        "torch": one elementwise product for every tap.

    Args:
        x: (b, t, e) inputs.
        weight: (e, k); w_{k−1} multiplies the token itself.
        bias: (e,). Defaults to none.
        initial_state: (b, k−1, e), the inputs before the first token, of the first token's document. Defaults to zeros.
        seq_idx: (b, t) integers, non-decreasing: documents of a packed row.
        cu_seqlens: (s + 1,) integers on the CPU, 0, where the second sequence begins, …, t: of s sequences side by side in one row,
            b = 1, each with states of its own, (s, k−1, e). Defaults to one sequence for each row.
        mask: (b, t), 0 or False at pads, wherever they stand. Defaults to no pads.
        activation: function applied to the sum, or None for none.
        backend: one of the names above. Defaults to the first that takes the call.

    Returns:
        y: (b, t, e) in x's dtype; state: (b, k−1, e), the last k−1 inputs that are no pads, of the last token's document, or
        (s, k−1, e).

    Raises:
        ValueError: shapes or sequences do not fit, or the requested backend does not take the call.
    """
    if x.dim() != 3 or weight.dim() != 2 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"expected x (b, t, e) and weight (e, k): got {tuple(x.shape)} and {tuple(weight.shape)}")
    batch, length, channels = x.shape
    memory, num_states = weight.shape[1] - 1, batch
    if cu_seqlens is not None:
        cu_seqlens = checked_cu_seqlens(cu_seqlens, batch, length)
        num_states = len(cu_seqlens) - 1
        if seq_idx is not None or mask is not None:
            raise ValueError(
                "sequences side by side in one row (cu_seqlens) have neither documents nor pads: got seq_idx or mask"
            )
    if initial_state is None:
        initial_state = x.new_zeros(num_states, memory, channels)
    elif initial_state.shape != (num_states, memory, channels):
        raise ValueError(
            f"initial_state must have shape {(num_states, memory, channels)}: got {tuple(initial_state.shape)}"
        )
    if cu_seqlens is not None:
        return _sequences(x, weight, bias, initial_state, cu_seqlens, activation, backend)
    places = None  # (b, t) new place of each token and pad, with all pads on the left
    if mask is not None:
        mask = mask.bool()
        x = x * mask[..., None].to(x.dtype)
        if _may_stand_between(mask):
            places = _places_behind_pads(mask)
            order = torch.zeros_like(places).scatter(1, places, torch.arange(length, device=x.device).expand(batch, -1))
            x, mask = x.gather(1, order[..., None].expand(-1, -1, channels)), mask.gather(1, order)
            seq_idx = None if seq_idx is None else seq_idx.expand(batch, -1).gather(1, order)
    history = torch.cat((initial_state.to(x.dtype), x), dim=1)  # (b, k−1+t, e)
    num_left_pads = None
    if mask is not None:  # the earlier inputs go right before the first token, after the pads on its left
        num_left_pads = mask.to(torch.uint8).argmax(dim=1, keepdim=True)  # (b, 1)
        if places is not None:
            num_left_pads = length - mask.sum(dim=1, keepdim=True)
        rows = num_left_pads + torch.arange(memory, device=x.device)  # (b, k−1)
        history = torch.cat((torch.zeros_like(initial_state, dtype=x.dtype), x), dim=1)
        history = history.scatter(1, rows[..., None].expand(-1, -1, channels), initial_state.to(x.dtype))
    documents = None
    if seq_idx is not None:
        first = seq_idx[:, :1]
        if (
            num_left_pads is not None
        ):  # pads on the left may come from other documents, and are counted to the first token's
            first = seq_idx.gather(1, num_left_pads.clamp(max=length - 1))
            seq_idx = torch.where(torch.arange(length, device=x.device) < num_left_pads, first, seq_idx)
        documents = torch.cat((first.expand(-1, memory), seq_idx), dim=1)  # (b, k−1+t)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = SHORT_CONVOLUTION.choose(backend, x, weight).forward(history, weight, bias, documents, activation)
    state = _last_inputs(history, documents, None if places is not None else mask, memory)
    return y if places is None else y.gather(1, places[..., None].expand(-1, -1, channels)), state


def short_convolution_(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    state_indices: Tensor,
    has_initial_state: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`short_convolution` over states in the slots of a cache: the last inputs of each sequence are written where its earlier ones were.
    For a serving engine: nothing here is differentiable.

    Backends, in order of preference: "cpp" for one token of each row on a CPU reads and writes a slot where it lies; "torch" copies
    states out of the cache and back.

    Args:
        state: (slots, k−1, e); the slots may lie any distance apart, and those that are not named stay as they are.
        state_indices: (b,) or, with `cu_seqlens`, (s,) int32 or int64: the slot of each sequence, none of them twice.
        has_initial_state: bool of the same shape, whether a sequence continues its slot's inputs. Others begin after zeros, whatever
            the slot holds. Defaults to True for all.
        x, weight, bias, cu_seqlens: as in `short_convolution`.
        backend: one of the names above. Defaults to the first that takes the call.

    Returns:
        y: (b, t, e) in x's dtype.

    Raises:
        ValueError: as for `short_convolution`; or a slot does not exist or is named twice (checked on a CPU only), or an input requires
            gradients.
    """
    if x.dim() != 3 or weight.dim() != 2 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"expected x (b, t, e) and weight (e, k): got {tuple(x.shape)} and {tuple(weight.shape)}")
    if state.shape[1:] != (weight.shape[1] - 1, weight.shape[0]):
        raise ValueError(
            f"state must have shape (slots, {weight.shape[1] - 1}, {weight.shape[0]}): got {tuple(state.shape)}"
        )
    check_slots(state_indices, len(x) if cu_seqlens is None else len(cu_seqlens) - 1, len(state))
    given = (state, x, weight) if bias is None else (state, x, weight, bias)
    if torch.is_grad_enabled() and any(each.requires_grad for each in given):
        raise ValueError(
            "what is written in place has no gradients: got inputs that require them, expected torch.no_grad()"
        )
    cast_bias = None if bias is None else bias.to(x.dtype)
    call = (state, x, weight.to(x.dtype), cast_bias, state_indices, has_initial_state, cu_seqlens)
    with torch.no_grad():
        y: Tensor = SHORT_CONVOLUTION_.choose(backend, *call).forward(*call)
    return y


def _sequences(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor,
    activation: str | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Convolves sequences side by side in one call, each after its own earlier inputs.

    Outputs whose windows reach from one sequence into the next are dropped.
    """
    (num_states, memory, channels), length = initial_state.shape, x.shape[1]
    device, lengths = x.device, cu_seqlens.diff()
    number = torch.arange(num_states, device="cpu").repeat_interleave(lengths)  # (t,): the sequence of each token
    tokens = torch.arange(length, device="cpu") + memory * (
        number + 1
    )  # (t,): their places behind all inputs before them
    ends = cu_seqlens[1:] + memory * torch.arange(1, num_states + 1, device="cpu")
    steps = torch.arange(memory, device="cpu")
    before = cu_seqlens[:-1, None] + memory * torch.arange(num_states, device="cpu")[:, None] + steps  # (s, k−1)
    order = torch.empty(length + num_states * memory, dtype=torch.long, device="cpu")
    order[before.flatten()] = torch.arange(num_states * memory, device="cpu")
    order[tokens] = num_states * memory + torch.arange(length, device="cpu")
    rows = torch.cat((initial_state.to(x.dtype).flatten(0, 1), x[0])).index_select(0, order.to(device))
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = SHORT_CONVOLUTION.choose(backend, x, weight).forward(rows[None], weight, bias, None, activation)
    state = rows.index_select(0, (ends[:, None] - memory + steps).flatten().to(device))
    return y[0].index_select(0, (tokens - memory).to(device))[None], state.view(num_states, memory, channels)


def _step_refusal(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_indices: Tensor,
    has_initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> str | None:
    if cu_seqlens is not None or x.shape[1] != 1 or has_initial_state is not None:
        return "it is for one token of each row, which goes on from its slot"
    if state.dtype != x.dtype or not has_dense_slots(state):
        return "it takes states in x's dtype, each of them contiguous"
    return eager_cpp_refusal(x, state, weight, bias, state_indices)


def _step_by_kernel(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state_indices: Tensor, *_: None
) -> Tensor:
    batch, channels = len(x), len(weight)
    y = torch.empty(batch, 1, channels, dtype=x.dtype, device="cpu")
    rows = x[:, 0] if x.stride(2) == 1 else x[:, 0].contiguous()
    kernels = kernels_of(x.dtype)
    call = kernels.structure(
        "ConvolutionStep",
        batch=batch,
        channels=channels,
        taps=weight.shape[1],
        threads=torch.get_num_threads(),
        x_row=rows.stride(0),
        state_slot=state.stride(0),
        slots=state_indices.long().contiguous(),
        x=rows,
        weight=weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        state=state,
        y=y,
    )
    kernels.run("convolution_step", call)
    torch.autograd.graph.increment_version(state)  # as torch's in-place operations do
    return y


def _over_copies(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_indices: Tensor,
    has_initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    before = read_slots(state, state_indices, has_initial_state)
    y, after = short_convolution(x, weight, bias=bias, initial_state=before, cu_seqlens=cu_seqlens)
    state.index_copy_(0, state_indices.long(), after.to(state.dtype))
    return y


def _operator_refusal(x: Tensor, weight: Tensor) -> str | None:
    if x.device.type != "cpu":
        return ON_CPU
    if is_exporting():
        return EXPORTED
    # Under the compiler the length may be a symbol, and comparing it with 16 would make two graphs.
    if x.shape[1] == 1 or (not torch.compiler.is_compiling() and x.shape[1] < SHORTEST_FOR_OPERATOR):
        return f"it is for rows of at least {SHORTEST_FOR_OPERATOR} tokens"
    return None


def _may_stand_between(mask: Tensor) -> bool:
    """Whether a row may have pads between its tokens. True if reading the mask would need a synchronisation or is not possible."""
    if mask.shape[1] < 3:
        return False
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or is_watched():
        return True
    starts = mask[:, 1:] & ~mask[:, :-1]
    return bool((starts.sum(1) + mask[:, 0] > 1).any())


def _places_behind_pads(mask: Tensor) -> Tensor:
    """(b, t): the place of each token and pad when pads come first. Both kinds keep their order."""
    num_pads = (~mask).cumsum(1)
    return torch.where(mask, num_pads[:, -1:] + mask.cumsum(1) - 1, num_pads - 1)


def _by_taps(
    history: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None, activation: str | None
) -> Tensor:
    """A product for every tap: (b, k−1+t, e) → (b, t, e)."""
    memory = weight.shape[1] - 1
    length = history.shape[1] - memory
    if length == 1:
        y = (history * weight.T).sum(1, keepdim=True)  # inputs before a row's first token are of its document
    else:
        y = history[:, memory:] * weight[:, memory]
        for j in range(memory):
            term = history[:, j : j + length]
            if documents is not None:
                term = term * (documents[:, j : j + length] == documents[:, memory:])[..., None].to(term.dtype)
            y = y + term * weight[:, j]
    y = y if bias is None else y + bias
    return y if activation is None else F.silu(y)


@torch.library.custom_op("transxssm::short_convolution", mutates_args=())
def _convolution(
    history: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None, activation: str | None
) -> Tensor:
    """`_by_taps` as one operator."""
    with torch.autocast("cpu", enabled=False):
        y = _before_activation(*_operands(history, weight, bias), documents)
        return (y if activation is None else F.silu(y)).to(history.dtype)


@_convolution.register_fake
def _empty_output(
    history: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None, activation: str | None
) -> Tensor:
    batch, total, channels = history.shape
    return history.new_empty(batch, total - weight.shape[1] + 1, channels)


@torch.library.custom_op("transxssm::short_convolution_backward", mutates_args=())
def _convolution_backward(
    grad: Tensor,
    history: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    documents: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of history, weight and bias (empty without one)."""
    with torch.autocast("cpu", enabled=False):
        return _all_gradients(grad, history, weight, bias, documents, activation)


@_convolution_backward.register_fake
def _empty_gradients(
    grad: Tensor,
    history: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    documents: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(history), torch.empty_like(weight), weight.new_empty(0 if bias is None else weight.shape[0])


def _all_gradients(
    grad: Tensor,
    history: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    documents: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = history.dtype
    history, weight, bias = _operands(history, weight, bias)
    grad = grad.to(history.dtype)
    if activation is not None:
        grad = torch.ops.aten.silu_backward(grad, _before_activation(history, weight, bias, documents))
    apart = None if documents is None else _where_documents_meet(documents, weight.shape[1])
    grad_bias = grad.new_empty(0) if bias is None else grad.sum((0, 1))
    if apart is None:
        grad_history, grad_weight = _gradients(grad, history, weight)
        return grad_history.to(dtype), grad_weight.to(dtype), grad_bias.to(dtype)
    rows, columns, own = apart
    alone = grad[rows, columns]  # (n, e)
    grad = grad.clone() if activation is None else grad  # it belongs to the caller
    grad[rows, columns] = 0.0
    grad_history, grad_weight = _gradients(grad, history, weight)
    taps = columns[:, None] + torch.arange(weight.shape[1], device="cpu")  # (n, k)
    for piece in row_blocks(alone):
        through = alone[piece, None] * own[piece, :, None].to(alone.dtype)  # (n, k, e)
        where = (rows[piece, None], taps[piece])
        grad_history.index_put_(where, through * weight.T, accumulate=True)
        grad_weight += (through * history[where]).sum(0, dtype=grad_weight.dtype).T
    return grad_history.to(dtype), grad_weight.to(dtype), grad_bias.to(dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    history, weight, bias, documents = ctx.saved_tensors
    grads = _convolution_backward(grad, history, weight, bias, documents, ctx.activation)
    return grads[0], grads[1], None if bias is None else grads[2], None, None


_convolution.register_autograd(_backward, setup_context=_save_for_backward)


def _operands(history: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands, upcast to float32 if they are of a half type that this CPU does not multiply in hardware."""
    if has_fast_products("cpu", history.dtype):
        return history, weight, bias
    return history.float(), weight.float(), None if bias is None else bias.float()


def _as_image(tensor: Tensor) -> Tensor:
    """(b, t, e) → (b, e, 1, t), a view, channels last."""
    return tensor[:, None].permute(0, 3, 1, 2)


def _as_sequence(image: Tensor) -> Tensor:
    """(b, e, 1, t) → (b, t, e)."""
    return image.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _before_activation(history: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None) -> Tensor:
    """The convolution: (b, k−1+t, e) → (b, t, e)."""
    y = _as_sequence(F.conv2d(_as_image(history), weight[:, None, None], bias, groups=weight.shape[0]))
    apart = None if documents is None else _where_documents_meet(documents, weight.shape[1])
    if apart is not None:
        rows, columns, own = apart
        taps = columns[:, None] + torch.arange(weight.shape[1], device="cpu")  # (n, k)
        precise = torch.promote_types(y.dtype, torch.float32)
        for piece in row_blocks(y.new_empty(len(rows), y.shape[-1])):
            terms = history[rows[piece, None], taps[piece]].to(precise) * own[piece, :, None] * weight.T
            total = terms.sum(1) if bias is None else terms.sum(1) + bias
            y[rows[piece], columns[piece]] = total.to(y.dtype)
    return y


def _where_documents_meet(documents: Tensor, kernel_size: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The rows and columns of the n outputs whose window crosses a document boundary, and which inputs belong to the document: (n, k)."""
    rows, columns = torch.nonzero(
        documents[:, : documents.shape[1] - kernel_size + 1] != documents[:, kernel_size - 1 :]
    ).T
    if not len(rows):
        return None
    seen = documents[rows[:, None], columns[:, None] + torch.arange(kernel_size, device="cpu")]  # (n, k)
    return rows, columns, seen == seen[:, -1:]


def _gradients(grad: Tensor, history: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of history, in its dtype, and of weight, in float32 or float64."""
    kernel_size = weight.shape[1]
    # The gradient of the weight is computed below, since oneDNN takes thirty times as long for a depthwise convolution.
    image_grad, *_ = torch.ops.aten.convolution_backward(
        _as_image(grad),
        _as_image(history),
        weight[:, None, None],
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        weight.shape[0],
        [True, False, False],
    )
    precise = torch.promote_types(weight.dtype, torch.float32)
    grad_weight = torch.zeros(kernel_size, weight.shape[0], dtype=precise, device="cpu")
    for one_grad, one_history in zip(grad, history, strict=True):
        for block in row_blocks(one_grad):
            dy = one_grad[block].to(precise)
            inputs = one_history[block.start : block.stop + kernel_size - 1].to(precise)
            for j in range(kernel_size):
                grad_weight[j] += (dy * inputs[j : j + len(dy)]).sum(0)
    return _as_sequence(image_grad), grad_weight.T.contiguous()


def _last_inputs(history: Tensor, documents: Tensor | None, mask: Tensor | None, memory: int) -> Tensor:
    """The k−1 inputs up to each row's last token that is not a pad."""
    batch, total, _ = history.shape
    if documents is None and mask is None:
        return history[:, total - memory :].clone()  # a view would keep the whole row's memory alive
    steps = torch.arange(memory, device=history.device)
    if mask is None:
        rows = (total - memory + steps).expand(batch, -1)  # (b, k−1)
    else:
        positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        num_seen = (positions * mask.bool()).amax(
            dim=1, keepdim=True
        )  # (b, 1): number of columns up to the last token, included
        rows = num_seen + steps
    state = history.gather(1, rows[..., None].expand(-1, -1, history.shape[-1]))
    if documents is not None:
        last_document = documents.gather(1, rows[:, -1:]) if memory else documents[:, -1:]
        state = state * (documents.gather(1, rows) == last_document)[..., None].to(state.dtype)
    return state


SHORT_CONVOLUTION = Op(
    "short_convolution",
    (Backend("onednn", _convolution, refusal=_operator_refusal), Backend("torch", _by_taps)),
    call=lambda x, weight, **options: (x, weight),
)
SHORT_CONVOLUTION_ = Op(
    "short_convolution_",
    (
        Backend("cpp", _step_by_kernel, refusal=_step_refusal, shortfall=cpp_shortfall),
        Backend("torch", _over_copies),
    ),
    call=lambda state, x, weight, *, state_indices, has_initial_state=None, bias=None, cu_seqlens=None, **_: (
        *(state, x, weight, bias, state_indices, has_initial_state, cu_seqlens),
    ),
)
