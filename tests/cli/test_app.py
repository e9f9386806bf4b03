"""The command itself: its help is quick, and everything starts without the libraries that only some commands need."""

import statistics
import subprocess
import sys
import time

import pytest

import transxssm

START = "from transxssm_cli import main; main()"


def start(*arguments: str, options: tuple[str, ...] = (), **settings) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", START, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


def test_help_takes_less_than_a_second():
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        assert start("--help").returncode == 0
        seconds.append(time.perf_counter() - started)
    assert statistics.median(seconds) < 1


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
    assert imported.isdisjoint({"torch", "transformers", "numpy", "transxssm"})


def test_the_package_registers_its_classes_when_it_is_imported(reciting):
    """Why the command stands outside the package: this must stay true."""
    script = (
        f"import transxssm; from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(reciting)!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
