"""`transxssm serve` around the server: its address, its greeting, its end. A few lines of Python stand in for vLLM."""

import json
import os
import shlex
import signal
import socket
import subprocess
import threading

import pytest
import typer

from transxssm_cli import serve
from transxssm_cli.app import app
from transxssm_cli.one_line_errors import EXIT_USER_ERROR

STAND_IN = """
import os, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

if "--fail" in sys.argv:
    sys.exit(int(sys.argv[sys.argv.index("--fail") + 1]))
if "--deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Starts it in place of vLLM's server; gives the processes that were started."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(serve, "SERVER", "stand_in")
    monkeypatch.setattr(serve, "START_GRACE_SECONDS", 0.3)
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **options: started.append(popen(*args, **options)) or started[-1]
    )
    return started


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_greets_and_ends(signum, stand_in, port, tmp_path, monkeypatch):
    greetings = []

    def greet(text: str) -> None:
        greetings.append(text)
        os.kill(os.getpid(), signum)

    monkeypatch.setattr(typer, "echo", greet)
    serve.run_server(tmp_path, ["--seed", "1"], host="127.0.0.1", port=port, verbose=False)
    assert greetings[0].startswith(f"Serving {tmp_path.name} at http://127.0.0.1:{port} ")
    assert stand_in[0].returncode == -signal.SIGTERM
    assert stand_in[0].args[-2:] == ["--seed", "1"]


def test_is_killed_when_it_does_not_hear(stand_in, port, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "_answers", lambda *address: False)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    serve.run_server(tmp_path, ["--deaf"], host="127.0.0.1", port=port, verbose=False)
    assert stand_in[0].returncode in (-signal.SIGKILL, -signal.SIGTERM)  # the second where it had not begun


@pytest.mark.parametrize(("code", "said"), [(EXIT_USER_ERROR, ""), (1, "the server ended by itself (exit code 1)")])
def test_passes_on_how_the_server_ended(code, said, stand_in, port, tmp_path, capsys):
    with pytest.raises(typer.Exit) as ended:
        serve.run_server(tmp_path, ["--fail", str(code)], host="127.0.0.1", port=port, verbose=False)
    assert ended.value.exit_code == code
    assert said in capsys.readouterr().err


def test_refuses_a_port_in_use(port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ValueError, match=rf"cannot listen on 127\.0\.0\.1:{port}.*give another --port"):
            serve.require_free("127.0.0.1", port)


def test_greeting_is_a_request_that_can_be_pasted(tmp_path):
    lines = serve.greeting(
        tmp_path, ["--served-model-name=mine", "--api-key", "secret"], "http://[::1]:8000", 3
    ).splitlines()
    curl = shlex.split(lines[1])
    assert curl[:2] == ["curl", "http://[::1]:8000/v1/completions"]
    assert "Authorization: Bearer secret" in curl
    assert json.loads(curl[-1])["model"] == "mine"
    compile(shlex.split(lines[2])[-1], "client", "exec")
    (tmp_path / "chat_template.jinja").touch()
    chat = serve.greeting(tmp_path, [], "http://127.0.0.1:8000", 3).splitlines()
    assert json.loads(shlex.split(chat[1])[-1])["messages"]
    assert "chat.completions.create" in chat[2]


def test_takes_vllm_flags_after_the_checkpoint(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(serve, "run_server", lambda folder, flags, **options: calls.append((folder, flags, options)))
    with pytest.raises(SystemExit) as ended:
        app(["--verbose", "serve", str(tmp_path), "--port", "9", "--max-model-len", "64", "--enforce-eager"])
    assert ended.value.code == 0
    assert calls == [
        (tmp_path, ["--max-model-len", "64", "--enforce-eager"], {"host": "127.0.0.1", "port": 9, "verbose": True})
    ]


def test_without_vllm_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    from transxssm.serving.vllm import plugin, server

    monkeypatch.setattr(plugin, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        server.main([str(tmp_path)])
    assert ended.value.code == EXIT_USER_ERROR
    assert "install transxssm[vllm]" in capsys.readouterr().err


def test_refuses_flags_that_have_no_address(tmp_path):
    with pytest.raises(ValueError, match="--uds"):
        serve.run_server(tmp_path, ["--uds=/tmp/socket"], host="127.0.0.1", port=1, verbose=False)
