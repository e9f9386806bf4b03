"""Deprecated name of `transxssm_lab.studies`. It goes with the next version."""

import warnings

from transxssm_lab.studies import *  # noqa: F403
from transxssm_lab.studies import __all__ as __all__

warnings.warn("transxssm.studies is now transxssm_lab.studies", FutureWarning, stacklevel=2)
