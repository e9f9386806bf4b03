"""The wheel: that it builds, what lies in it, and what its metadata says."""

import configparser
import email
import email.message
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint, packages_distributions
from pathlib import Path

import pytest

import transxssm
from tests.test_layers import modules_imported

ROOT = Path(__file__).parents[1]
# Imported by the one module that an extra is for, inside the functions that need it; Triton by the GPU's kernels, which are
# imported where torch has brought it.
OPTIONAL = {
    "lm_eval": "transxssm/evaluation/harness.py",
    "vllm": "transxssm/serving/vllm/",
    "triton": (
        "transxssm/ops/ssd/triton/",
        "transxssm/ops/single_query_attention_triton.py",
        "transxssm/ops/linear_cross_entropy_triton.py",
        "transxssm/ops/devices.py",
    ),
}
PACKAGES = {path.parent.name for path in (ROOT / "src").glob("*/__init__.py")}


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(wheel_file):
    with zipfile.ZipFile(wheel_file) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    return email.message_from_bytes(wheel.read(f"transxssm-{transxssm.__version__}.dist-info/METADATA"))


def test_every_source_file_is_in_the_wheel(wheel):
    sources = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src").rglob("*")
        if path.suffix in {".py", ".yaml", ".typed", ".cpp", ".h"}
    }
    assert sources <= set(wheel.namelist())


def test_the_wheel_has_types_and_recipes(wheel):
    names = set(wheel.namelist())
    assert "transxssm/py.typed" in names
    assert any(name.startswith("transxssm/recipes/") and name.endswith(".yaml") for name in names)


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    information = f"transxssm-{transxssm.__version__}.dist-info"
    assert {name.split("/")[0] for name in wheel.namelist()} == PACKAGES | {information}
    assert not [name for name in wheel.namelist() if "test" in name or "__pycache__" in name]


def test_metadata_states_version_licence_and_python(metadata):
    assert metadata["Name"] == "transxssm"
    assert metadata["Version"] == transxssm.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.11"


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.fixture(scope="module")
def required(metadata) -> set[str]:
    """The distributions that an installation brings, options aside."""
    lines = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    return {canonical(re.match(r"[\w.-]+", line).group()) for line in lines}


def is_optional(library: str, file: str) -> bool:
    return library in OPTIONAL and file.startswith(OPTIONAL[library])


def test_every_library_that_is_imported_is_required(required):
    """What another package happens to bring may be gone with its next version."""
    libraries = {
        name.split(".")[0]
        for package in PACKAGES
        for path in (ROOT / "src" / package).rglob("*.py")
        for name in modules_imported(path, ROOT / "src" / package)
        if not is_optional(name.split(".")[0], path.relative_to(ROOT / "src").as_posix())
    }
    provided_by = packages_distributions()
    missing = {
        library
        for library in libraries - sys.stdlib_module_names - PACKAGES
        if required.isdisjoint(map(canonical, provided_by.get(library, [])))
    }
    assert not missing


def test_development_tools_are_not_required(required):
    assert required.isdisjoint({"pytest", "ruff", "mypy", "hypothesis", "pre-commit"})


def test_the_installed_command_can_be_called(wheel):
    text = wheel.read(f"transxssm-{transxssm.__version__}.dist-info/entry_points.txt").decode()
    parser = configparser.ConfigParser()
    parser.read_string(text)
    (command,) = parser["console_scripts"].items()
    assert command[0] == "transxssm"
    assert callable(EntryPoint(*command, group="console_scripts").load())


def test_the_wheel_trains_without_the_repository(wheel_file, tmp_path):
    """Unpacked in a folder of its own, in front of everything else on the path, run from an empty directory."""
    installed, work = tmp_path / "installed", tmp_path / "work"
    work.mkdir()
    with zipfile.ZipFile(wheel_file) as archive:
        archive.extractall(installed)
    corpus = work / "texts"
    corpus.mkdir()
    for index in range(40):
        (corpus / f"{index}.txt").write_text(f"text number {index} " * 20, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = python("-c", "import transxssm, transxssm_cli; print(transxssm.__file__, transxssm_cli.__file__)")
    assert all(path.startswith(str(installed)) for path in where.split())
    settings = ["data.corpus=texts", "data.tokenizer=bytes", "data.sequence_length=64", "data.held_out_fraction=0.2"]
    sizes = ["model.hidden_size=32", "model.intermediate_size=32", "model.num_attention_heads=1"]
    python("-m", "transxssm", "train", "tiny", *settings, *sizes, "training.max_steps=2", "training.output_dir=run")
    assert (work / "run" / "model.safetensors").is_file()
