"""The C++ kernels' library: made once, and done without where it cannot be made.

Where only the making is the point, a small source is compiled in place of the kernels'; theirs are compiled for the tests of the ops.
"""

import stat
from pathlib import Path

import pytest
import torch

from tests import processes
from transxssm.ops.csrc import build as module
from transxssm.ops.csrc.build import _library_or_reason, _openmp_of_torch, compiled_library

SMALL_SOURCE = """
#include "numbers.h"
#include <omp.h>
extern "C" __attribute__((visibility("default"))) int threads() { return LEAST + omp_get_max_threads(); }
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """The folder of a source and a header that are compiled in no time."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "numbers.h").write_text("#define LEAST 0\n")
    (folder / "threads.cpp").write_text(SMALL_SOURCE)
    monkeypatch.setattr(module, "_FOLDER", folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch, sources):
    """A cache of its own, and a process that has not looked for the library yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRANSXSSM_CPU_FLAGS", raising=False)
    monkeypatch.setattr(module, "_library_or_reason", _library_or_reason.__wrapped__)
    return tmp_path / "transxssm"


def compiler_that(folder, script: str) -> str:
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.skipif(not module._compilers(), reason="no C++ compiler here")
def test_it_is_made_once(cache):
    assert module.compiled_library().threads() == torch.get_num_threads()
    (library,) = cache.iterdir()
    made = library.stat().st_mtime_ns
    assert module.compiled_library() is not None
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [made]


@pytest.mark.skipif(not module._compilers(), reason="no C++ compiler here")
def test_another_source_makes_another_library(cache, sources):
    before = module.compiled_library().threads()
    (sources / "numbers.h").write_text("#define LEAST 5\n")
    assert module.compiled_library().threads() == before + 5
    assert len(list(cache.iterdir())) == 2


def test_it_can_be_switched_off(cache, monkeypatch):
    monkeypatch.setenv("TRANSXSSM_CPU_KERNELS", "0")
    assert module.compiled_library() is None
    assert not cache.exists()


def test_without_a_compiler_there_is_none_and_one_line_says_so(cache, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    if module._openmp_of_torch() is None:
        pytest.skip("torch without OpenMP")
    assert module.compiled_library() is None
    assert module.reason_without_library().endswith("there is no C++ compiler: install g++ or set CXX")


def test_where_there_is_no_linux_the_line_says_so(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAPS", tmp_path / "maps")
    monkeypatch.setattr(module.platform, "system", lambda: "Darwin")
    reason = module.reason_without_library()
    assert "they need Linux" in reason
    assert reason.endswith("this is Darwin")


def test_the_reason_can_be_asked_for(cache, monkeypatch):
    monkeypatch.setenv("TRANSXSSM_CPU_KERNELS", "0")
    assert module.reason_without_library() == "TRANSXSSM_CPU_KERNELS=0 switches them off"
    monkeypatch.setenv("TRANSXSSM_CPU_KERNELS", "1")
    if module._compilers() and module._openmp_of_torch() is not None:
        assert module.reason_without_library() is None


@pytest.mark.skipif(not module._compilers(), reason="no C++ compiler here")
def test_flags_of_the_user_make_another_library(cache, monkeypatch):
    module.compiled_library()
    monkeypatch.setenv("TRANSXSSM_CPU_FLAGS", "-O1 -DTRANSXSSM_UNUSED='a b'")
    assert module.compiled_library() is not None
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setenv("TRANSXSSM_CPU_FLAGS", "--no-such-flag")
    assert "no-such-flag" in module.reason_without_library()


def test_a_compiler_that_fails_is_quoted_in_one_line_and_leaves_nothing(cache, tmp_path, monkeypatch):
    failing = compiler_that(
        tmp_path, '[ "$1" = --version ] && exit 0; echo "first" >&2; echo "no such flag" >&2; exit 1'
    )
    monkeypatch.setattr(module, "_compilers", lambda: [failing])
    assert module.reason_without_library().endswith("c++ failed: no such flag")
    assert list(cache.iterdir()) == []


@pytest.mark.skipif(not module._compilers(), reason="no C++ compiler here")
def test_the_next_compiler_is_tried(cache, tmp_path, monkeypatch):
    compilers = [compiler_that(tmp_path, "exit 1"), *module._compilers()]
    monkeypatch.setattr(module, "_compilers", lambda: compilers)
    assert module.compiled_library() is not None


@pytest.mark.skipif(not module._compilers(), reason="no C++ compiler here")
def test_a_library_that_a_crash_cut_short_is_made_again(cache):
    compiler, openmp = module._compilers()[0], module._openmp_of_torch()
    library, _ = module._built(compiler, openmp)
    library.write_bytes(b"")
    assert module.compiled_library() is not None
    assert library.stat().st_size > 0


def test_without_a_home_there_are_no_kernels(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    if not module._compilers() or module._openmp_of_torch() is None:
        pytest.skip("no C++ compiler here")
    library, reason = _library_or_reason.__wrapped__()
    assert library is None
    assert "Could not determine home" in reason


def test_a_cache_that_cannot_be_written_costs_the_kernels_only(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    if not module._compilers() or module._openmp_of_torch() is None:
        pytest.skip("no C++ compiler here")
    library, reason = _library_or_reason.__wrapped__()
    assert library is None
    assert "kernels could not be made" in reason


@pytest.mark.skipif(torch.__config__.parallel_info().find("OpenMP") < 0, reason="torch without OpenMP")
def test_threads_are_torchs_own(tmp_path):
    """A second OpenMP library would have threads that wait in the way of torch's."""
    if compiled_library() is None:
        pytest.skip("no C++ compiler here")
    program = processes.start(load_the_library, output=tmp_path)
    assert processes.exit_codes([program]) == [0], processes.said(tmp_path)


def load_the_library() -> None:
    """In a process that has not loaded it yet."""

    def openmp() -> set[str]:
        paths = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        return {path for path in paths if path.rsplit("/")[-1].startswith(("libgomp", "libiomp"))}

    torch.get_num_threads()
    before = openmp()
    assert str(_openmp_of_torch()) in before, before
    assert compiled_library() is not None
    assert openmp() == before, openmp() - before
