"""Compiles the C++ sources of this folder for the machine's processor, once and in some seconds, when the library is first needed.

Environment variables:
- `TRANSXSSM_CPU_KERNELS=0` switches the kernels off.
- `TRANSXSSM_CPU_FLAGS` has further flags for the compiler and the linker, which win over those here: `-march=haswell` compiles for AVX2
  alone, `-fsanitize=address,undefined` looks for wrong accesses to memory (`make sanitize`).
- `CXX` names the compiler that is tried first.

The sources do not include torch's headers, which would take most of a minute to compile.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
_SWITCH = "TRANSXSSM_CPU_KERNELS"
_MORE_FLAGS = "TRANSXSSM_CPU_FLAGS"
_CPU_INFO = Path("/proc/cpuinfo")
_MAPS = Path("/proc/self/maps")


def compiled_library() -> ctypes.CDLL | None:
    """The library, or None if it is switched off or cannot be compiled. The op that would have used it reports that."""
    return _library_or_reason()[0]


def reason_without_library() -> str | None:
    """Why there is no library, in one line, or None if there is one."""
    return _library_or_reason()[1]


@functools.cache
def _library_or_reason() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get(_SWITCH, "1") == "0":
        return None, f"{_SWITCH}=0 switches them off"
    library, reason = _make()
    return library, None if reason is None else f"the CPU's C++ kernels could not be made: {reason}"


def _make() -> tuple[ctypes.CDLL | None, str | None]:
    compilers, openmp = _compilers(), _openmp_of_torch()
    if not _MAPS.exists():
        return None, f"they need Linux, where they run on torch's OpenMP threads, and this is {platform.system()}"
    if openmp is None:
        return None, "this build of torch has no OpenMP library, whose threads they would run on"
    if not compilers:
        return None, "there is no C++ compiler: install g++ or set CXX"
    reason = ""
    for compiler in compilers:
        try:
            return _loaded(compiler, openmp), None
        except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()
            reason = f"{compiler} failed: {said.splitlines()[-1] if said else error}"
    return None, reason


def _compilers() -> list[str]:
    """The compilers that are installed, the user's own first. clang may lack an OpenMP library, so that the next one is tried."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return list(dict.fromkeys(path for name in names if name and (path := shutil.which(name))))


def _loaded(compiler: str, openmp: Path) -> ctypes.CDLL:
    """The library. A file of an earlier process that does not load, because a crash cut it short, is made again."""
    library, is_new = _built(compiler, openmp)
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        library.unlink()
        if is_new:
            raise
    return ctypes.CDLL(str(_built(compiler, openmp)[0]))


def _openmp_of_torch() -> Path | None:
    """The OpenMP library that torch has loaded. A second one would have threads of its own, which compete with torch's for the cores."""
    torch.get_num_threads()
    if not _MAPS.exists():
        return None
    loaded = dict.fromkeys(Path(line.split(maxsplit=5)[-1]) for line in _MAPS.read_text().splitlines())
    found = [path for path in loaded if path.name.startswith(("libgomp", "libiomp5", "libomp"))]
    own = [
        path for path in found if path.is_relative_to(Path(torch.__file__).parent)
    ]  # other packages may contain one, too
    return next(iter(own + found), None)


def _built(compiler: str, openmp: Path) -> tuple[Path, bool]:
    """The library's file, and whether it is new. An existing file of the same sources, flags, compiler and processor is used."""
    version = _run(compiler, "--version")
    sources = sorted(_FOLDER.glob("*.cpp"))
    texts = [path.read_text(encoding="utf-8") for path in (*sources, *sorted(_FOLDER.glob("*.h")))]
    flags = (*_FLAGS, *_target(), *shlex.split(os.environ.get(_MORE_FLAGS, "")))
    made_of = "\0".join((*texts, *flags, version, _processor(), str(openmp)))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transxssm"
    library = cache / f"kernels-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library, False
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        objects = [Path(folder, f"{path.stem}.o") for path in sources]
        for source, made in zip(sources, objects, strict=True):
            _run(compiler, *flags, "-fopenmp", "-c", source, "-o", made)
        linked = Path(folder, library.name)
        _run(compiler, *flags, "-shared", "-Wl,-z,defs", *objects, openmp, "-lm", "-o", linked)
        linked.replace(library)  # atomically, since another process may be building it
    return library, True


def _target() -> tuple[str, ...]:
    return ("-march=native",) if platform.machine() in ("x86_64", "AMD64") else ("-mcpu=native",)


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True)
    return done.stdout


def _processor() -> str:
    """The properties of the processor on which `-march=native` depends."""
    if _CPU_INFO.exists():
        wanted = ("model name", "flags", "Features", "CPU part")
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    return platform.processor()
