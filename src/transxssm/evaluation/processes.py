"""An evaluation that several processes share: jobs go round them, and each hears what came of every job, in the order of the jobs.

What is added up is therefore added up in the same order as in one process, to the same figures. Processes exchange plain values
through gloo, whatever they compute on.
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
    """Whether this process writes files and speaks for all."""
    return not is_shared() or dist.get_rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Joins the other processes that a launcher has started, if there are any, and leaves them at the end.

    After an error the group stays: the others may be waiting in it, and with them its end would.
    """
    if is_shared() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


@contextmanager
def first_process_first() -> Iterator[None]:
    """Lets the first process prepare what the others then find in a cache."""
    if is_shared() and not is_first():
        dist.barrier()
    yield
    if is_shared() and is_first():
        dist.barrier()


def in_turn(measure: Callable[[Job], Outcome], jobs: Sequence[Job]) -> Iterator[Outcome]:
    """What `measure` makes of each job, in order; of n processes each measures one in n jobs.

    Args:
        measure: its outcomes are plain values, arrays or tensors on the CPU.
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
