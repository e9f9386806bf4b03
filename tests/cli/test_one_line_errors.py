"""A mistake of the user is one line and exit code 2; a mistake in the code keeps its traceback."""

import errno

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassFieldValidationError

from transxssm_cli import information
from transxssm_cli.one_line_errors import DEBUG_VARIABLE, NETWORK_ERROR

# Of the hub's client, whose module's name depends on its version.
NetworkError = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == NETWORK_ERROR)


@pytest.fixture
def failing(monkeypatch):
    """Makes `transxssm info tiny` fail with an error."""

    def fail(error: BaseException) -> tuple[str, str]:
        def describe(*arguments, **options):
            raise error

        monkeypatch.setattr(information, "describe", describe)
        return "info", "tiny"

    return fail


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "No such command 'trian'"),
        (["generate"], "Missing argument 'checkpoint'"),
        (["info", "tiny", "--contxt", "3"], "No such option"),
        (["info", "tiny", "--context", "many"], "Invalid value for '--context'"),
        (["generate", "a", "b"], "unexpected extra argument"),
        (
            ["evaluate", "runs/tiny"],
            "Missing command. Expected one of perplexity, needle, recall, algorithmic, harness.",
        ),
        (["evaluate", "runs/tiny", "xyz"], "No such command 'xyz'. Expected one of perplexity, needle,"),
        (["benchmark", "xyz"], "No such command 'xyz'. Expected one of throughput, decode, ops, serving."),
    ],
    ids=str,
)
def test_usage(error_of, arguments, words):
    assert words in error_of(*arguments)


@pytest.mark.parametrize("group", ["evaluate", "benchmark"])
def test_a_group_alone_shows_its_help(run, group):
    result = run(group)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.strip() == run(group, "--help").stdout.strip()
    assert f"{group} [OPTIONS]" in result.stdout


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("got 3,\n expected 4"), "got 3, expected 4"),
        (ValueError(), "ValueError"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), "a.txt: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("in words of its own"), "in words of its own"),
        (MemoryError("too large"), "too large"),
        (torch.OutOfMemoryError("out of memory"), "out of memory"),
        (NetworkError("no such name"), "the network failed, or the hub of models did not answer: no such name"),
    ],
    ids=repr,
)
def test_what_the_user_or_the_machine_did(error_of, failing, error, line):
    assert error_of(*failing(error)) == line


def test_a_strict_dataclass_tells_its_cause(error_of, failing):
    cause = TypeError("Field 'width' expected int,\n got str")
    error = StrictDataclassFieldValidationError("width", cause)
    error.__cause__ = cause
    assert error_of(*failing(error)) == "Field 'width' expected int, got str"


@pytest.mark.parametrize(
    "error", [TypeError("ours"), AssertionError("ours"), KeyError("ours"), RuntimeError("ours")], ids=repr
)
def test_a_mistake_in_the_code_keeps_its_traceback(run, failing, error):
    with pytest.raises(type(error), match="ours"):
        run(*failing(error))


def test_debugging_shows_the_traceback_of_a_users_mistake_too(run, failing, monkeypatch):
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    with pytest.raises(ValueError, match="theirs"):
        run(*failing(ValueError("theirs")))


@pytest.mark.parametrize(
    ("words", "line"), [("", "interrupted\n"), ("stopped after step 3", "interrupted: stopped after step 3\n")]
)
def test_an_interruption_is_one_line_too(run, failing, words, line):
    result = run(*failing(KeyboardInterrupt(words)))
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", line)
