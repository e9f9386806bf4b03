"""Layer 4: speed and memory, of whole models against matched baselines and of single operators, in one run each."""

from transxssm.benchmarking.benchmark_run import Budget
from transxssm.benchmarking.comparison import Notify
from transxssm.benchmarking.contenders import CONTENDERS, DEFAULT_CONTENDERS, DEFAULT_MODES, MODES
from transxssm.benchmarking.decode import DecodeSettings, run_decode
from transxssm.benchmarking.lengths import format_length, parse_length
from transxssm.benchmarking.ops import OpsSettings, run_ops
from transxssm.benchmarking.throughput import ThroughputSettings, run_throughput
from transxssm.benchmarking.workers import Setup

__all__ = [
    "CONTENDERS",
    "DEFAULT_CONTENDERS",
    "DEFAULT_MODES",
    "MODES",
    "Budget",
    "DecodeSettings",
    "Notify",
    "OpsSettings",
    "Setup",
    "ThroughputSettings",
    "format_length",
    "parse_length",
    "run_decode",
    "run_ops",
    "run_throughput",
]
