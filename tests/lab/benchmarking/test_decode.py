"""Decoding over the batch at a tiny size: what it writes, where it ends, how it is interrupted and gone on with."""

import json
import logging
import time
from unittest import mock

import pytest
import torch

from transxssm_lab.benchmarking import Budget, DecodeSettings, Setup, decode, run_decode
from transxssm_lab.benchmarking.decode import num_parts, pending_batches
from transxssm_lab.benchmarking.processes import OutOfMemory
from transxssm_lab.benchmarking.steps import DECODE_TOKENS, Prompt
from transxssm_lab.benchmarking.workers import DecodeRun

SETUP = Setup(torch.device("cpu"), 1)
ONCE = Budget(repeats=1, minutes=5)
SMALL = DecodeSettings("tiny", ("transxssm", "llama"), 8, (1, 2, 4))
CELL_FIELDS = {
    "contender",
    "batch",
    "status",
    "detail",
    "repeat_seconds",
    "seconds",
    "num_tokens",
    "tokens_per_second",
    "milliseconds_per_step",
    "cache_bytes_per_sequence",
    "peak_bytes",
}
SUMMARY_FIELDS = {
    "largest_batch",
    "out_of_memory_batch",
    "largest_batch_tokens_per_second",
    "best_batch",
    "best_tokens_per_second",
    "reference_over_this",
}


def child_with(memory_of, seconds=0.5):
    """In place of a child process: decodes at once, a batch above what a contender has memory for excepted."""
    attempts = []

    def run(function, setup, build, batches, least, repeats, seconds_left, *, memory_limit, deadline, on_message):
        name = build.args[0]
        attempts.append((name, list(batches)))
        for batch in batches:
            if batch > memory_of[name]:
                raise OutOfMemory("needs more than it may have")
            for _ in range(repeats):
                on_message(DecodeRun(batch, seconds, 100 * batch, 1000 * batch))

    run.attempts = attempts
    return run


def measured(folder, child, settings=SMALL, **options):
    with mock.patch.object(decode, "run_in_child", child):
        return run_decode(settings, folder, setup=SETUP, budget=ONCE, **options)


def outcomes(results):
    return [(cell["contender"], cell["batch"], cell["status"]) for cell in results["cells"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    settings = DecodeSettings("tiny", ("transxssm", "llama-static", "jamba"), 8, (2, 1))
    run_decode(settings, folder, setup=SETUP, budget=ONCE)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "decode.json").read_text(encoding="utf-8"))


def test_json_has_every_field(results):
    assert results["status"] == "complete"
    assert results["settings"] == {
        "preset": "tiny",
        "contenders": ["transxssm", "llama-static", "jamba"],
        "length": 8,
        "batches": [1, 2],
        "dtype": "float32",
        "repeats": 1,
    }
    assert results["metadata"]["threads"] == 1
    names = results["settings"]["contenders"]
    assert outcomes(results) == [(name, batch, "ok") for name in names for batch in (1, 2)]
    for cell in results["cells"]:
        assert set(cell) == CELL_FIELDS
        assert all(cell[field] is not None for field in CELL_FIELDS)
        assert cell["num_tokens"] == cell["batch"] * DECODE_TOKENS
        assert cell["tokens_per_second"] == pytest.approx(1e3 * cell["batch"] / cell["milliseconds_per_step"]["median"])
    assert set(results["contenders"]) == set(results["summary"]) == set(names)
    best = {name: max(c["tokens_per_second"] for c in results["cells"] if c["contender"] == name) for name in names}
    for name, summary in results["summary"].items():
        assert set(summary) == SUMMARY_FIELDS
        assert (summary["largest_batch"], summary["out_of_memory_batch"]) == (2, None)
        assert summary["best_tokens_per_second"] == best[name]
        assert summary["reference_over_this"] == pytest.approx(best["transxssm"] / best[name])


def test_page_and_picture(folder, results):
    page = (folder / "decode.md").read_text(encoding="utf-8")
    cell = results["cells"][-1]
    assert f"| jamba | 2 | {cell['milliseconds_per_step']['median']:,.1f} | " in page
    assert f"| {results['summary']['jamba']['reference_over_this']:.2f} |" in page
    assert (folder / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_out_of_memory_ends_one_contender_and_not_the_run(tmp_path):
    child = child_with({"transxssm": 100, "llama": 3})
    results = measured(tmp_path, child)
    assert child.attempts == [("transxssm", [1, 2, 4]), ("llama", [1, 2, 4]), ("llama", [3])]
    assert results["status"] == "complete"
    expected = [("transxssm", batch, "ok") for batch in (1, 2, 4)]
    expected += [("llama", 1, "ok"), ("llama", 2, "ok"), ("llama", 3, "ok"), ("llama", 4, "out of memory")]
    assert outcomes(results) == expected
    assert results["cells"][-1]["detail"] == "needs more than it may have"
    assert results["cells"][0]["cache_bytes_per_sequence"] == 100
    summary = results["summary"]["llama"]
    assert (summary["largest_batch"], summary["out_of_memory_batch"]) == (3, 4)
    assert summary["reference_over_this"] == pytest.approx(4 / 3)
    page = (tmp_path / "decode.md").read_text(encoding="utf-8")
    assert "| llama | 4 | out of memory | needs more than it may have |" in page
    assert "| llama | 3 | 4 | 96 | 96 | 3 | 1.33 |" in page


def test_where_nothing_fits_there_is_no_ratio(tmp_path):
    settings = DecodeSettings("tiny", ("transxssm", "llama"), 8, (8, 4))
    results = measured(tmp_path, child_with({"transxssm": 0, "llama": 2}), settings)
    assert results["status"] == "complete"
    expected = [("transxssm", 2, "out of memory"), ("transxssm", 4, "out of memory")]
    assert outcomes(results) == [*expected, ("llama", 2, "ok"), ("llama", 4, "out of memory")]
    assert set(results["summary"]) == {"llama"}
    assert results["summary"]["llama"]["reference_over_this"] is None


def test_a_child_that_runs_out_of_memory_itself(tmp_path, monkeypatch):
    """The words of a GPU's allocator, in a real child process."""
    monkeypatch.setattr(decode, "build_prompt", build_cramped)
    results = run_decode(DecodeSettings("tiny", ("llama",), 8, (1, 4)), tmp_path, setup=SETUP, budget=ONCE)
    assert outcomes(results) == [("llama", 1, "ok"), ("llama", 2, "ok"), ("llama", 4, "out of memory")]
    assert results["cells"][-1]["detail"].startswith("OutOfMemoryError: CUDA out of memory")


class Cramped(Prompt):
    def repeated(self, batch):
        if batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().repeated(batch)


def build_cramped(*arguments, device):
    from transxssm_lab.benchmarking.contenders import build_prompt

    return Cramped(**vars(build_prompt(*arguments, device=device)))


def test_interrupted_and_called_again_goes_on(tmp_path, caplog):
    def stop_at_4(what, done):
        if what == "transxssm, batch 4":
            raise KeyboardInterrupt

    child = child_with({"transxssm": 100, "llama": 100})
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, child, notify=stop_at_4)
    path = tmp_path / "decode.json"
    first = json.loads(path.read_text(encoding="utf-8"))
    assert first["status"] == "interrupted"
    assert outcomes(first) == [("transxssm", 1, "ok"), ("transxssm", 2, "ok"), ("transxssm", 4, "interrupted")]
    assert first["summary"]["transxssm"]["largest_batch"] == 2
    assert (tmp_path / "decode.png").is_file()

    child = child_with({"transxssm": 100, "llama": 100})
    with caplog.at_level(logging.WARNING, logger="transxssm_lab"):
        second = measured(tmp_path, child)
    assert f"going on with {path}" in caplog.text
    assert child.attempts == [("transxssm", [4]), ("llama", [1, 2, 4])]
    assert second["status"] == "complete"
    assert second["cells"][:2] == first["cells"][:2]
    assert {cell["status"] for cell in second["cells"]} == {"ok"}

    with pytest.raises(ValueError, match=r"of another run, batches was \[1, 2, 4\] and is \[1, 8\] now"):
        measured(tmp_path, child, DecodeSettings("tiny", ("transxssm", "llama"), 8, (8, 1)))


def test_what_the_budget_does_not_allow_is_out_of_time_and_measured_later(tmp_path):
    with mock.patch.object(decode, "run_in_child", child_with({})):
        early = run_decode(SMALL, tmp_path, setup=SETUP, budget=Budget(repeats=1, minutes=1e-9))
    assert early["status"] == "out of time"
    assert outcomes(early) == [(name, b, "out of time") for name in ("transxssm", "llama") for b in (1, 2, 4)]
    late = measured(tmp_path, child_with({"transxssm": 1, "llama": 4}))
    assert late["status"] == "complete"
    assert outcomes(late)[:2] == [("transxssm", 1, "ok"), ("transxssm", 2, "out of memory")]


def test_a_contender_has_its_share_of_the_time(tmp_path, monkeypatch):
    deadlines, now = [], time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)  # nothing takes any time

    def run(*arguments, deadline, **options):
        deadlines.append(deadline - now)
        child(*arguments, deadline=deadline, **options)

    child = child_with({"transxssm": 100, "llama": 100})
    measured(tmp_path, run)
    assert deadlines == pytest.approx([150, 300])

    path = tmp_path / "decode.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results["cells"] = [cell for cell in results["cells"] if cell["contender"] == "llama"]
    path.write_text(json.dumps(results), encoding="utf-8")
    measured(tmp_path, run)
    assert deadlines[2:] == pytest.approx([300])  # those that are done need none


def test_progress_never_runs_past_its_end(tmp_path):
    parts = []
    measured(tmp_path, child_with({"transxssm": 3, "llama": 100}), notify=lambda what, done: parts.append(done))
    assert parts == sorted(parts)
    assert parts[-1] <= num_parts(SMALL)


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
