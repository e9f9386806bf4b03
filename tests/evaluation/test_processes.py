"""Several processes find what one does, to the last digit."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.evaluation.models import random_model
from transxssm.data import RecallTask
from transxssm.evaluation import TokenScorer, processes
from transxssm.evaluation.perplexity import TokenizedDocument, measure_length
from transxssm.evaluation.recall import measure_recall


class Threads:
    """torch.distributed as threads of one process see it."""

    def __init__(self, number: int) -> None:
        self.number, self.own = number, threading.local()
        self.barrier = threading.Barrier(number)
        self.given = [None] * number

    def is_available(self):
        return True

    is_initialized = is_available

    def get_world_size(self):
        return self.number

    def get_rank(self):
        return self.own.rank

    def all_gather_object(self, everyone, given):
        self.given[self.own.rank] = given
        self.barrier.wait(60)
        everyone[:] = self.given
        self.barrier.wait(60)

    def run(self, measure):
        """What each of them returns."""

        def as_rank(rank):
            self.own.rank = rank
            return measure()

        with ThreadPoolExecutor(self.number) as pool:
            return list(pool.map(as_rank, range(self.number)))


@pytest.fixture(params=[2, 3])
def several(request, monkeypatch):
    threads = Threads(request.param)
    return lambda measure: (monkeypatch.setattr(processes, "dist", threads), threads.run(measure))[1]


def test_jobs_go_round_and_outcomes_come_in_order(several):
    measured = []

    def square(job):
        measured.append(job)
        return job**2

    for number_of_jobs in (1, 3, 7):
        measured.clear()
        assert {
            tuple(found) for found in several(lambda n=number_of_jobs: list(processes.in_turn(square, range(n))))
        } == {tuple(n**2 for n in range(number_of_jobs))}
        assert sorted(measured) == list(range(number_of_jobs))


def test_perplexity_and_recall_are_those_of_one_process(several):
    scorer, generator = TokenScorer(random_model("transxssm")), np.random.default_rng(0)
    documents = [
        TokenizedDocument(generator.integers(1, 97, length), np.ones(length, dtype=np.int64)) for length in (70, 41, 33)
    ]
    steps = []

    def perplexity():
        return measure_length(scorer, documents, 16, 8, 40, steps.append)

    def recall():
        return measure_recall(scorer, RecallTask(32, 4, vocab_size=96), 7, 0, 64, lambda steps: None)

    alone = perplexity(), recall()
    assert sum(steps) == alone[0]["windows"]
    for cells, expected in zip((several(perplexity), several(recall)), alone, strict=True):
        assert all(cell == expected for cell in cells)
