"""The documentation's site: every page is in its navigation, what the reference names exists, and the examples run."""

import importlib
import re

import pytest
import yaml

from scripts.results import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
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


@pytest.mark.parametrize("page", sorted((DOCS / "coming-from").glob("*.md")), ids=lambda page: page.stem)
def test_the_examples_run(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(page), "exec"), {})


def test_results_are_one_page_and_decisions_are_few_and_short():
    assert len((DOCS / "results.md").read_text().splitlines()) <= 150
    records = (DOCS / "decisions.md").read_text().split("\n### ")[1:]
    assert len(records) <= 25
    for record in records:
        lines = [line for line in record.split("\n## ")[0].splitlines() if line.strip()]
        assert len(lines) <= 10, record
        assert all(f"**{part}:**" in record for part in ("Context", "Decision", "Consequence")), record
