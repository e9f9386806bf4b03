"""Which batches are tried, and in which order."""

import pytest

from transxssm_lab.benchmarking.batch_search import pending_batches


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ({}, [2, 4, 16]),
        ({2: "ok"}, [4, 16]),
        ({2: "ok", 4: "interrupted", 16: "out of time"}, [4, 16]),
        ({2: "ok", 4: "ok", 16: "ok"}, []),
        ({2: "ok", 4: "ok", 16: "out of memory"}, [10]),
        ({2: "ok", 4: "ok", 16: "out of memory", 10: "interrupted"}, [10]),
        ({2: "ok", 4: "ok", 10: "ok", 16: "out of memory"}, []),
        ({2: "ok", 4: "ok", 10: "out of memory", 16: "out of memory"}, []),
        ({2: "ok", 4: "ok", 10: "failed", 16: "out of memory"}, []),
        ({2: "out of memory"}, [1]),
        ({1: "out of memory", 2: "out of memory"}, []),
        ({2: "ok", 4: "failed"}, []),
    ],
)
def test_pending_batches(outcomes, expected):
    assert pending_batches((2, 4, 16), outcomes) == expected


def test_neighbours_have_nothing_between():
    assert pending_batches((1, 2), {1: "ok", 2: "out of memory"}) == []
    assert pending_batches((1, 2), {1: "out of memory"}) == []
