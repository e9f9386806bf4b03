"""Evaluation shared by several processes: jobs are distributed in turn, and each process gets all results in the order of the jobs.

Sums are therefore taken in the same order as in one process, with the same results. Processes exchange plain values through gloo,
whatever device they compute on.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


def is_shared() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return not is_shared() or dist.get_rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Joins the process group of a launcher, if there is one, and leaves it at the end.

    After an error the group is not destroyed, since that would wait for processes that may be waiting in it.
    """
    if is_shared() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


@contextmanager
def first_process_first() -> Iterator[None]:
    """Lets the first process fill a cache, from which the others then read."""
    if is_shared() and not is_first():
        dist.barrier()
    yield
    if is_shared() and is_first():
        dist.barrier()


def in_turn(measure: Callable[[Job], Outcome], jobs: Sequence[Job]) -> Iterator[Outcome]:
    """Yields the results of `measure` for all jobs in order. Each of n processes measures every n-th job.

    Args:
        measure: a function whose results are plain values, arrays or tensors on the CPU.
    """
    if not is_shared():
        yield from map(measure, jobs)
        return
    number, rank = dist.get_world_size(), dist.get_rank()
    for first in range(0, len(jobs), number):
        own = [measure(job) for job in jobs[first + rank : min(first + rank + 1, len(jobs))]]
        everyone: list[Any] = [None] * number
        dist.all_gather_object(everyone, own)
        for outcomes in everyone:
            yield from outcomes
