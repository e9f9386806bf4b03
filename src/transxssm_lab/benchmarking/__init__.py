"""Speed and memory, of whole models against matched baselines and of single operators, in one run each."""

from transxssm.wording import format_length, parse_length
from transxssm_lab.benchmarking.benchmark_run import Budget
from transxssm_lab.benchmarking.comparison import Notify
from transxssm_lab.benchmarking.contenders import CONTENDERS, DEFAULT_CONTENDERS, DEFAULT_MODES, MODES
from transxssm_lab.benchmarking.decode import DecodeSettings, run_decode
from transxssm_lab.benchmarking.ops import OpsSettings, run_ops
from transxssm_lab.benchmarking.throughput import ThroughputSettings, run_throughput
from transxssm_lab.benchmarking.workers import Setup

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
