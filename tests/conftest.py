"""What every test stands on: no network, one thread, fixed seeds, and a device that the command line chooses."""

import gc
import os
import random
import re
import tempfile

# The hub libraries read these once, when they are imported, so they are set before anything else is. Every process has a
# cache of its own, removed in the end: no test sees what another, or the user, has cached.
_CACHE = tempfile.TemporaryDirectory(prefix="transxssm-tests-")
os.environ |= {
    "HF_HOME": _CACHE.name,
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
    # What another process was writing when it was killed would be found in the user's own.
    "TORCHINDUCTOR_CACHE_DIR": f"{_CACHE.name}/inductor",
    # One thread, here and in the processes that tests start: workers share the cores, and sums keep their order.
    "OMP_NUM_THREADS": "1",
}
for _variable in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE"):
    os.environ.pop(_variable, None)  # each would outrank HF_HOME

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: its kernels run on a CPU, step by step
torch.set_num_threads(1)

# The same examples in every run: a failure on one machine is a failure on all. The first example compiles and allocates, so
# time says nothing about the code.
hypothesis.settings.register_profile("transxssm", derandomize=True, deadline=None, max_examples=25, database=None)
hypothesis.settings.load_profile("transxssm")


def pytest_collection_finish() -> None:
    # What all tests share is kept for good: each full collection, of which Trainer and the compiler ask for many, would go through
    # all that the libraries have made when they were imported.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    _CACHE.cleanup()  # here and not at exit, which the workers of pytest-xdist skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="where the tests of the ops and of real layers compute: cpu (default), cuda, cuda:1, …",
    )


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--device")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise pytest.UsageError(f"--device must be cpu, cuda or cuda:N: got {name!r}")
    if name != "cpu" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {name}: this torch ({torch.__version__}) sees no CUDA device")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of `--device`; the tests of the ops and of real layers make their tensors there."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
