"""The C++ sources beside this file, compiled for the processor they run on: once a machine, in a few seconds, when first wanted.

Without a C++ compiler, or with `TRANSXSSM_CPU_KERNELS=0`, there is no library. They do without torch's headers, which would take
most of a minute.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_SWITCH = "TRANSXSSM_CPU_KERNELS"
_CPU_INFO = Path("/proc/cpuinfo")
_MAPS = Path("/proc/self/maps")
_logger = logging.getLogger(__name__)


@functools.cache
def compiled_library() -> ctypes.CDLL | None:
    """The library; None where it is switched off or there is no compiler that makes it."""
    if os.environ.get(_SWITCH, "1") == "0":
        return None
    compiler, openmp = _compiler(), _openmp_of_torch()
    if compiler is None or openmp is None:
        _logger.info("no C++ compiler, or none of torch's threads: CPUs take torch's operations")
        return None
    try:
        return ctypes.CDLL(str(_built(compiler, openmp)))
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        warnings.warn(
            f"{compiler} could not make the CPU's kernels, so that the ops take torch's operations, which are slower; "
            f"{_SWITCH}=0 says that this is wanted. It said: {said.splitlines()[-1] if said else error}",
            stacklevel=2,
        )
        return None


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _openmp_of_torch() -> Path | None:
    """The OpenMP library that torch has loaded: a second one would keep threads of its own, in the way of torch's."""
    torch.get_num_threads()
    if not _MAPS.exists():
        return None
    for line in _MAPS.read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            return Path(path)
    return None


def _built(compiler: str, openmp: Path) -> Path:
    """The library's file, made if no earlier process has made it for this source, compiler, processor and OpenMP."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = sorted(_FOLDER.glob("*.cpp"))
    texts = [path.read_text() for path in (*sources, *sorted(_FOLDER.glob("*.h")))]
    made_of = "\0".join((*texts, *_FLAGS, version, _processor(), str(openmp)))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transxssm"
    library = cache / f"kernels-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    tune = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        objects = [Path(folder, f"{path.stem}.o") for path in sources]
        for source, made in zip(sources, objects, strict=True):
            _run(compiler, *_FLAGS, tune, "-fopenmp", "-c", source, "-o", made)
        linked = Path(folder, library.name)
        _run(compiler, "-shared", *objects, openmp, "-o", linked)
        linked.replace(library)  # whole or not at all, whoever else is making it
    return library


def _run(*command: str | Path) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)


def _processor() -> str:
    """What `-march=native` depends on."""
    if _CPU_INFO.exists():
        wanted = ("model name", "flags", "Features", "CPU part")
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    return platform.processor()
