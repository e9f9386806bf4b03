"""What a user did wrong is one line and exit code 2; what we did wrong keeps its traceback."""

import os
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

DEBUG_VARIABLE = "TRANSXSSM_DEBUG"
LAUNCHER_VARIABLE = "TRANSXSSM_LAUNCHED"  # set in the processes of `--gpus`
EXIT_USER_ERROR = 2
EXIT_PROCESS_LOST = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
NETWORK_ERROR = "HTTPError"  # of the client under huggingface_hub: no route, no name, no answer
# Typer carries click inside itself in newer versions and not in older ones; through its own subclass both are found.
_UsageError: Any = typer.BadParameter.__base__


class OneLineErrors(TyperGroup):
    """The group of commands: no arguments show the help, and errors are told as this module says."""

    def main(self, args: Any = None, *rest: Any, **options: Any) -> NoReturn:
        arguments = list(sys.argv[1:] if args is None else args)
        try:
            result = super().main(arguments or ["--help"], *rest, **(options | {"standalone_mode": False}))
        except Exception as error:
            if (
                type(error).__name__ == "NoArgsIsHelpError"
            ):  # a group alone: its help has been shown as the error was made
                sys.exit(0)
            if os.environ.get(DEBUG_VARIABLE):
                raise
            if has_lost_a_process(error):
                if LAUNCHER_VARIABLE not in os.environ:  # which says which one it was
                    typer.echo("error: another process of this run ended, and this one with it", err=True)
                sys.exit(EXIT_PROCESS_LOST)
            if not is_users(error):
                raise
            typer.echo(f"error: {line_of(error)}", err=True)
            sys.exit(EXIT_USER_ERROR)
        sys.exit(result if isinstance(result, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:  # Typer would drop its words
            typer.echo(f"interrupted: {stop}" if str(stop) else "interrupted", err=True)
            # The launcher ends all processes when one fails, and the first must come to its own end to be heard.
            is_first = LAUNCHER_VARIABLE not in os.environ or os.environ.get("RANK", "0") == "0"
            raise typer.Exit(EXIT_INTERRUPTED if is_first else 0) from stop


def is_users(error: Exception) -> bool:
    """Whether an error comes from what the user gave or from the machine, rather than from a mistake in the code.

    By name where the class would have to be imported to be known.
    """
    if isinstance(error, (ValueError, OSError, MemoryError, _UsageError)):
        return True
    names = {base.__name__ for base in type(error).__mro__}
    return bool(names & {"StrictDataclassError", "OutOfMemoryError", NETWORK_ERROR})


def has_lost_a_process(error: Exception) -> bool:
    """Whether an error says that another process of a launch has gone."""
    names = {base.__name__ for base in type(error).__mro__}
    is_of_a_backend = isinstance(error, RuntimeError) and any(word in str(error) for word in ("/gloo/", "NCCL"))
    return "LOCAL_RANK" in os.environ and (bool(names & {"DistBackendError", "DistNetworkError"}) or is_of_a_backend)


def line_of(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, _UsageError):
        text = error.format_message() + _commands_of(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif type(error).__name__.startswith("StrictDataclass") and error.__cause__ is not None:
        text = str(error.__cause__)
    elif not isinstance(error, OSError) and NETWORK_ERROR in {base.__name__ for base in type(error).__mro__}:
        text = f"the network failed, or the hub of models did not answer: {error}"
    else:
        text = str(error)
    return " ".join(text.split()) or type(error).__name__


def _commands_of(error: Any) -> str:
    """The commands that a group has, where none was given, or one that none of them is near to."""
    group = getattr(error.ctx, "command", None)
    if not isinstance(group, TyperGroup) or "ommand" not in error.message or "?" in error.message:
        return ""
    return f" Expected one of {', '.join(group.list_commands(error.ctx))}."
