"""A child's end, of whatever kind, reaches the parent as a word of its own."""

import os
import signal
import time

import pytest

from transxssm_lab.benchmarking.processes import ChildFailed, OutOfMemory, OutOfTime, run_in_child

GIGABYTE = 10**9


def double(send, value):
    send("begun")
    return 2 * value


def allocate(send, num_bytes):
    held = bytearray(num_bytes)
    held[::4096] = b"x" * len(held[::4096])
    time.sleep(600)


def raise_memory_error(send):
    raise MemoryError


def allocator_gives_up(send):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8796093022208 bytes")


def library_gives_up(send):
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def die(send, number):
    os.kill(os.getpid(), number)


def fail(send):
    raise KeyError("no\nsuch key")


def wait(send):
    time.sleep(600)


def in_child(function, *arguments, memory_limit=4 * GIGABYTE, seconds=600.0, **options):
    return run_in_child(function, *arguments, memory_limit=memory_limit, deadline=time.monotonic() + seconds, **options)


def test_a_result_and_a_message_come_back():
    messages = []
    assert in_child(double, 21, on_message=messages.append) == 42
    assert messages == ["begun"]


@pytest.mark.parametrize(
    ("function", "arguments", "error", "words"),
    [
        (raise_memory_error, (), OutOfMemory, "MemoryError"),
        (allocator_gives_up, (), OutOfMemory, "can't allocate memory"),
        (library_gives_up, (), OutOfMemory, "CUBLAS_STATUS_ALLOC_FAILED"),
        (die, (signal.SIGKILL,), OutOfMemory, "killed by the system"),
        (die, (signal.SIGTERM,), ChildFailed, "exit code -15"),
        (fail, (), ChildFailed, "KeyError: 'no.+such key'"),
    ],
)
def test_how_a_child_ends(function, arguments, error, words):
    with pytest.raises(error, match=words):
        in_child(function, *arguments)


def test_a_child_that_takes_too_much_memory_is_killed():
    with pytest.raises(OutOfMemory, match=r"more than the 0\.9 GB it may have"):
        in_child(allocate, GIGABYTE, memory_limit=int(0.9 * GIGABYTE))


def test_a_child_that_takes_too_long_is_killed():
    with pytest.raises(OutOfTime):
        in_child(wait, seconds=0.1)
