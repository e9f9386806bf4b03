"""Checks the paths, names, prompts and extras of a command line before torch is imported, so that errors appear at once.

The library checks them again for its own callers. Importing it takes seconds, so that this module repeats some of its names.
"""

import difflib
import importlib.metadata
import importlib.util
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGE = "transxssm"
DEFAULT_RECIPE = "tiny"
PRESETS = ("tiny", "small", "320m", "1.3b", "tiny-conv", "small-conv", "320m-conv", "1.3b-conv")
BUNDLED_IN = {"recipe": "transxssm", "study": "transxssm_lab"}
CORPORA = ("python-stdlib", "python-environment")
# Files of a repository on the hub that a checkpoint needs. Pickled weights are left out, since loading them may run code.
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")

STDIN = "-"
JSON_LINES = (".jsonl", ".ndjson")


def require_extra(extra: str) -> None:
    """Checks that the libraries of an extra are installed.

    The package's metadata lists them, so that extras are defined in pyproject.toml only.

    Raises:
        ValueError: libraries are missing. The message says what to install.
    """
    if missing := missing_of(extra):
        raise ValueError(
            f"this command needs {', '.join(missing)}, which the extra {extra} brings: pip install '{PACKAGE}[{extra}]'"
        )


def missing_of(extra: str) -> list[str]:
    """Names of an extra's distributions that are not installed. Empty if the package has no metadata, as in a bare checkout."""
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    names = [line for line in lines if re.search(rf"""extra\s*==\s*["']{extra}["']""", line)]
    required = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in names]
    return [name for name in required if name != PACKAGE and not _is_installed(name)]


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def checkpoint_folder(name: str, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: a local path, or the model `owner/name` on the hub, downloaded into its cache.

    Args:
        name: path or name that the user gave.
        weights: whether weights are needed in addition to the configuration and the tokenizer.

    Raises:
        ValueError: there is neither such a folder nor such a model on the hub, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"no checkpoint folder {name}: found a file there, expected a run folder or a saved model")
    # runs/tinny could also be a model on the hub, but is a mistyped path if runs/tiny exists.
    if not _HUB_NAME.fullmatch(name) or nearest(path):
        raise ValueError(
            f"no checkpoint folder {name}: found nothing there{nearest(path)}; expected a run folder, a saved model, "
            "or owner/name on the hub of models"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [pattern for pattern in _HUB_FILES if weights or pattern != "*.safetensors"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise ValueError(
            f"{name}: found neither a folder of this path nor a model of this name on the hub that may be read; "
            "check the name, and hf auth login if the model is private"
        ) from None
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name}: found no folder of this path, and the hub of models cannot be asked for it: {_first_line(error)}; "
            "go online, or give a folder"
        ) from None
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name} on the hub holds no model: config.json is missing")
    if weights and not any(folder.glob("*.safetensors")):
        raise ValueError(f"{name} on the hub has no weights in safetensors, the one format that is taken from there")
    return folder


def require_model(name: str) -> Path | None:
    """The folder of a model that is named as for `checkpoint_folder`, without weights, or None for the name of a preset.

    Raises:
        ValueError: see `checkpoint_folder`; or the name is neither a preset nor a folder.
    """
    if name in PRESETS:
        return None
    if not Path(name).expanduser().exists() and "/" not in name:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else nearest(Path(name))
        raise ValueError(f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor a checkpoint folder{hint}")
    return checkpoint_folder(name, weights=False)


def require_path(option: str, path: Path | None) -> None:
    """Checks that the file or folder of an option exists.

    Raises:
        ValueError: it does not exist.
    """
    if path is not None and not path.expanduser().exists():
        raise ValueError(f"{option}: {path}: No such file or directory{nearest(path)}")


def require_recipe(kind: str, name: str, overrides: Sequence[str]) -> None:
    """Checks that a recipe exists, and the local text that it or an override names.

    Args:
        kind: "recipe" or "study", for the message.
        name: name of a bundled one, or path of a YAML file.
        overrides: each is `section.key=value`.

    Raises:
        ValueError: the recipe or the text does not exist. The message names the nearest one.
    """
    bundled = _bundled(kind)
    path = Path(name).expanduser()
    if name not in bundled and not path.exists():
        close = difflib.get_close_matches(name, bundled, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"no {kind} {name!r}: {hint}Expected a YAML file, or one of {', '.join(bundled)}")
    corpus, validation = (setting(name, overrides, f"data.{key}") for key in ("corpus", "validation"))
    if isinstance(corpus, str) and corpus:
        _require_corpus(corpus)
    if isinstance(validation, str) and not Path(validation).expanduser().exists():
        hint = nearest(Path(validation))
        raise ValueError(f"no data.validation {validation!r}{hint}: expected a file or folder that exists")


def setting(name: str, overrides: Sequence[str], key: str) -> Any:
    """What a user's own recipe or the last override says about `section.key`, or None if neither sets it or can be read."""
    for override in reversed(overrides):
        given, equals, text = override.partition("=")
        if equals and given.strip() == key:
            return _yaml(text)
    path = Path(name).expanduser()
    value = _yaml(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def require_run(name: str, overrides: Sequence[str]) -> None:
    """Checks that the folder of a run to be resumed exists.

    Raises:
        ValueError: it does not exist. The message names the nearest one.
    """
    given = setting(name, overrides, "training.output_dir")
    folder = Path(given if isinstance(given, str) and given else f"runs/{Path(name).stem}").expanduser()
    if not folder.exists():
        raise ValueError(
            f"nothing to resume in {folder}: it does not exist{nearest(folder)}; leave out --resume to start anew"
        )


def split_arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The recipe's name and the overrides. If the first argument has "=" and is not a file, it overrides the default recipe."""
    if not arguments:
        return DEFAULT_RECIPE, []
    first, *rest = arguments
    if "=" in first and not Path(first).is_file():
        return DEFAULT_RECIPE, list(arguments)
    return first, rest


def nearest(path: Path) -> str:
    """A hint in brackets at the path that a missing one may mean: the nearest name in the last existing folder. Empty if none is near."""
    path = path.expanduser()
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    try:
        names = [entry.name for entry in missing.parent.iterdir()]
    except OSError:
        return ""
    for name in difflib.get_close_matches(missing.name, names):
        meant = missing.parent / name / path.relative_to(missing)
        if meant.exists():
            return f" (did you mean {meant}?)"
    return ""


def _require_corpus(corpus: str) -> None:
    path = Path(corpus).expanduser()
    close = difflib.get_close_matches(corpus, CORPORA, n=1)
    hint = f" (did you mean {close[0]}?)" if close else nearest(path)
    if corpus in CORPORA or path.exists() or (_HUB_NAME.fullmatch(corpus) and not hint):
        return
    raise ValueError(
        f"no corpus {corpus!r}{hint}: expected {' or '.join(CORPORA)} (embedded), a file or folder that exists, or a hub data set "
        "owner/name"
    )


def _yaml(text: str) -> Any:
    """The value of a YAML text, or None if it is invalid. The error is reported when the library reads it."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _bundled(kind: str) -> list[str]:
    """Names of the recipes or studies of the project's packages, which are found without importing them."""
    spec = importlib.util.find_spec(BUNDLED_IN[kind])
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return sorted(path.stem for path in Path(spec.submodule_search_locations[0], "recipes").glob("*.yaml"))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".") or type(error).__name__


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The text of a single prompt: from the option, a file, or standard input.

    Piped input is the prompt if no other is given. Without a pipe the prompt is then empty, and a new document begins.

    Raises:
        ValueError: the prompt is not UTF-8 text. OSError: the file cannot be read.
    """
    if prompt_file is not None:
        return _text_of(prompt_file)
    if prompt == STDIN or (prompt is None and _is_piped()):
        return _decoded("standard input", sys.stdin.buffer.read())
    return prompt or ""


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file. Each line is a prompt or, in .jsonl and .ndjson, a JSON string or an object with a `prompt`.

    Raises:
        ValueError: a line has no prompt, there is no line, or the file is not UTF-8 text. OSError: the file cannot be read.
    """
    lines = _text_of(path).split("\n")
    lines = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    if not lines:
        raise ValueError(f"--prompts: {path} is empty: expected a prompt in each line")
    if path.suffix.lower() not in JSON_LINES:
        return lines
    return [_prompt_of(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def new_seed() -> int:
    """A random seed."""
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
    """Whether standard input is a pipe or a file: a terminal would wait for input, and the null device is empty."""
    if sys.stdin is None:
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # the stream has no file descriptor
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
