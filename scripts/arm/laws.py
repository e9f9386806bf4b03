"""Runs the CPU's C++ kernels compiled for ARM on the calls that their laws make, under emulation: it shows what is right, not what is fast.

    apt-get install g++-aarch64-linux-gnu qemu-user
    python scripts/arm/laws.py [FLAGS FOR THE COMPILER]

The tests of the kernels (KERNEL_TESTS of the Makefile) run on this machine, where each holds a kernel to its reference. What every call was
given and what it left in memory is recorded. The same sources, compiled for ARM, then get the same calls under qemu-aarch64 (replay.cpp),
and must leave the same to the tolerances of the tests.
"""

import ctypes
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transxssm.ops.csrc import launch

ROOT = Path(__file__).parents[2]
COMPILER = (
    "aarch64-linux-gnu-g++",
    "-std=c++17",
    "-O2",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-static",
)
EMULATOR = ("qemu-aarch64", "-cpu", "max")
FLAGS_HERE = "-march=haswell"  # so that the ops take the kernels that ARM has too
MOST_CALLS = 40  # of one function
RECORDING = "TRANSXSSM_RECORDING"  # the file that the tests' process writes
Memory = list[tuple[torch.dtype, bytes]]


def pytest_configure(config: Any) -> None:
    """As a plugin of pytest: records calls."""
    calls: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    original = launch.Function.__call__

    def recorded(self: launch.Function, *arguments: Any) -> Any:
        has_memory = any(isinstance(each, Tensor | ctypes.Structure) for each in arguments)
        if not has_memory or counts[self._name] >= MOST_CALLS:
            return original(self, *arguments)
        tensors, addresses, given = _described(arguments)
        before = [_bytes(each) for each in tensors]
        result = original(self, *arguments)
        counts[self._name] += 1
        after = [_bytes(each) for each in tensors]
        dtypes = [each.dtype if isinstance(each, Tensor) else None for each in tensors]
        calls.append({"name": self._name, "before": before, "after": after, "dtypes": dtypes} | addresses | given)
        return result

    def written(session: Any, exitstatus: int) -> None:
        Path(os.environ[RECORDING]).write_bytes(pickle.dumps(calls))

    launch.Function.__call__ = recorded  # type: ignore[method-assign]
    config.pluginmanager.register(type("Writer", (), {"pytest_sessionfinish": staticmethod(written)})())


def _described(arguments: tuple[Any, ...]) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """What holds memory (tensors and structures), where structures hold addresses of it, and the arguments: ("b", number of the memory),
    ("i", integer) or ("f", float)."""
    held: list[Any] = []
    addresses, given = [], []
    for argument in arguments:
        if isinstance(argument, Tensor):
            given.append(("b", len(held)))
            held.append(argument)
        elif isinstance(argument, launch.Structure):
            own = len(held)
            given.append(("b", own))
            held.append(argument)
            for name, tensor in argument.__dict__.get("tensors", {}).items():
                addresses.append((own, getattr(type(argument), name).offset, len(held)))
                held.append(tensor)
        else:
            given.append(("f" if isinstance(argument, float) else "i", argument))
    return held, {"addresses": addresses}, {"arguments": given}


def _bytes(memory: Any) -> bytes:
    """A structure's, or a tensor's from its first number to its last, with what lies between rows that lie apart."""
    if not isinstance(memory, Tensor):
        return bytes(memory)
    if memory.numel() == 0:
        return b""
    last = sum((size - 1) * stride for size, stride in zip(memory.shape, memory.stride(), strict=True))
    return ctypes.string_at(memory.data_ptr(), (last + 1) * memory.itemsize)


def _sized(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _serialised(call: dict[str, Any]) -> bytes:
    parts = [_sized(call["name"].encode()), struct.pack("<q", len(call["before"])), *map(_sized, call["before"])]
    parts += [struct.pack("<q", len(call["addresses"])), *(struct.pack("<qqq", *each) for each in call["addresses"])]
    parts.append(struct.pack("<q", len(call["arguments"])))
    parts += [kind.encode() + struct.pack("<d" if kind == "f" else "<q", value) for kind, value in call["arguments"]]
    return b"".join(parts)


def _error(dtype: torch.dtype, before: bytes, after: bytes, actual: bytes) -> float:
    """‖actual − after‖ / ‖after‖ over what a call wrote, here or there: nan or inf where one is not finite, and 0 where both are alike."""
    if actual == after:
        return 0.0
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.uint8}[dtype.itemsize]
    was, here, there = (torch.frombuffer(bytearray(each), dtype=bits) for each in (before, after, actual))
    written = (here != was) | (there != was)
    expected, got = (each[written].view(dtype).double() for each in (here, there))
    return ((got - expected).norm() / expected.norm().clamp(min=1e-20)).item()


def main(flags: list[str]) -> None:
    sys.path.insert(0, str(ROOT))
    from tests.tolerances import TOLERANCES

    tests = (
        re.search(r"KERNEL_TESTS := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text())
        .group(1)
        .replace("\\", "")
        .split()
    )
    with tempfile.TemporaryDirectory() as folder:
        recording, program = Path(folder, "calls"), Path(folder, "replay")
        environment = os.environ | {
            RECORDING: str(recording),
            "TRANSXSSM_CPU_FLAGS": FLAGS_HERE,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        }
        pytest = (
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-p",
            "laws",
            "-k",
            "not operations and not compiled",
        )
        subprocess.run([*pytest, *tests], cwd=ROOT, env=environment, check=True)
        calls = pickle.loads(recording.read_bytes())
        sources = sorted((ROOT / "src/transxssm/ops/csrc").glob("*.cpp"))
        subprocess.run([*COMPILER, *flags, *sources, Path(__file__).with_name("replay.cpp"), "-o", program], check=True)
        given = struct.pack("<q", len(calls)) + b"".join(map(_serialised, calls))
        output = subprocess.run([*EMULATOR, program], input=given, capture_output=True, check=True).stdout
    worst: dict[str, tuple[int, float]] = {}
    place, wrong = 0, 0
    for call in calls:
        is_known, place = output[place], place + 1
        if not is_known:
            worst.setdefault(call["name"], (0, 0.0))
            continue
        count, most = worst.get(call["name"], (0, 0.0))
        for dtype, before, after in zip(call["dtypes"], call["before"], call["after"], strict=True):
            actual, place = output[place : place + len(before)], place + len(before)
            if dtype is None:  # a structure, whose addresses differ
                continue
            error = _error(dtype, before, after, actual)
            wrong += not error <= TOLERANCES[torch.bfloat16 if dtype == torch.bfloat16 else torch.float32]
            most = max(most, error) if error == error else error
        worst[call["name"]] = count + 1, most
    lines = [
        f"{name}: {count} calls, greatest relative error {most:.1e}" if count else f"{name}: not on ARM"
        for name, (count, most) in sorted(worst.items())
    ]
    lines.append(f"{sum(count for count, _ in worst.values())} calls, {wrong} arrays beyond the tolerance")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
