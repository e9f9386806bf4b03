"""Layer 5: grids of models, trained and evaluated alike, in one table."""

from transxssm.studies.contenders import Contender, contenders_of
from transxssm.studies.definition import Study, bundled_studies, load_study
from transxssm.studies.plan import PlannedRun, Schedule, plan_of
from transxssm.studies.runner import report_study, run_study
from transxssm.studies.tables import tables_of

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
