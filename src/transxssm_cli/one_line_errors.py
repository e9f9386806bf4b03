"""Errors of the user become one line and exit code 2. Errors in the code keep their traceback."""

import os
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

DEBUG_VARIABLE = "TRANSXSSM_DEBUG"
LAUNCHER_VARIABLE = "TRANSXSSM_LAUNCHED"  # set in processes started by `--gpus`
EXIT_USER_ERROR = 2
EXIT_PROCESS_LOST = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
NETWORK_ERROR = "HTTPError"  # raised by huggingface_hub's client if the network or the server does not respond
# Newer versions of Typer contain click, older ones import it. Typer's own subclass leads to either.
_UsageError: Any = typer.BadParameter.__base__


class OneLineErrors(TyperGroup):
    """The group of commands. It shows the help if there are no arguments, and reports errors as this module says."""

    def main(self, args: Any = None, *rest: Any, **options: Any) -> NoReturn:
        arguments = list(sys.argv[1:] if args is None else args)
        try:
            result = super().main(arguments or ["--help"], *rest, **(options | {"standalone_mode": False}))
        except Exception as error:
            if (
                type(error).__name__ == "NoArgsIsHelpError"
            ):  # a group without a command: creating the error has shown its help
                sys.exit(0)
            if os.environ.get(DEBUG_VARIABLE):
                raise
            if has_lost_a_process(error):
                if LAUNCHER_VARIABLE not in os.environ:  # the launcher says which one it was
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
        except KeyboardInterrupt as stop:  # Typer would drop its message
            typer.echo(f"interrupted: {stop}" if str(stop) else "interrupted", err=True)
            # The launcher ends all processes when one fails, and the first must be able to print its message.
            is_first = LAUNCHER_VARIABLE not in os.environ or os.environ.get("RANK", "0") == "0"
            raise typer.Exit(EXIT_INTERRUPTED if is_first else 0) from stop


def is_users(error: Exception) -> bool:
    """Whether an error comes from the user's input or from the machine, and not from a mistake in the code.

    Classes that would have to be imported are recognised by name.
    """
    if isinstance(error, (ValueError, OSError, MemoryError, _UsageError)):
        return True
    names = {base.__name__ for base in type(error).__mro__}
    return bool(names & {"StrictDataclassError", "OutOfMemoryError", NETWORK_ERROR})


def has_lost_a_process(error: Exception) -> bool:
    """Whether an error says that another process of a launch has ended."""
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
    """The commands of a group, if none was given, or one that is unlike all of them."""
    group = getattr(error.ctx, "command", None)
    if not isinstance(group, TyperGroup) or "ommand" not in error.message or "?" in error.message:
        return ""
    return f" Expected one of {', '.join(group.list_commands(error.ctx))}."
