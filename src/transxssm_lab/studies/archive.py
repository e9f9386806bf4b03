"""The logs of a study's runs in one Parquet file, a row for each run, and the report that is written again from them."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from transxssm.training.run_folder import METRICS, RECIPE, SUMMARY
from transxssm.whole_files import write_text_whole
from transxssm_lab.studies.definition import study_from_settings
from transxssm_lab.studies.outcome import DIVERGED
from transxssm_lab.studies.report import RESULTS, report_of, write_tables
from transxssm_lab.studies.runner import collect_evidence

RUNS = "runs.parquet"
# Columns that hold a run's other files unchanged.
_FILES = {"recipe": RECIPE, "summary": SUMMARY, "diverged": DIVERGED}


def pack_study(folder: Path, archive: Path) -> None:
    """Copies what a study found into another folder: results.json, README.md and the logs of all runs in runs.parquet.

    Each row of runs.parquet is a run: `run` (its folder), `metrics` (what was logged, a list of steps), `recipe`, `summary` and
    `diverged` (the text of these files), `measured` (the evaluations, by cell). Weights and tokenizers are left out.

    Args:
        folder: the folder of the study, as `run_study` writes it.
        archive: the folder to write to.

    Raises:
        ValueError: the folder holds no report of a study.
    """
    if not (folder / RESULTS).is_file():
        raise ValueError(
            f"{folder} holds no report of a study (no {RESULTS}): write one with transxssm study NAME --report"
        )
    runs = sorted({path.parent for name in (METRICS, *_FILES.values()) for path in folder.rglob(name)})
    archive.mkdir(parents=True, exist_ok=True)
    # Losses seldom repeat, so that a dictionary of them would only take room.
    pq.write_table(
        pa.Table.from_pylist([_row(folder, run) for run in runs]),
        archive / RUNS,
        compression="zstd",
        compression_level=19,
        use_dictionary=False,
    )
    write_text_whole(archive / RESULTS, (folder / RESULTS).read_text(encoding="utf-8"))
    rewrite_report(archive)


def unpack_runs(archive: Path, folder: Path) -> None:
    """Writes the run folders that `pack_study` read, without weights."""
    for row in pq.read_table(archive / RUNS).to_pylist():
        run = folder / row["run"]
        for column, name in _FILES.items():
            if row[column] is not None:
                write_text_whole(run / name, row[column])
        if row["metrics"] is not None:
            write_text_whole(run / METRICS, "".join(_line(step) for step in row["metrics"]))
        for measured in row["measured"]:
            write_text_whole(run.parent / f"{run.name}-{measured['cell']}.json", measured["text"])


def rewrite_report(archive: Path) -> dict[str, Any]:
    """Writes results.json and README.md of a packed study from its logs. The record of where it was run is kept.

    Returns:
        The report, as in results.json.
    """
    old = json.loads((archive / RESULTS).read_text(encoding="utf-8"))
    study = study_from_settings(old["study"], old["title"], old["settings"])
    with tempfile.TemporaryDirectory() as unpacked:
        unpack_runs(archive, Path(unpacked))
        there = dataclasses.replace(study, grid=dataclasses.replace(study.grid, output_dir=unpacked))
        report = report_of(there, collect_evidence(there), "complete", old["metadata"])
    write_tables(archive, report, pictures=[])
    return report


def _row(folder: Path, run: Path) -> dict[str, Any]:
    measured, logged = sorted(run.parent.glob(f"{run.name}-*.json")), _text(run / METRICS)
    return {
        "run": run.relative_to(folder).as_posix(),
        "metrics": None if logged is None else [json.loads(line) for line in logged.splitlines()],
        **{column: _text(run / name) for column, name in _FILES.items()},
        "measured": [{"cell": path.stem.removeprefix(f"{run.name}-"), "text": _text(path)} for path in measured],
    }


def _line(step: dict[str, Any]) -> str:
    """A step as a line of JSON, as it was logged. Fields that were not logged are null in the table, and left out here."""
    return json.dumps({key: value for key, value in step.items() if value is not None}) + "\n"


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
