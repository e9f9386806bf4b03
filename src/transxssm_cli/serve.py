"""`transxssm serve`: starts vLLM's server in a process of its own, says when it answers, and ends it with this one.

Importing torch and vLLM takes seconds, and is the server's alone.
"""

import json
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import typer

from transxssm_cli.one_line_errors import EXIT_USER_ERROR

SERVER = "transxssm.serving.vllm.server"
DRAIN_SECONDS = 10  # in which requests that are under way may end, once the server is told to
GRACE_SECONDS = 15  # for the rest, before it is killed
START_GRACE_SECONDS = 3  # while it starts, vLLM may miss a signal, and no request waits
POLL_SECONDS = 0.2
EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # and where it is reached from here
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}
UNSUPPORTED = {
    "--uds": "listens on a host and a port",
    "--grpc": "speaks HTTP",
}


def run_server(folder: Path, flags: Sequence[str], *, host: str, port: int, verbose: bool) -> None:
    """Serves a checkpoint until Ctrl-C or SIGTERM.

    Raises:
        ValueError: the port is in use; a flag of vLLM's that this command takes no part in.
        typer.Exit: the server ended by itself; why has been said.
    """
    for flag, what in UNSUPPORTED.items():
        if _has(flags, flag):
            raise ValueError(f"{flag}: transxssm serve {what}; leave it out")
    is_headless = _has(flags, "--headless")  # another machine's server answers
    if not is_headless:
        require_free(host, port)
    quiet = [] if verbose else ["--uvicorn-log-level", "warning", "--disable-uvicorn-access-log"]
    arguments = [
        str(folder),
        "--host",
        host,
        "--port",
        str(port),
        "--shutdown-timeout",
        str(DRAIN_SECONDS),
        *quiet,
        *flags,
    ]
    environment = ({} if verbose else QUIET) | {"VLLM_NO_USAGE_STATS": "1"} | os.environ
    started = time.monotonic()
    is_ready = is_headless
    with _signals() as received:
        # A session of its own: Ctrl-C reaches this process alone, and what the server leaves behind can be ended as one group.
        process = subprocess.Popen([sys.executable, "-m", SERVER, *arguments], env=environment, start_new_session=True)
        try:
            scheme = "https" if _has(flags, "--ssl-certfile") else "http"
            while process.poll() is None and not received:
                if not is_ready and _answers(scheme, host, port):
                    is_ready = True
                    url = f"{scheme}://{_reachable(host)}:{port}"
                    typer.echo(greeting(folder, flags, url, time.monotonic() - started))
                time.sleep(POLL_SECONDS)
        finally:
            _end(process, DRAIN_SECONDS + GRACE_SECONDS if is_ready else START_GRACE_SECONDS)
    if received:
        return
    code = process.returncode
    if code != EXIT_USER_ERROR:
        typer.echo(f"error: the server ended by itself (exit code {code}); --verbose shows all that it says", err=True)
    raise typer.Exit(code if code > 0 else 1)


def _end(process: "subprocess.Popen[bytes]", grace_seconds: float) -> None:
    """SIGTERM, time for what is under way, then the end of all that is left."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_seconds)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the signals that ask for an end, in place of what they would do."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def require_free(host: str, port: int) -> None:
    """Checks that a server may listen there.

    Raises:
        ValueError: another program does, or the machine has no such address.
    """
    try:
        [(family, kind, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; give another --port") from None


def greeting(folder: Path, flags: Sequence[str], url: str, seconds: float) -> str:
    """Where the server is, and a first request, for a shell and for Python."""
    model = _value(flags, "--served-model-name") or folder.resolve().name
    key = _value(flags, "--api-key")
    body: dict[str, object] = {"model": model, "prompt": "def ", "max_tokens": 50}
    path, call, result = "completions", f"completions.create(model={model!r}, prompt='def ', max_tokens=50)", "text"
    if (folder / "chat_template.jinja").is_file():
        messages = [{"role": "user", "content": "Hello!"}]
        body = {"model": model, "messages": messages, "max_tokens": 50}
        path, call = (
            "chat/completions",
            f"chat.completions.create(model={model!r}, messages={messages!r}, max_tokens=50)",
        )
        result = "message.content"
    header = f" -H 'Authorization: Bearer {key}'" if key else ""
    client = (
        f"from openai import OpenAI; client = OpenAI(base_url='{url}/v1', api_key={key or 'none'!r}); "
        f"print(client.{call}.choices[0].{result})"
    )
    return (
        f"Serving {model} at {url} (a page to try it on; ready after {seconds:.0f} s; Ctrl-C ends it)\n"
        f"  curl {url}/v1/{path} -H 'Content-Type: application/json'{header} -d {shlex.quote(json.dumps(body))}\n"
        f'  python -c "{client}"'
    )


def _answers(scheme: str, host: str, port: int) -> bool:
    context = ssl._create_unverified_context() if scheme == "https" else None
    try:
        with urllib.request.urlopen(
            f"{scheme}://{_reachable(host)}:{port}/health", timeout=5, context=context
        ) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False


def _reachable(host: str) -> str:
    address = EVERY_ADDRESS.get(host, host)
    return f"[{address}]" if ":" in address else address


def _has(flags: Sequence[str], name: str) -> bool:
    return any(flag == name or flag.startswith(f"{name}=") for flag in flags)


def _value(flags: Sequence[str], name: str) -> str | None:
    for position, flag in enumerate(flags):
        if flag == name and position + 1 < len(flags):
            return flags[position + 1]
        if flag.startswith(f"{name}="):
            return flag.removeprefix(f"{name}=")
    return None
