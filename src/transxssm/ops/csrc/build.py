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
    compilers, openmp = _compilers(), _openmp_of_torch()
    if not compilers or openmp is None:
        _logger.info("no C++ compiler, or none of torch's threads: CPUs take torch's operations")
        return None
    problem = ""
    for compiler in compilers:
        try:
            return _loaded(compiler, openmp)
        except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()
            problem = f"{compiler}: {said.splitlines()[-1] if said else error}"
    warnings.warn(
        "the CPU's kernels could not be made, so that the ops take torch's operations, which are slower; "
        f"{_SWITCH}=0 says that this is wanted. {problem}",
        stacklevel=2,
    )
    return None


@torch.compiler.assume_constant_result
def has_tiles() -> bool:
    """Whether there are the kernels that multiply in tiles of AVX-512 registers (not AMX's tiles: see tiles.h)."""
    library = compiled_library()
    return library is not None and bool(library.tiles_are_here())


def _compilers() -> list[str]:
    """Those that are here, each once, the user's own first. clang knows no libgomp, so that it may take another one to succeed."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return list(dict.fromkeys(path for name in names if name and (path := shutil.which(name))))


def _loaded(compiler: str, openmp: Path) -> ctypes.CDLL:
    """The library; one that was made before and does not load, for a crash cut it short, is made again."""
    library, is_new = _built(compiler, openmp)
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        library.unlink()
        if is_new:
            raise
    return ctypes.CDLL(str(_built(compiler, openmp)[0]))


def _openmp_of_torch() -> Path | None:
    """The OpenMP library that torch has loaded: a second one would keep threads of its own, in the way of torch's."""
    torch.get_num_threads()
    if not _MAPS.exists():
        return None
    loaded = dict.fromkeys(Path(line.split(maxsplit=5)[-1]) for line in _MAPS.read_text().splitlines())
    found = [path for path in loaded if path.name.startswith(("libgomp", "libiomp5", "libomp"))]
    own = [path for path in found if path.is_relative_to(Path(torch.__file__).parent)]  # others bring theirs too
    return next(iter(own + found), None)


def _built(compiler: str, openmp: Path) -> tuple[Path, bool]:
    """The library's file, made if no earlier process has made it for this source, compiler, processor and OpenMP; whether it was."""
    version = _run(compiler, "--version")
    sources = sorted(_FOLDER.glob("*.cpp"))
    texts = [path.read_text(encoding="utf-8") for path in (*sources, *sorted(_FOLDER.glob("*.h")))]
    made_of = "\0".join((*texts, *_FLAGS, version, _processor(), str(openmp)))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transxssm"
    library = cache / f"kernels-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library, False
    cache.mkdir(parents=True, exist_ok=True)
    tune = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        objects = [Path(folder, f"{path.stem}.o") for path in sources]
        for source, made in zip(sources, objects, strict=True):
            _run(compiler, *_FLAGS, tune, "-fopenmp", "-c", source, "-o", made)
        linked = Path(folder, library.name)
        _run(compiler, "-shared", "-Wl,-z,defs", *objects, openmp, "-lm", "-o", linked)
        linked.replace(library)  # whole or not at all, whoever else is making it
    return library, True


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True)
    return done.stdout


def _processor() -> str:
    """What `-march=native` depends on."""
    if _CPU_INFO.exists():
        wanted = ("model name", "flags", "Features", "CPU part")
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    return platform.processor()
