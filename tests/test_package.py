"""The wheel: that it builds, what lies in it, and what its metadata says."""

import configparser
import email
import email.message
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import transxssm
from tests.models.test_peft_targets import LORA_TARGETS
from tests.test_layers import modules_imported

ROOT = Path(__file__).parents[1]
# What needs the libraries of an extra; everything else has those of the core alone.
EXTRAS = {
    "train": (
        "transxssm/data/",
        "transxssm/training/",
        "transxssm/evaluation/",
        "transxssm/machine.py",
        "transxssm_cli/",
    ),
    "lab": ("transxssm_lab/", "transxssm/plotting.py"),
}
# Imported by the one module that an extra is for, inside the functions that need it; Triton by the GPU's kernels, which are
# imported where torch has brought it.
OPTIONAL = {
    "lm_eval": "transxssm/evaluation/harness.py",
    "psutil": "transxssm/inspection/memory.py",
    "vllm": "transxssm/serving/vllm/",
    "triton": (
        "transxssm/ops/ssd/triton/",
        "transxssm/ops/single_query_attention_triton.py",
        "transxssm/ops/linear_cross_entropy_triton.py",
        "transxssm/ops/devices.py",
    ),
}
PACKAGES = {path.parent.name for path in (ROOT / "src").glob("*/__init__.py")}


# Without what some machines lack and what only training needs. At an import of an operator, torch says where Triton is missing.
BARE = """
import sys
sys.modules |= dict.fromkeys(["triton", "datasets", "accelerate", "pydantic", "matplotlib", "tensorboard"])
import torch
import transxssm
from transformers import AutoConfig
from transxssm.ops.ssd import ssd_step_
from transxssm_cli.kernels import show_kernels
AutoConfig.for_model("transxssm")
ssd_step_(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2), torch.ones(1, 1), -torch.ones(1), *torch.ones(2, 1, 1, 2))
show_kernels("tiny", None, dtype_name="float32", device_name="cpu", length=64)
assert "peft" not in sys.modules, "every command would start a second later"
del sys.modules["accelerate"]
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table
print("targets of LoRA:", *table["transxssm"])
"""


def test_a_new_interpreter_that_lacks_much_computes_and_knows_the_model():
    """The classes are registered by the import alone, PEFT is told when it is imported later, and nothing says that Triton is missing."""
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=True)
    assert "tiny in float32" in done.stdout
    assert done.stdout.splitlines()[-1].split(": ")[1].split() == LORA_TARGETS
    assert "Triton not available" not in done.stderr


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
def requirements(metadata) -> list[Requirement]:
    return [Requirement(line) for line in metadata.get_all("Requires-Dist")]


def required(requirements: list[Requirement], extra: str = "") -> set[str]:
    """The distributions that an installation with an extra brings by its own word."""
    met = [of for of in requirements if of.marker is None or of.marker.evaluate({"extra": extra})]
    inner = {name for of in met if canonical(of.name) == "transxssm" for name in of.extras}
    return {canonical(of.name) for of in met}.union(*(required(requirements, name) for name in inner))


def is_optional(library: str, file: str) -> bool:
    return library in OPTIONAL and file.startswith(OPTIONAL[library])


def test_every_library_that_is_imported_is_required(requirements):
    """By the core, or by the extra that a module belongs to: what another package happens to bring may be gone with its next version."""
    provided_by = packages_distributions()
    brought = {extra: required(requirements, extra) for extra in ("", *EXTRAS)}
    missing = set()
    for package in PACKAGES:
        for path in (ROOT / "src" / package).rglob("*.py"):
            file = path.relative_to(ROOT / "src").as_posix()
            extra = next((extra for extra, parts in EXTRAS.items() if file.startswith(parts)), "")
            for name in modules_imported(path, ROOT / "src" / package):
                library = name.split(".")[0]
                if library in sys.stdlib_module_names or library in PACKAGES or is_optional(library, file):
                    continue
                if brought[extra].isdisjoint(map(canonical, provided_by.get(library, []))):
                    missing.add(
                        f"{file} imports {library}, which {f'the extra {extra}' if extra else 'the core'} lacks"
                    )
    assert not missing


def test_the_core_is_five_libraries(requirements):
    assert required(requirements) == {"torch", "transformers", "safetensors", "huggingface-hub", "numpy"}
    bounds = {of.name: str(of.specifier) for of in requirements if of.marker is None}
    assert "<3" in bounds["torch"]
    assert "<6" in bounds["transformers"]


def test_development_tools_are_not_required(requirements):
    everything = required(requirements).union(*(required(requirements, extra) for extra in ("lab", "eval", "peft")))
    assert everything.isdisjoint({"pytest", "ruff", "mypy", "hypothesis", "pre-commit"})


@pytest.fixture(scope="module")
def environment(wheel_file, requirements, tmp_path_factory):
    """Runs Python where only the wheel with an extra is installed, and what its requirements require: folders of links to them."""

    def installed(extra: str) -> Path:
        folder = tmp_path_factory.mktemp(f"with-{extra or 'core'}")
        with zipfile.ZipFile(wheel_file) as archive:
            archive.extractall(folder)
        found, queue = set(), [(name, "") for name in sorted(required(requirements, extra) - {"transxssm"})]
        while queue:
            name, own_extra = queue.pop()
            if (name, own_extra) in found:
                continue
            found.add((name, own_extra))
            try:
                package = distribution(name)
            except PackageNotFoundError:  # for another kind of machine
                continue
            for part in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
                if not (folder / part).exists():
                    (folder / part).symlink_to(package.locate_file(part))
            for line in package.requires or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": own_extra}):
                    queue += [(canonical(needed.name), inner) for inner in ("", *needed.extras)]
        return folder

    folders: dict[str, Path] = {}

    def python(extra: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        folder = folders.get(extra) or folders.setdefault(extra, installed(extra))
        settings = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        # -S: without the site-packages of the environment that the tests run in.
        command = [sys.executable, "-S", *arguments]
        return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)

    return python


USES_OF_THE_CORE = """
import importlib.util
for name in ("accelerate", "datasets", "pyarrow", "psutil", "matplotlib", "tensorboard", "pandas"):
    assert importlib.util.find_spec(name) is None, name

import torch, transxssm, transxssm.inspection
from transformers import AutoConfig, AutoModelForCausalLM
from transxssm.ops import ssd_chunk_scan

torch.manual_seed(0)
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=1, num_hidden_layers=2)
transxssm.TransXSSMForCausalLM(transxssm.TransXSSMConfig(layer_types=["linear_attention", "full_attention"], **sizes)).save_pretrained("m")
model = AutoModelForCausalLM.from_pretrained("m")
ids = torch.arange(24).reshape(1, 24) % 7
assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 27)
optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
for _ in range(5):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
x, dt, B = torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2), torch.ones(1, 3, 1, 4)
assert ssd_chunk_scan(x, dt, -torch.ones(2), B, B)[0].shape == x.shape
assert transxssm.inspection.available_bytes(torch.device("cpu")) > 0
"""


def test_the_core_loads_generates_and_trains_with_five_libraries(environment):
    done = environment("", "-c", USES_OF_THE_CORE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("extra", "arguments", "words"),
    [
        ("", ["--help"], ["accelerate", "datasets", "pip install 'transxssm[train]'"]),
        ("train", ["benchmark", "throughput"], ["matplotlib", "pip install 'transxssm[lab]'"]),
        ("train", ["study", "table2-cpu"], ["matplotlib", "pip install 'transxssm[lab]'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_command_without_its_extra_says_what_to_install(environment, extra, arguments, words):
    done = environment(extra, "-m", "transxssm_cli", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words)


def test_commands_are_there_with_their_extra(environment):
    done = environment("train", "-m", "transxssm_cli", "benchmark", "--help")
    assert done.returncode == 0, done.stderr


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

    program = (
        "import transxssm, transxssm_cli.__main__; print(transxssm.__file__, transxssm_cli.__file__, flush=True); "
        "transxssm_cli.__main__.main()"
    )
    settings = ["data.corpus=texts", "data.tokenizer=bytes", "data.sequence_length=64", "data.held_out_fraction=0.2"]
    sizes = ["model.hidden_size=32", "model.intermediate_size=32", "model.num_attention_heads=1"]
    arguments = ["train", "tiny", *settings, *sizes, "training.max_steps=2", "training.output_dir=run"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(path.startswith(str(installed)) for path in done.stdout.splitlines()[0].split())
    assert (work / "run" / "model.safetensors").is_file()
