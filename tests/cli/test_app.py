"""The command itself: everything starts without the libraries that only some commands need, and with threads that wait briefly."""

import os
import subprocess
import sys

import pytest

import transxssm
from transxssm.ops.csrc.build import _openmp_of_torch

START = "from transxssm_cli.__main__ import main; main()"


def start(*arguments: str, options: tuple[str, ...] = (), **settings) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", START, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("generate", "--help"),
        ("evaluate", "x", "needle", "--help"),
        ("benchmark", "throughput", "--help"),
        ("--version",),
        ("no-such-command",),
    ],
    ids=str,
)
def test_answers_without_torch(arguments):
    done = start(*arguments, options=("-X", "importtime"))
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "typer" in imported
    slow = {"torch", "transformers", "datasets", "huggingface_hub", "numpy", "matplotlib", "transxssm"}
    assert imported.isdisjoint(slow)


def test_no_arguments_show_the_help(run):
    result = run()
    assert result.exit_code == 0
    assert result.stdout == run("--help").stdout
    for command in ("train", "generate", "evaluate", "info", "demo", "benchmark"):
        assert command in result.stdout


def test_version(run):
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"transxssm {transxssm.__version__}\n")


def test_the_package_runs_as_a_module():
    """As `torchrun -m transxssm` and `accelerate launch -m transxssm` start it."""
    done = subprocess.run([sys.executable, "-m", "transxssm", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"transxssm {transxssm.__version__}\n")


SPIN = """
import ctypes, sys
from typer.testing import CliRunner
from transxssm_cli import app
library, *arguments = sys.argv[1:]
assert CliRunner().invoke(app.app, arguments).exit_code == 2
assert "torch" not in sys.modules
ctypes.CDLL(library)  # reads the variable now, as it does when torch loads it, and shows what it read
"""


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings libgomp there")
@pytest.mark.parametrize(
    ("command", "settings", "spin"),
    [
        (["generate", "absent"], {}, "1000"),
        (["generate", "absent"], {"GOMP_SPINCOUNT": "5"}, "5"),
        (["generate", "absent"], {"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
        (["generate", "absent"], {"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000"),
        (["benchmark", "absent"], {}, "300000"),  # libgomp's own
    ],
    ids=str,
)
def test_threads_wait_briefly_unless_the_user_says_otherwise(command, settings, spin):
    library = _openmp_of_torch()
    if library is None or not library.name.startswith("libgomp"):
        pytest.skip("torch has another OpenMP library here")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_WAIT"))}
    done = subprocess.run(
        [sys.executable, "-c", SPIN, library, *command],
        env=environment | settings | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spin}'" in done.stderr
