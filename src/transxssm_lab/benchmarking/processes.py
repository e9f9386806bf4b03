"""Work in a child process, which can be killed for its memory or time, or by the system, without harm to the parent.

The parent of a benchmark computes nothing itself. Children come from a server process that has imported torch and transformers once
and is forked for each: a child starts in a fraction of a second instead of many, and its memory starts from the same figure.
"""

import contextlib
import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from transxssm.wording import one_line

POLL_SECONDS = 0.02
_PRELOADED = ["transxssm_lab.benchmarking"]
# Messages of torch's allocators and the system for exhausted memory, where the exception has no class of its own.
_OUT_OF_MEMORY_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "cannot allocate memory",
    "status_alloc_failed",  # cuBLAS and cuDNN, when a workspace cannot be allocated
)

Send = Callable[[Any], None]


class OutOfMemory(Exception):
    """The child needed more memory than its limit, or than the machine has."""


class OutOfTime(Exception):
    """The child was not finished at its deadline."""


class ChildFailed(Exception):
    """The work raised an exception, or the child died. The message is one line."""


def run_in_child(
    function: Callable[..., Any],
    *arguments: Any,
    memory_limit: int,
    deadline: float,
    on_message: Callable[[Any], None] = lambda message: None,
) -> Any:
    """Runs `function(send, *arguments)` in a process of its own and returns its result.

    Args:
        function: a module-level function. `send` passes a message to `on_message` at once.
        memory_limit: bytes of resident memory at which the child is killed.
        deadline: the value of `time.monotonic()` at which the child is killed.
        on_message: called in the parent for each message.

    Raises:
        OutOfMemory, OutOfTime, ChildFailed: see these classes.
    """
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            if receiver.poll(POLL_SECONDS):
                try:
                    kind, value = receiver.recv()
                except EOFError:
                    raise _death_of(process) from None
                if kind == "message":
                    on_message(value)
                elif kind == "result":
                    return value
                else:
                    raise (OutOfMemory if kind == "memory" else ChildFailed)(value)
            resident = _resident_bytes(process)
            if resident > memory_limit:
                raise OutOfMemory(f"needs more than the {memory_limit / 1e9:.1f} GB it may have")
            if time.monotonic() > deadline:
                raise OutOfTime("was not done when the time budget ended")
    finally:
        _kill(process)
        receiver.close()


def _context() -> Any:
    """The start method: forks of a server where the system supports them, else new interpreters."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _serve(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent decides
    warnings.simplefilter("ignore")

    def send(message: Any) -> None:
        sender.send(("message", message))

    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        try:
            sender.send(("result", function(send, *arguments)))
        except Exception as error:
            line = one_line(error)
            sender.send(("memory" if _is_out_of_memory(error) else "failed", f"{type(error).__name__}: {line}"))


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY_WORDS)


def _death_of(process: BaseProcess) -> Exception:
    process.join()
    if process.exitcode == -signal.SIGKILL:  # the system kills a process with it when memory is exhausted
        return OutOfMemory("was killed by the system")
    return ChildFailed(f"ended with exit code {process.exitcode} and no result")


def _resident_bytes(process: BaseProcess) -> int:
    try:
        return psutil.Process(process.pid).memory_info().rss
    except psutil.NoSuchProcess:  # it has just ended, and its last message is still to be read
        return 0


def _kill(process: BaseProcess) -> None:
    """Ends a child and what it started, such as a compiler's workers."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.join()
    process.close()
