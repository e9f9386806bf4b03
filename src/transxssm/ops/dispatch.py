"""Which implementation computes a call: an op has an ordered table of them, and the first that does not refuse is taken."""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: what a caller asks for it by.
        refusal: given the call's tensors, why it cannot compute them, or None if it can.
        run: the implementation.
    """

    name: str
    refusal: Callable[..., str | None]
    run: Callable[..., Any]


def accepts_all(*call: Any) -> str | None:
    """The `refusal` of an implementation that computes every call."""
    return None


def choose(op: str, backends: Sequence[Backend], requested: str | None, *call: Any) -> Backend:
    """The implementation that was requested, or else the first that does not refuse.

    Args:
        op: the op's name, for messages.
        backends: in order of preference; the last accepts every call.
        requested: a backend's name. Defaults to the first that does not refuse.
        call: what each `refusal` is given, a tensor first.

    Raises:
        ValueError: there is no such backend, or the one that was requested refuses; the message says why.
    """
    if requested is not None:
        for backend in backends:
            if backend.name == requested:
                reason = backend.refusal(*call)
                if reason is not None:
                    raise ValueError(f"{op} cannot be computed by the backend {requested!r}: {reason}")
                return backend
        known = ", ".join(backend.name for backend in backends)
        raise ValueError(
            f"unknown backend {str(requested)!r} of {op}: expected one of {known}, or None for the first that can"
        )
    for backend in backends:
        reason = backend.refusal(*call)
        if reason is None:
            return backend
        is_for_speed = call[0].device.type == "cuda" and call[0].dtype != torch.float64
        if is_for_speed and not torch.compiler.is_compiling():
            _say_once(f"{op} is slower here than it could be: the backend '{backend.name}' does not take it. {reason}")
    raise AssertionError(f"no backend of {op} takes this call")


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
