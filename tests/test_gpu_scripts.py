"""The scripts for a GPU do what they say where there is none: they reach the commands they are made of, with arguments that these take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts" / "gpu"


def run(script: str, *arguments: str, **variables: str) -> str:
    """What a script prints, with this interpreter as its python3."""
    environment = (
        os.environ | variables | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"}
    )
    done = subprocess.run(
        [SCRIPTS / script, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_laws(tmp_path):
    assert "test_equals_the_oracle" in run(
        "laws.sh", str(tmp_path), "--device", "cpu", "--collect-only", "-k", "oracle"
    )
    assert (tmp_path / "laws.txt").is_file()


def test_figure_4(tmp_path):
    sizes = {"PRESET": "tiny", "DEVICE": "cpu", "DTYPE": "float32", "LENGTHS": "16", "EDGES": "16", "PROMPT": "16"}
    run("figure4.sh", str(tmp_path), **sizes, BATCHES="1", MINUTES="0.001")
    for folder, name in (("figure4", "throughput"), ("decode", "decode"), ("figure4-edges", "throughput")):
        results = json.loads((tmp_path / folder / f"{name}.json").read_text())
        assert results["settings"]["preset"] == "tiny"


@pytest.mark.parametrize(("script", "cell"), [("table2.sh", "hybrid-rope"), ("table3.sh", "llama")])
def test_tables(script, cell, tmp_path):
    plan = run(script, str(tmp_path), cell, "data.corpus=python-stdlib", "--list")
    assert cell in plan
    assert "jamba" not in plan
    assert not any(tmp_path.iterdir())


def test_an_archive_has_no_weights(tmp_path):
    run_folder = tmp_path / "table2" / "cell" / "seed-0"
    (run_folder / "checkpoint-8").mkdir(parents=True)
    for name in ("summary.json", "model.safetensors", "checkpoint-8/optimizer.pt"):
        (run_folder / name).write_text("x")
    archive = tmp_path / "archive.tar.gz"
    run("pack.sh", str(tmp_path / "table2"), str(archive))
    listed = subprocess.run(["tar", "-tzf", archive], capture_output=True, text=True, check=True).stdout
    assert "summary.json" in listed
    assert "safetensors" not in listed
    assert "checkpoint" not in listed
