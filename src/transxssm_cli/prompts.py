"""What `transxssm generate` continues: the prompts of a command line, read before torch is imported."""

import json
import os
import secrets
import stat
import sys
from pathlib import Path

STDIN = "-"
JSON_LINES = (".jsonl", ".ndjson")


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The text of a single prompt: from the option, a file, or standard input.

    What is piped in is the prompt where none is named; without a pipe it is then empty, and a new document begins.

    Raises:
        ValueError: it is no UTF-8 text. OSError: the file can't be read.
    """
    if prompt_file is not None:
        return _text_of(prompt_file)
    if prompt == STDIN or (prompt is None and _is_piped()):
        return _decoded("standard input", sys.stdin.buffer.read())
    return prompt or ""


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: of .jsonl and .ndjson a string, or an object with a `prompt`, in each line; else each line as it is.

    Raises:
        ValueError: no prompt in a line, no line at all, or no UTF-8 text. OSError: the file can't be read.
    """
    lines = _text_of(path).split("\n")
    lines = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    if not lines:
        raise ValueError(f"--prompts: {path} is empty: expected a prompt in each line")
    if path.suffix.lower() not in JSON_LINES:
        return lines
    return [_prompt_of(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def new_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbelow(2**32)


def _prompt_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    prompt = record.get("prompt") if isinstance(record, dict) else record
    if not isinstance(prompt, str):
        raise ValueError(f'{where}: got {line.strip()[:80]}, expected a string or {{"prompt": "…"}}')
    return prompt


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file: a terminal would wait for a reader, and the null device has nothing to say."""
    if sys.stdin is None:
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # a stream without a file
        return not sys.stdin.isatty()
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _text_of(path: Path) -> str:
    return _decoded(str(path), path.expanduser().read_bytes())


def _decoded(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the prompt in {name} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}"
        ) from None
