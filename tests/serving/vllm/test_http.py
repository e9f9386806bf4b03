"""The server over HTTP, as `transxssm serve` starts it: one for all tests here, of a model of random weights whose tokens are bytes."""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-serving` builds an environment that has it")

import aiohttp
import openai

from tests.serving.checkpoints import byte_tokenizer, write_random_checkpoint
from transxssm import TransXSSMForCausalLM
from transxssm.data.chat import set_chat_template

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 96}
CONTEXT = 512
START_SECONDS = 300  # on a machine that others use
TEXTS = [
    "def add(a, b):",
    "x",
    "import os\n\n",
    "class Stack:\n    ",
    "é€😀",
    "0123456789" * 12,
    " ",
    "return",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`transxssm serve` in a process of its own, up when this is made."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.url, self.log = f"http://127.0.0.1:{(port := free_port())}", log
        flags = [
            "--port",
            str(port),
            "--max-model-len",
            str(CONTEXT),
            "--kv-cache-memory-bytes",
            "64M",
            "--max-num-seqs",
            "16",
        ]
        command = [sys.executable, "-m", "transxssm", "serve", str(folder), *flags]
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_SECONDS
        while "Serving " not in log.read_text():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}{{"))

    def post(self, path: str, body: bytes) -> tuple[int, str]:
        request = urllib.request.Request(f"{self.url}{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def is_idle(self) -> bool:
        """Whether no request runs or waits, and no memory is held."""
        return not any(
            self.metric(name) for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        )

    def becomes_idle(self) -> bool:
        for _ in range(100):
            if self.is_idle():
                return True
            time.sleep(0.2)
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "little"
    write_random_checkpoint(folder, **SIZES)
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    server = Server(folder, tmp_path_factory.mktemp("logs") / "server.log")
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def model(folder):
    return TransXSSMForCausalLM.from_pretrained(folder)


def complete(server, prompt, **options):
    return server.client.completions.create(
        model="little",
        prompt=prompt,
        **({"max_tokens": 20, "temperature": 0, "extra_body": {"ignore_eos": True}} | options),
    )


def expected(model, prompt: str, num_tokens: int = 20) -> list[int]:
    ids = byte_tokenizer()(prompt, return_tensors="pt").input_ids
    return model.generate(ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)[
        0, ids.shape[1] :
    ].tolist()


EXACT = {"extra_body": {"ignore_eos": True, "return_token_ids": True}}


def test_sixteen_at_once_say_what_generate_says(server, model):
    prompts = [text + suffix for text in TEXTS for suffix in ("", "!")]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda prompt: complete(server, prompt, **EXACT), prompts))
    assert [answer.choices[0].token_ids for answer in answers] == [expected(model, prompt) for prompt in prompts]
    assert {answer.usage.completion_tokens for answer in answers} == {20}
    assert server.becomes_idle()


def test_several_prompts_in_one_request(server, model):
    answer = complete(server, TEXTS[:3], **EXACT)
    assert [choice.token_ids for choice in answer.choices] == [expected(model, text) for text in TEXTS[:3]]


def test_streaming_is_the_same_text_in_pieces(server):
    whole = complete(server, TEXTS[0]).choices[0].text
    pieces = [chunk.choices[0].text for chunk in complete(server, TEXTS[0], stream=True)]
    assert "".join(pieces) == whole
    assert len(pieces) > 10


def test_stop(server):
    text = complete(server, TEXTS[0]).choices[0].text
    stop = text[5]
    choice = complete(server, TEXTS[0], stop=[stop]).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_logprobs_are_the_models(server, model):
    names = {
        "extra_body": EXACT["extra_body"] | {"return_tokens_as_token_ids": True}
    }  # bytes alone would have one name, no text
    choice = complete(server, TEXTS[0], logprobs=3, **names).choices[0]
    ids = byte_tokenizer()(TEXTS[0]).input_ids
    with torch.no_grad():
        scores = model(torch.tensor([ids + choice.token_ids])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    wanted, likeliest = scores.topk(3)
    assert choice.logprobs.token_logprobs == pytest.approx(wanted[:, 0].tolist(), abs=1e-3)
    for row, tops in enumerate(choice.logprobs.top_logprobs):
        assert list(tops.values()) == pytest.approx(wanted[row].tolist(), abs=1e-3)
        assert set(tops) == {f"token_id:{token}" for token in likeliest[row].tolist()}


def test_echo(server):
    choice = complete(server, TEXTS[0], echo=True, max_tokens=1).choices[0]
    assert choice.text.startswith(TEXTS[0])


def test_samples_and_their_seed(server):
    options = {"n": 4, "temperature": 1.0, "seed": 7}
    first, second = ([choice.text for choice in complete(server, "a", **options).choices] for _ in range(2))
    assert first == second
    assert len(set(first)) == 4
    assert [choice.text for choice in complete(server, "a", **options | {"seed": 8}).choices] != first


def test_prefix_is_cached(server):
    prompt = "0123456789abcdef" * 20
    complete(server, prompt + "x")
    answer = complete(server, prompt + "y")
    assert answer.usage.prompt_tokens_details.cached_tokens >= 128


def test_chat(server, model):
    messages = [{"role": "user", "content": "Hello"}]
    answer = server.client.chat.completions.create(
        model="little", messages=messages, max_tokens=20, temperature=0, **EXACT
    )
    prompt = "<|endoftext|>user\nHello<|endoftext|>assistant\n"
    ids = torch.tensor([byte_tokenizer()(prompt, add_special_tokens=False).input_ids])
    wanted = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].token_ids == wanted
    assert answer.usage.prompt_tokens == ids.shape[1]
    chunks = server.client.chat.completions.create(
        model="little", messages=messages, max_tokens=20, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content


def test_models_are_listed(server):
    assert [entry.id for entry in server.client.models.list()] == ["little"]


def test_page(server):
    with urllib.request.urlopen(f"{server.url}/") as response:
        page = response.read().decode()
        assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "const isChat = true;" in page
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed here: the page's script was not run")
    told = asyncio.run(told_by_page(browser, f"{server.url}/?prompt=Hello"))
    assert float(told["speed"]) > 0
    assert told["prefix"].startswith("22 tokens, ")
    assert told["memory"].endswith("%")
    assert told["model"] == "little"
    assert len(told["text"]) > len("Hello")


async def told_by_page(browser: str, url: str) -> dict[str, str]:
    """What the page shows in a browser when it has written; a picture of it goes where SCREENSHOT says."""
    port = free_port()
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--remote-debugging-port={port}",
        "--window-size=800,700",
        url,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    read = "Object.fromEntries([...document.querySelectorAll('[id]')].map((part) => [part.id, part.textContent]))"
    try:
        async with aiohttp.ClientSession() as session:
            targets: list[dict[str, str]] = []
            while not any(target["type"] == "page" for target in targets):
                with contextlib.suppress(aiohttp.ClientError):
                    targets = await (await session.get(f"http://127.0.0.1:{port}/json")).json()
                await asyncio.sleep(0.2)
            [address] = [target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page"]
            async with session.ws_connect(address, max_msg_size=0) as page:
                for number in range(600):
                    question = {"expression": read, "returnByValue": True}
                    await page.send_json({"id": number, "method": "Runtime.evaluate", "params": question})
                    told = (await page.receive_json())["result"]["result"].get("value", {})
                    if told.get("speed", "–") != "–" and told["memory"] != "–":
                        break
                    await asyncio.sleep(0.2)
                if "SCREENSHOT" in os.environ:
                    await page.send_json({"id": 1000, "method": "Page.captureScreenshot"})
                    Path(os.environ["SCREENSHOT"]).write_bytes(
                        base64.b64decode((await page.receive_json())["result"]["data"])
                    )
                return told
    finally:
        process.terminate()
        process.wait(30)


GOOD = {"model": "little", "prompt": "a", "max_tokens": 2}
BAD = {
    "malformed": b'{"model": "little", "prompt": ',
    "no object": b"[1, 2]",
    "empty": b"",
    "invalid UTF-8": b'{"model": "little", "prompt": "\xff\xfe"}',
    "nothing asked": b"{}",
    "prompt of a wrong type": GOOD | {"prompt": {"text": "a"}},
    "temperature of a wrong type": GOOD | {"temperature": "hot"},
    "negative temperature": GOOD | {"temperature": -1},
    "negative tokens": GOOD | {"max_tokens": -5},
    "no samples": GOOD | {"n": 0},
    "tokens that do not exist": GOOD | {"prompt": [10**6]},
    "over-long prompt": GOOD | {"prompt": "a" * (2 * CONTEXT)},
    "over-long answer": GOOD | {"max_tokens": 2 * CONTEXT},
    "too many logprobs": GOOD | {"logprobs": 10**6},
    "another model": GOOD | {"model": "other"},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_the_clients(case, server):
    body = BAD[case]
    status, text = server.post("/v1/completions", body if isinstance(body, bytes) else json.dumps(body).encode())
    assert 400 <= status < 500, text
    assert "error" in json.loads(text) or "detail" in json.loads(text)
    assert complete(server, "a").choices[0].text  # and the next one is answered


def test_disconnected_clients_leave_nothing(server):
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(GOOD | {"max_tokens": 400, "stream": True, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(8):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            connection.recv(200)
    assert server.becomes_idle()


def test_sigterm_answers_or_closes_what_was_accepted(folder, tmp_path):
    server = Server(folder, tmp_path / "server.log")
    outcomes: list[str] = []

    def ask() -> None:
        try:
            answer = complete(server, "a", max_tokens=200)
            outcomes.append(answer.choices[0].finish_reason)
        except openai.OpenAIError as error:
            outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=ask) for _ in range(32)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    assert server.stop() == 0
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == len(threads)  # none hangs
    assert set(outcomes) <= {"length", "abort", "APIConnectionError", "InternalServerError", "APIError"}
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
        pytest.fail("a process of the server was left")
