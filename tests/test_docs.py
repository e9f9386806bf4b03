"""The documentation: every page is in the site's navigation, what the reference names exists, and the code blocks run.

Blocks of a page run in their order in one folder, Python's with one set of names, as a reader would type them. A comment before a
block, which no reader sees, says what else is to happen:

    <!-- not run: it trains for an hour -->     for what is slow, or changes the machine: Python is compiled, commands are parsed
    <!-- file: my.yaml -->                      the block is that file, which later ones read
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from typer.main import get_command
from typer.testing import CliRunner

from scripts.results import ROOT
from tests.cli.conftest import _own_settings  # noqa: F401 (a fixture)
from tests.serving.checkpoints import write_random_checkpoint
from transxssm.training import load_recipe
from transxssm_cli import app, places
from transxssm_lab.studies import load_study

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def paths_in(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [path for value in values for path in paths_in(value)]


def test_every_page_is_in_the_navigation_once():
    assert sorted(paths_in(SITE["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("*.md")), ids=lambda page: page.stem)
def test_what_the_reference_names_is_public_and_has_a_docstring(page):
    for name, options in re.findall(r"^::: ([\w.]+)\n(?:    options: (\{.*\}))?", page.read_text(), re.MULTILINE):
        package, members = documented(name, options)
        for member in members:
            assert member in package.__all__, f"{name}: {member} is not public"
            assert getattr(package, member).__doc__, f"{name}: {member} has no docstring"


def documented(name: str, options: str):
    """The package that a line of the reference is about, and the names of it that are shown."""
    try:
        package = importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, member = name.rpartition(".")
        package = importlib.import_module(parent)
        # An op may be in a module of its own name: the path leads there, the name is the package's.
        return package if hasattr(package, "__all__") else importlib.import_module(parent.rpartition(".")[0]), [member]
    return package, yaml.safe_load(options or "{}").get("members", package.__all__)


def test_results_are_one_page_and_decisions_are_few_and_short():
    assert len((DOCS / "results.md").read_text().splitlines()) <= 150
    records = (DOCS / "decisions.md").read_text().split("\n### ")[1:]
    assert len(records) <= 25
    for record in records:
        lines = [line for line in record.split("\n## ")[0].splitlines() if line.strip()]
        assert len(lines) <= 10, record
        assert all(f"**{part}:**" in record for part in ("Context", "Decision", "Consequence")), record


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language and text, and what the comment before it says."""

    language: str
    text: str
    file: str | None
    is_run: bool


def blocks_of(page: Path) -> list[Block]:
    fences = re.findall(
        r"(?:^<!-- (file|not run): (.+?) -->\n)?^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL
    )
    return [
        Block(language, text, value if mark == "file" else None, mark != "not run")
        for mark, value, language, text in fences
    ]


WITH_BLOCKS = [page for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES) if blocks_of(page)]
# Stands for every program that a block calls, and notes how.
RECORDER = """#!{python} -S
import json, os, stat, sys
piped = stat.S_ISFIFO(os.fstat(0).st_mode)
with open({log!r}, "a") as log:
    log.write(json.dumps([sys.argv[0], sys.argv[1:], sys.stdin.read() if piped else None]) + "\\n")
"""
PROGRAMS = ("transxssm", "make", "pip", "git", "python", "torchrun", "accelerate", "pre-commit")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what a reader has at hand: a trained model, texts, and the programs."""
    monkeypatch.chdir(tmp_path)
    write_random_checkpoint(tmp_path / "runs" / "tiny")
    for name in ("my_texts", "transxssm", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "my_texts" / "one.txt").write_text("A text.\n")
    for program in PROGRAMS:
        path = tmp_path / ".venv" / "bin" / program
        path.write_text(RECORDER.format(python=sys.executable, log=str(tmp_path / "log")))
        path.chmod(0o755)
    return tmp_path


def commands_of(text: str, folder: Path) -> list[tuple[str, list[str], str | None]]:
    """The programs that a block of commands calls: their names, arguments, and what is piped into them; no program runs."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    environment = os.environ | {"PATH": str(folder / ".venv" / "bin"), "BASH_ENV": ""}
    done = subprocess.run(
        ["/bin/bash", "-e", "-o", "pipefail", "-c", text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{text}{done.stderr}"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [(Path(program).name, arguments, piped) for program, arguments, piped in records]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_run(page, workplace):
    names: dict[str, object] = {}
    for block in blocks_of(page):
        if block.file is not None:
            (workplace / block.file).write_text(block.text)
        elif block.language == "python":
            code = compile(block.text, str(page), "exec")
            if block.is_run:
                exec(code, names)
        elif block.language == "console":
            for program, arguments, piped in commands_of(block.text, workplace):
                check_command(program, arguments)
                if block.is_run:
                    assert may_be_run(program, arguments), f"{program} {arguments}: say before it <!-- not run: why -->"
                    result = CliRunner().invoke(app.app, arguments, input=piped)
                    assert result.exit_code == 0, f"{arguments}: {result.stderr}"
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        else:
            assert block.language == "text", f"a block in {block.language or 'no language'}"


def may_be_run(program: str, arguments: list[str]) -> bool:
    """Whether a command neither trains, nor measures, nor changes more than this folder."""
    if program != "transxssm" or arguments[0] in ("train", "demo", "benchmark"):
        return False
    return arguments[0] != "study" or len(arguments) == 1 or "--list" in arguments


def check_command(program: str, arguments: list[str]) -> None:
    """What a command line names exists: commands, options, recipes and their keys, targets, files."""
    match program, arguments:
        case "transxssm", _:
            check_transxssm(arguments)
        case "make", _:
            targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {target for target in arguments if "=" not in target} <= set(targets)
        case "torchrun", _:
            options = get_args_parser().parse_args(arguments)
            assert (options.module, options.training_script) == (True, "transxssm")
            check_transxssm(options.training_script_args)
        case "accelerate", ["launch", *rest]:
            options = launch_command_parser().parse_args(rest)
            assert (options.module, options.training_script) == (True, "transxssm")
            assert options.config_file is None or load_config_from_file(options.config_file)
            check_transxssm(options.training_script_args)
        case "python", [script, *_]:
            assert (ROOT / script).is_file()
        case ("git", ["clone" | "diff", *_]) | ("pre-commit", ["install"]):
            pass
        case "pip", ["install", what] if what.startswith("."):
            extras = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", what).group(1) or ""
            assert set(filter(None, extras.split(","))) <= EXTRAS, what
        case _:
            raise AssertionError(f"{program} {arguments}")


def check_transxssm(arguments: list[str]) -> None:
    command, rest, context = get_command(app.app), arguments, None
    while True:
        context = command.make_context(command.name, list(rest), parent=context)
        if not hasattr(command, "resolve_command"):
            break
        words = [*(getattr(context, "_protected_args", None) or context.protected_args), *context.args]
        _, command, rest = command.resolve_command(context, words)
    values = context.params
    if command.name in ("train", "demo"):
        name, overrides = values.get("recipe"), values.get("overrides") or []
        if command.name == "train":
            name, overrides = places.split_arguments(values["arguments"] or [])
        places.require_recipe("recipe", name, overrides)
        load_recipe(name, overrides)
    elif command.name == "study" and values["arguments"]:
        study = load_study(values["arguments"][0], values["arguments"][1:])
        assert set(values["only"] or []) <= set(study.cells)
    elif command.name == "info" and "/" not in values["model"]:
        assert values["model"] in places.PRESETS
    elif "preset" in values:
        assert values["preset"] in places.PRESETS


class TestCommandsThatDoNotExist:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("transxssm trian", "No such command"),
            ("transxssm generate runs/tiny --top-q 3", "No such option"),
            ("transxssm evaluate runs/tiny perplexty", "No such command"),
            ("transxssm train smal", "no recipe 'smal'"),
            ("transxssm train small training.max_stepss=3", "did you mean training.max_steps"),
            ("transxssm study tabel2-cpu", "no study"),
            ("torchrun --nproc-per-node 2 -m transxssm train smal", "no recipe"),
            ("accelerate launch --config_file absent.yaml -m transxssm train small", "absent.yaml"),
            ("make demonstration", "demonstration"),
            ("python scripts/absent.py", "absent.py"),
            ("pip install x", "pip ['install', 'x']"),
            ("pip install '.[labb]'", ".[labb]"),
            ("conda install x", "command not found"),
        ],
    )  # fmt: skip
    def test_they_are_found(self, workplace, text, words):
        with pytest.raises((Exception, SystemExit)) as error:
            check_block(text, workplace)
        assert words in getattr(error.value, "message", str(error.value))


def check_block(text: str, folder: Path) -> None:
    for program, arguments, _ in commands_of(text, folder):
        check_command(program, arguments)


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 800
