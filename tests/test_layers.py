"""The layers of the packages, read off their imports: they point down only, and `__init__` files only re-export."""

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "transxssm"
OTHERS = [PACKAGE.with_name(name) for name in ("transxssm_cli", "transxssm_lab")]

# A part may import parts with a smaller number. The command line and the experiments are packages beside this one: importing anything
# inside it loads torch, which --help must not wait for. What the commands of both share is in the command line's modules; its `app`
# opens every folder, the experiments too, so it stands on top, under the installed command.
LAYERS = {
    "_version": 0,
    "whole_files": 0,
    "plotting": 0,
    "wording": 0,
    "ops": 1,
    "models": 2,
    "data": 2,
    "machine": 2,
    "training": 3,
    "evaluation": 3,
    "inspection": 3,
    "serving": 3,
    "transxssm_cli": 4,
    "transxssm_lab.benchmarking": 4,
    "transxssm_lab.studies": 5,
    "transxssm_lab.benchmark_command": 6,
    "transxssm_lab.study_command": 6,
    "transxssm_lab.commands": 7,
    "transxssm_cli.app": 8,
    "transxssm_cli.__main__": 9,
    "__main__": 10,
    # Names of the version before.
    "benchmarking": 9,
    "studies": 9,
}
# The package's own __init__ gives names to users: of what it may hold, and no more, so that its import stays cheap.
PUBLIC = {"_version", "ops", "models"}
OPS_LIBRARIES = {"torch"}
GPU_LIBRARIES = {"triton"}  # in these files alone, whose kernels nothing imports where it is missing
GPU_FILES = re.compile(r"ops/ssd/triton/|ops/\w+_triton\.py|ops/devices\.py")


def modules_imported(path: Path, root: Path) -> set[str]:
    """Dotted names of everything `path` imports, anywhere in it; relative imports are resolved from `root`'s parent."""
    package = ".".join(path.parent.relative_to(root.parent).parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -(node.level - 1) or None] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            # `from transxssm import ops` names a part in its second half.
            names |= {f"{origin}.{alias.name}" for alias in node.names} if origin == root.name else {origin}
    return names


def part_of(module: str) -> str | None:
    """The part in LAYERS that a dotted name belongs to; "" for a package's own __init__, None for what is not ours."""
    library, _, inner = module.partition(".")
    part = inner.split(".")[0]
    if library not in (package.name for package in (PACKAGE, *OTHERS)):
        return None
    if library == PACKAGE.name or not part:
        return part
    whole = f"{library}.{part}"
    return whole if whole in LAYERS or library not in LAYERS else library


def violations_of_layers(root: Path) -> list[str]:
    """One line per import that points up, sideways, or, from `ops`, outside torch and the standard library."""
    lines = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        part = part_of(".".join([root.name, *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__"))
        if part and part not in LAYERS:
            lines.append(f"{name}: no layer for {part!r}; give it one in LAYERS")
            continue
        for module in sorted(modules_imported(path, root)):
            target = part_of(module)
            if target is None:
                library = module.split(".")[0]
                allowed = OPS_LIBRARIES | (GPU_LIBRARIES if GPU_FILES.match(name) else set())
                if part == "ops" and library not in allowed | sys.stdlib_module_names:
                    lines.append(f"{name}: ops imports {library}, expected only torch and the standard library")
            elif not part:
                if target not in PUBLIC:
                    lines.append(f"{name}: the package's __init__ imports {module}, expected only {sorted(PUBLIC)}")
            elif target not in LAYERS:
                # The package itself, or one of its public names: what that loads is hidden from this test.
                lines.append(f"{name}: imports {module}, expected the module that defines it")
            elif target != part and LAYERS[target] >= LAYERS[part]:
                lines.append(f"{name}: {part} (layer {LAYERS[part]}) imports {target} (layer {LAYERS[target]})")
    return lines


def is_reexport(node: ast.stmt) -> bool:
    """A docstring, an import, `__all__` and its like, or a branch for the type checker that holds only these."""
    match node:
        case ast.Expr(value=ast.Constant(value=str())) | ast.Import() | ast.ImportFrom():
            return True
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name.startswith("__")
        case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body, orelse=[]):
            return all(map(is_reexport, body))
    return False


def violations_of_reexport(root: Path) -> list[str]:
    """One line per statement in an `__init__` that defines something; that of `transxssm` itself also registers classes."""
    return [
        f"{path.relative_to(root).as_posix()}:{node.lineno}: defines something, expected only re-exports"
        for path in sorted(root.rglob("__init__.py"))
        if path != PACKAGE / "__init__.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if not is_reexport(node)
    ]


@pytest.mark.parametrize("package", [PACKAGE, *OTHERS], ids=lambda path: path.name)
def test_imports_point_down(package):
    assert violations_of_layers(package) == []


@pytest.mark.parametrize("package", [PACKAGE, *OTHERS], ids=lambda path: path.name)
def test_init_files_only_reexport(package):
    assert violations_of_reexport(package) == []


@pytest.fixture
def tree(tmp_path):
    """Writes a package `transxssm` out of {path: source} and returns its folder."""

    def write(files: dict[str, str]) -> Path:
        root = tmp_path / "transxssm"
        for name, source in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(source)
        return root

    return write


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("ops/rotary.py", "from transxssm.models import TransXSSMConfig", "ops (layer 1) imports models (layer 2)"),
        ("ops/rotary.py", "from ..models.configuration import Config", "ops (layer 1) imports models (layer 2)"),
        ("ops/ssd/chunked.py", "from ...data import packing", "ops (layer 1) imports data (layer 2)"),
        ("ops/rotary.py", "import numpy as np", "ops imports numpy"),
        ("models/modeling.py", "def f():\n    from transxssm.data import load_corpus", "models (layer 2) imports data"),
        ("data/packing.py", "import transxssm.models.modeling", "data (layer 2) imports models"),
        ("training/loop.py", "from transxssm import evaluation", "training (layer 3) imports evaluation"),
        (
            "training/loop.py",
            "from transxssm_lab.studies import schedule",
            "(layer 3) imports transxssm_lab.studies (layer 5)",
        ),
        ("training/loop.py", "from transxssm_cli.app import main", "training (layer 3) imports transxssm_cli.app"),
        ("__init__.py", "from transxssm_cli.app import main", "the package's __init__ imports transxssm_cli"),
        ("training/loop.py", "from transxssm import TransXSSMConfig", "expected the module that defines it"),
        ("__init__.py", "from .training import train", "the package's __init__ imports transxssm.training"),
        ("helpers.py", "", "no layer for 'helpers'"),
    ],
)
def test_a_planted_import_is_found(tree, name, source, words):
    (line,) = violations_of_layers(tree({name: source}))
    assert line.startswith(name)
    assert words in line


def test_imports_that_point_down_pass(tree):
    files = {
        "__init__.py": "from ._version import __version__\nfrom .models import TransXSSMConfig",
        "ops/ssd/chunked.py": "import math\nimport torch\nfrom ..rotary import apply_rotary\nfrom . import reference",
        "models/modeling.py": "from transformers import AutoModel\nfrom transxssm.ops import ssd_step",
        "evaluation/scoring.py": "from transxssm import models",
        "__main__.py": "from transxssm_cli.__main__ import main",
    }
    assert violations_of_layers(tree(files)) == []


@pytest.mark.parametrize(
    "source", ["def helper(): ...", "for x in (): ...", "WIDTH = 3", "register(1)", "if 1:\n    import a"]
)
def test_a_planted_definition_in_an_init_is_found(tree, source):
    found = violations_of_reexport(
        tree({"ops/__init__.py": f'"""Ops."""\nfrom .a import b\n__all__ = ["b"]\n{source}\n'})
    )
    assert len(found) == 1
    assert found[0].startswith("ops/__init__.py:4")


# Modules of one name in several folders, each by a rule that a reader can guess.
SAME_NAMES = {
    "generation": "of text, and its command",
    "kernels": "Triton's, and the command that shows what runs",
    "launch": "of compiled kernels, and of processes",
    "linear": "the op, and the layer that calls it",
    "needle": "the task, and its evaluation",
    "processes": "that share an evaluation, and that measure",
    "report": "of a benchmark, and of a study",
    "step": "in torch's operations, and in Triton",
    "tables": "in a terminal, and of a study",
}


def test_no_module_has_the_name_of_another_but_by_a_rule():
    modules = [
        path.stem for root in (PACKAGE, *OTHERS) for path in root.rglob("*.py") if not path.stem.startswith("__")
    ]
    assert {name for name in modules if modules.count(name) > 1} == set(SAME_NAMES)
