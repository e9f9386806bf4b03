"""Paths, names, prompts and extras that a command line needs, checked before torch is imported: a mistyped one is answered at once.

The library checks them again for its own callers. Importing it takes seconds, so that names which it knows are repeated here.
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
# What a checkpoint needs of a repository on the hub: never pickled weights, of which loading may run code.
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")

STDIN = "-"
JSON_LINES = (".jsonl", ".ndjson")


def require_extra(extra: str) -> None:
    """Checks that the libraries of an extra are installed.

    Which they are is what the package's own metadata says, so that an extra is written down in pyproject.toml alone.

    Raises:
        ValueError: one or more are missing; says what to install.
    """
    if missing := missing_of(extra):
        raise ValueError(
            f"this command needs {', '.join(missing)}, which the extra {extra} brings: pip install '{PACKAGE}[{extra}]'"
        )


def missing_of(extra: str) -> list[str]:
    """Names of an extra's distributions that are not installed; none where the package itself has no metadata, as in a bare checkout."""
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
    """The folder of a checkpoint: the one of this path, or what the hub has under `owner/name`, downloaded into its cache.

    Args:
        name: as the user gave it.
        weights: whether they are wanted beside the configuration and the tokenizer.

    Raises:
        ValueError: there is no such folder, and no such model on the hub, or no network to ask for it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"no checkpoint folder {name}: found a file there, expected a run folder or a saved model")
    # runs/tinny could be a model's name on the hub too, but is a mistyped path where there is a runs/tiny.
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
    """The folder of a model that is named by its preset or as for `checkpoint_folder`, without weights; None for a preset.

    Raises:
        ValueError: see `checkpoint_folder`; neither a preset nor a folder.
    """
    if name in PRESETS:
        return None
    if not Path(name).expanduser().exists() and "/" not in name:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else nearest(Path(name))
        raise ValueError(f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor a checkpoint folder{hint}")
    return checkpoint_folder(name, weights=False)


def require_path(option: str, path: Path | None) -> None:
    """Checks that a file or folder of an option is there.

    Raises:
        ValueError: it is not.
    """
    if path is not None and not path.expanduser().exists():
        raise ValueError(f"{option}: {path}: No such file or directory{nearest(path)}")


def require_recipe(kind: str, name: str, overrides: Sequence[str]) -> None:
    """Checks that a recipe is there, and the local text that it or an override names.

    Args:
        kind: "recipe" or "study", for the message.
        name: a bundled one's, or the path of a YAML file.
        overrides: `section.key=value` each.

    Raises:
        ValueError: neither is there; names the nearest.
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
    """What a user's own recipe or the last override says about `section.key`; None where both are silent or cannot be read."""
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
    """Checks that the folder of a run that is to be resumed is there.

    Raises:
        ValueError: it is not; names the nearest.
    """
    given = setting(name, overrides, "training.output_dir")
    folder = Path(given if isinstance(given, str) and given else f"runs/{Path(name).stem}").expanduser()
    if not folder.exists():
        raise ValueError(
            f"nothing to resume in {folder}: it does not exist{nearest(folder)}; leave out --resume to start anew"
        )


def split_arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The recipe's name and the overrides; a first argument with "=" is an override of the default recipe, unless a file."""
    if not arguments:
        return DEFAULT_RECIPE, []
    first, *rest = arguments
    if "=" in first and not Path(first).is_file():
        return DEFAULT_RECIPE, list(arguments)
    return first, rest


def nearest(path: Path) -> str:
    """In brackets the path that a missing one may have meant: in the last folder that is there, the nearest name; empty if none is near."""
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
    """What a text in YAML says; None where it is none, which is told when it is read in earnest."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _bundled(kind: str) -> list[str]:
    """Names of the recipes or studies of our packages, which are found without being imported."""
    spec = importlib.util.find_spec(BUNDLED_IN[kind])
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return sorted(path.stem for path in Path(spec.submodule_search_locations[0], "recipes").glob("*.yaml"))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".") or type(error).__name__


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
