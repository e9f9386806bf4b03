"""Processes that tests start. They are forked from a server that has imported what they need: a new interpreter would take ten seconds."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_PRELOADED = ["transxssm.training", "transxssm.generation", "transxssm_cli.app", "transxssm_cli.training"]
_is_server_ours = False


def start(
    function: Callable[..., Any], *arguments: Any, output: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Starts `function(*arguments)` in a process of its own.

    Args:
        function: of a module, since the process finds it by its name.
        output: a folder for the files `stdout` and `stderr`; one that is a pipe there already is written to.
        environment: variables beside those of this process.
    """
    global _is_server_ours
    context = multiprocessing.get_context("forkserver")
    if not _is_server_ours:
        forkserver._forkserver._stop()  # one that has imported less
        context.set_forkserver_preload(_PRELOADED)
        _is_server_ours = True
    output.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, **(environment or {})}
    process = context.Process(target=_run, args=(function, arguments, str(output), variables))
    process.start()
    return process


def command(*arguments: object) -> None:
    """`transxssm` with these arguments, for `start`."""
    from transxssm_cli.__main__ import main

    sys.argv = ["transxssm", *map(str, arguments)]
    main()


def start_ranks(
    number: int,
    function: Callable[..., Any],
    *arguments: Any,
    output: Path,
    environment: Mapping[str, str] | None = None,
) -> list[BaseProcess]:
    """Starts the function in processes that find each other as those of `torchrun` do, each with a folder named by its rank."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",  # gloo's barrier would look for a GPU for each process
    }
    return [
        start(
            function,
            *arguments,
            output=output / str(rank),
            environment={**(environment or {}), **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(number)
    ]


def exit_codes(processes: Sequence[BaseProcess]) -> list[int | None]:
    """Waits for all of them; where one fails, the others, which may wait for it, are ended."""
    try:
        running = {process.sentinel: process for process in processes}
        while running:
            for sentinel in connection.wait([*running]):
                process = running.pop(sentinel)
                process.join()
                if process.exitcode != 0:
                    for other in running.values():
                        other.terminate()
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def said(output: Path, name: str = "stderr") -> str:
    """What the processes of a folder have written, each one's after the other's."""
    return "".join(path.read_text(encoding="utf-8") for path in sorted(output.rglob(name)))


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], output: str, variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(output, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    function(*arguments)
