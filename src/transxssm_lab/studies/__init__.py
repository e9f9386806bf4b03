"""Grids of models, trained and evaluated alike, in one table."""

from transxssm_lab.studies.definition import Study, bundled_studies, load_study
from transxssm_lab.studies.runner import report_study, run_study
from transxssm_lab.studies.schedule import Contender, PlannedRun, Schedule, contenders_of, plan_of
from transxssm_lab.studies.tables import tables_of

__all__ = [
    "Contender",
    "PlannedRun",
    "Schedule",
    "Study",
    "bundled_studies",
    "contenders_of",
    "load_study",
    "plan_of",
    "report_study",
    "run_study",
    "tables_of",
]
