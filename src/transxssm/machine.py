"""The machine, its libraries and the version of the code, which are recorded with the results of a run."""

import datetime
import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
import transformers
from transformers.utils import is_torch_bf16_gpu_available

from transxssm._version import __version__
from transxssm.ops.csrc import compiled_library
from transxssm.ops.devices import has_fast_products, reason_without_triton

CPU_INFO = Path("/proc/cpuinfo")
# Libraries on whose versions results depend.
LIBRARIES = ("transformers", "accelerate", "datasets", "tokenizers")


def has_accelerator() -> bool:
    """Whether torch sees a GPU or another accelerator."""
    return torch.accelerator.is_available()


def has_fast_bfloat16() -> bool:
    """Whether the accelerator, or without one the CPU, multiplies bfloat16 in hardware."""
    if has_accelerator():
        return is_torch_bf16_gpu_available()
    return has_fast_products("cpu", torch.bfloat16)


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the libraries that results depend on."""
    return {
        "transxssm": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with its build, such as +cpu
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the CPU's architecture and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def run_metadata(device: torch.device, num_threads: int | None) -> dict[str, Any]:
    """Command, code, machine and libraries of a benchmark's run."""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **code_version(Path(__file__)),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": os.cpu_count(),
        "threads": num_threads if num_threads is not None else torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bfloat16_products": _has_bfloat16_products(),
        "cpu_kernels": compiled_library() is not None,
        "gpu_kernels": device.type == "cuda" and reason_without_triton(device.index or 0) is None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "triton": _version_of("triton", "triton"),
        # Without them transformers computes Mamba-2, and so Jamba, by a reference in PyTorch.
        "mamba_ssm": _version_of("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined"),
        "causal_conv1d": _version_of("causal_conv1d", "causal_conv1d"),
        "system": platform.platform(),
    }


def code_version(source: Path) -> dict[str, Any]:
    """The package's version and, where `source` belongs to a git repository, its commit and whether tracked files differ from it.

    Without a repository, the commit is the value of `TRANSXSSM_COMMIT`.
    """
    version: dict[str, Any] = {"version": __version__, "commit": os.environ.get("TRANSXSSM_COMMIT"), "dirty": None}
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return version
    version["commit"] = _git(source.parent, "rev-parse", "HEAD")
    version["dirty"] = bool(_git(source.parent, "status", "--porcelain", "--untracked-files=no"))
    return version


def cpu_name() -> str:
    """The processor's name as the system gives it, or its architecture."""
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _has_bfloat16_products() -> bool:
    """Whether torch's CPU library multiplies bfloat16 matrices itself, without converting them to float32."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _version_of(package: str, module: str) -> str | None:
    """A package's version, from its module if it is on the path but not installed. None if the module cannot be imported."""
    try:
        importlib.import_module(module)
    except Exception:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules[package], "__version__", "unknown"))


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of git, or None if there is no git or no repository, or the command fails."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
