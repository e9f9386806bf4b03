"""Which implementation computes a call: every op has an ordered table, and the first backend that does not refuse is taken.

The tables stand in the ops' own modules, such as `SSD_CHUNK_SCAN` in `ops/ssd/interface.py`. A backend is chosen once, where the op is
entered. Its name goes through the op's custom operator, if there is one, to the backward pass.
"""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from transxssm.ops.csrc import reason_without_library
from transxssm.ops.devices import GPU_SWITCH, reason_without_triton

CPU_SWITCH = "TRANSXSSM_CPU_KERNELS"
# Reasons that several ops have.
COMPILED = "torch.compile generates its own kernels from torch's operations"
EXPORTED = "an exported graph has only torch's own operations"
FEW = "for so few numbers without gradients one operation of torch is faster"
ON_CPU = "it is for tensors on a CPU"
ON_GPU = "it is for tensors on a CUDA device"
TRANSFORMED = "torch.func and forward-mode differentiation need torch's own operations"
WATCHED = "a tracer, a dispatch mode or a function transform is active, which would not see a kernel"
_CPP_DTYPES = (torch.float32, torch.bfloat16)
_TRITON_DEVICE = "cuda"  # AMD's GPUs have this type too; the kernels are untested there
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_logger = logging.getLogger(__name__)


def _no_reason(*call: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: the value of `backend=` that requests it.
        forward: the implementation.
        backward: the implementation of the gradients, for ops that call it from an autograd function.
        refusal: tells why the backend is not meant for a call, or returns None if it is. Defaults to accepting every call.
        shortfall: tells why the backend cannot run on this machine although it is meant for the call, or returns None if it can. The user
            loses speed, so that the reason is logged once when another backend is taken.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    refusal: Callable[..., str | None] = _no_reason
    shortfall: Callable[..., str | None] = _no_reason


@dataclass(frozen=True)
class Choice:
    """The backend that computes a call.

    Args:
        op: the op's name.
        backend: the name of the backend that is taken.
        refusals: the names of all backends, in order of preference, with the reason why each cannot take the call, or None if it can.
    """

    op: str
    backend: str
    refusals: dict[str, str | None]


def _as_given(*call: Any, **options: Any) -> tuple[Any, ...]:
    return call


@dataclass(frozen=True)
class Op:
    """An op's table of implementations.

    Args:
        name: the name of the public function.
        backends: in order of preference; the last accepts every call.
        call: turns the arguments of the public function into what `refusal` and `shortfall` are given. Defaults to the
            positional arguments.
    """

    name: str
    backends: tuple[Backend, ...]
    call: Callable[..., tuple[Any, ...]] = _as_given

    def choose(self, requested: str | None, *call: Any) -> Backend:
        """The backend that was requested, or else the first that takes the call.

        Raises:
            ValueError: there is no such backend, or the one that was requested refuses; the message says why.
        """
        if requested is not None:
            backend = self.named(requested)
            reason = backend.refusal(*call) or backend.shortfall(*call)
            if reason is not None:
                raise ValueError(f"{self.name} cannot be computed by the backend {str(requested)!r}: {reason}")
            return backend
        for backend in self.backends:
            if backend.refusal(*call) is not None:
                continue
            reason = backend.shortfall(*call)
            if reason is None:
                return backend
            if not torch.compiler.is_compiling():
                _say_once(reason)
        raise AssertionError(f"no backend of {self.name} takes this call")

    def named(self, name: str) -> Backend:
        """The backend of this name.

        Raises:
            ValueError: the op has no backend of that name.
        """
        for backend in self.backends:
            if backend.name == name:
                return backend
        known = ", ".join(backend.name for backend in self.backends)
        raise ValueError(
            f"unknown backend {str(name)!r} of {self.name}: expected one of {known}, or None for the first that takes the call"
        )

    def explain(self, *arguments: Any, **options: Any) -> Choice:
        """The backend that would compute a call of the public function with these arguments, and the other backends' reasons."""
        call = self.call(*arguments, **options)
        refusals = {str(each.name): each.refusal(*call) or each.shortfall(*call) for each in self.backends}
        return Choice(self.name, next(name for name, reason in refusals.items() if reason is None), refusals)


def cpp_refusal(tensor: Tensor, *others: Tensor | None, dtype: torch.dtype | None = None) -> str | None:
    """Why the C++ kernels cannot be given these tensors, or None if they can.

    Kernels read memory, so that all tensors must be on the CPU and must not be subclasses, which may store their numbers elsewhere.

    Args:
        dtype: the dtype that the kernel works in. Defaults to that of `tensor`.
    """
    if (tensor.dtype if dtype is None else dtype) not in _CPP_DTYPES:
        return "the C++ kernels take float32 and bfloat16"
    for each in (tensor, *others):
        if each is None:
            continue
        if each.device.type != "cpu":
            return ON_CPU
        if not is_plain(each):
            return "the C++ kernels take no subclasses of tensors"
    return switched_off(CPU_SWITCH)


def eager_cpp_refusal(tensor: Tensor, *others: Tensor | None, dtype: torch.dtype | None = None) -> str | None:
    """`cpp_refusal` for a kernel that no custom operator wraps, so that neither torch nor its compiler sees it."""
    if torch.compiler.is_compiling():  # first, since the compiler cannot trace the other questions
        return COMPILED
    if is_watched():
        return WATCHED
    return cpp_refusal(tensor, *others, dtype=dtype)


@torch.compiler.assume_constant_result
def _reason_without_library() -> str | None:
    return reason_without_library()


def cpp_shortfall(*call: Any) -> str | None:
    """Why there are no C++ kernels on this machine, or None if there are."""
    return _reason_without_library()


def triton_refusal(tensor: Tensor, *others: Tensor | None) -> str | None:
    """Why Triton's kernels cannot be given these tensors, or None if they can. `torch.compile` takes them as they are."""
    if tensor.device.type != _TRITON_DEVICE:
        return ON_GPU
    if is_exporting():
        return EXPORTED
    for each in (tensor, *others):
        if each is None:
            continue
        if each.device != tensor.device:
            return f"Triton's kernels take tensors on one CUDA device: got {tensor.device} and {each.device}"
        if each.is_floating_point() and each.dtype not in _TRITON_DTYPES:
            return f"Triton's kernels take float32, bfloat16 and float16: got {each.dtype}"
        if not is_plain(each):
            return f"Triton's kernels take no subclasses of tensors: got {type(each).__name__}"
    return switched_off(GPU_SWITCH)


def eager_triton_refusal(tensor: Tensor, *others: Tensor | None) -> str | None:
    """`triton_refusal` for kernels that no custom operator wraps, so that torch does not see them."""
    if tensor.device.type != _TRITON_DEVICE:
        return ON_GPU
    if not torch.compiler.is_compiling() and is_watched():
        return WATCHED
    return triton_refusal(tensor, *others)


def triton_shortfall(tensor: Tensor, *others: Any) -> str | None:
    """Why Triton's kernels cannot run on this machine, or None if they can."""
    return reason_without_triton(tensor.device.index or 0)


@torch.compiler.assume_constant_result
def code_checksum() -> int:
    """A number that changes when the code of the ops does.

    The compiler caches its output on disk under an operator's name and arguments. Operators whose code it traces through take this number
    as an argument, so that changed code is compiled again.
    """
    return _code_checksum()


@functools.cache
def _code_checksum() -> int:
    return crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))))


def is_watched() -> bool:
    """Whether something needs to see torch's operations: a tracer, a dispatch mode (fake tensors, FLOP counters) or a transform.

    `torch.compile` cannot trace this function.
    """
    is_traced = torch._C._get_tracing_state() is not None
    return is_traced or torch._C._len_torch_dispatch_stack() > 0 or is_transformed()


def is_transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, …) or forward-mode differentiation is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether `torch.export` traces.

    Under `torch.compile`, torch 2.11 answers True when its own function is traced. Here it is called at compile time instead.
    """
    return torch.compiler.is_exporting()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one. A subclass may store its numbers elsewhere."""
    return type(tensor) in (Tensor, nn.Parameter)


@torch.compiler.assume_constant_result
def switched_off(variable: str) -> str | None:
    """The reason not to take kernels that the user switched off by an environment variable, or None if they are on."""
    return _switches()[variable]


@functools.cache
def _switches() -> dict[str, str | None]:
    """For each environment variable, the reason to refuse kernels or None. The environment is read once, at the first call."""
    return {
        name: f"{name}=0 switches them off" if os.environ.get(name, "1") == "0" else None
        for name in (CPU_SWITCH, GPU_SWITCH)
    }


@functools.cache
def _say_once(reason: str) -> None:
    _logger.warning("This runs slower than it could: %s. `transxssm kernels` shows what runs instead.", reason)
