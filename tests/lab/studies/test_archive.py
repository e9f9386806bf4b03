"""A packed study loses nothing that its report is made of."""

import json

import pytest

from transxssm_lab.studies import report_study, run_study
from transxssm_lab.studies.archive import RUNS, pack_study, rewrite_report, unpack_runs
from transxssm_lab.studies.outcome import write_divergence

KEPT = {"metrics.jsonl", "recipe.yaml", "summary.json", "diverged.json"}


@pytest.fixture
def packed(study, tmp_path):
    """The folder of a study, with a measured cell, one that borrows its weights and one that diverged, and the archive of it."""
    cells = {
        "hybrid": {},
        "scaled": {"weights_of": "hybrid", "model": {"length_scaling_base": 16}},
        "wrecked": {},
    }
    small = study("grid.seeds=[0]", tuning=None, cells=cells, perplexity={"lengths": [16, 32], "max_tokens": 64})
    run_study(small, only=["hybrid", "scaled"])
    write_divergence(tmp_path / "out" / "wrecked" / "seed-0", "step 1 is not finite")
    report_study(small)
    pack_study(tmp_path / "out", tmp_path / "archive")
    return tmp_path / "out", tmp_path / "archive"


def test_the_logs_come_back_to_the_byte(packed, tmp_path):
    folder, archive = packed
    unpack_runs(archive, tmp_path / "unpacked")
    logs = {path.relative_to(folder) for path in folder.glob("*/*/*") if path.name in KEPT}
    logs |= {path.relative_to(folder) for path in folder.glob("*/*.json")}
    unpacked = {
        path.relative_to(tmp_path / "unpacked") for path in (tmp_path / "unpacked").rglob("*") if path.is_file()
    }
    assert unpacked == logs
    assert {path.name for path in logs} >= KEPT
    for path in logs:
        assert (tmp_path / "unpacked" / path).read_text() == (folder / path).read_text()


def test_the_report_is_written_again_from_the_logs(packed):
    folder, archive = packed
    original = (folder / "results.json").read_text()
    assert (archive / "results.json").read_text() == original
    changed = json.loads(original)
    changed["contenders"]["hybrid"]["mean"]["eval_loss"] = 0.0
    (archive / "results.json").write_text(json.dumps(changed))
    rewrite_report(archive)
    assert (archive / "results.json").read_text() == original
    assert json.loads(original)["contenders"]["wrecked"]["status"] == "1 of 1 runs diverged"
    assert json.loads(original)["contenders"]["scaled"]["measured"]
    assert {path.name for path in archive.iterdir()} == {"results.json", "README.md", RUNS}


def test_a_folder_without_a_report_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no report of a study \(no results\.json\)"):
        pack_study(tmp_path, tmp_path / "archive")
