"""Deprecated name of `transxssm_lab.benchmarking`. It goes with the next version."""

import warnings

from transxssm_lab.benchmarking import *  # noqa: F403
from transxssm_lab.benchmarking import __all__ as __all__

warnings.warn("transxssm.benchmarking is now transxssm_lab.benchmarking", FutureWarning, stacklevel=2)
