"""What devices can do: products in hardware, float64, blocks that fit the cache, kernels in Triton."""

from contextlib import nullcontext

import pytest
import torch

from transxssm.ops import devices
from transxssm.ops.devices import ELEMENTS_PER_BLOCK, has_fast_products, has_float64, row_blocks

CHECKS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported")


@pytest.mark.parametrize(
    ("supported", "bfloat16", "float16"),
    [
        ((), False, False),
        (("_is_avx512_bf16_supported",), True, False),
        (("_is_amx_tile_supported",), True, False),
        (("_is_amx_tile_supported", "_is_amx_fp16_supported"), True, True),
    ],
)
def test_half_types_on_a_cpu(supported, bfloat16, float16, monkeypatch):
    for check in CHECKS:
        monkeypatch.setattr(torch.cpu, check, lambda check=check: check in supported)
    assert has_fast_products("cpu", torch.bfloat16) == bfloat16
    assert has_fast_products("cpu", torch.float16) == float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_full_types_are_always_fast(dtype):
    assert has_fast_products("cpu", dtype)


def test_accelerators_are_taken_at_their_word():
    assert has_fast_products("cuda", torch.bfloat16)


def test_apples_gpus_have_no_float64():
    assert [has_float64(torch.device(name)) for name in ("cpu", "cuda:1", "mps", "meta")] == [True, True, False, True]


@pytest.mark.parametrize(
    "shape", [(0, 4), (1, 1), (7, 3), (5, ELEMENTS_PER_BLOCK), (3, ELEMENTS_PER_BLOCK + 1), (1000, 1000)], ids=str
)
def test_blocks_cover_every_row_once(shape):
    rows = torch.empty(shape, device="meta")
    covered = [index for block in row_blocks(rows) for index in range(*block.indices(shape[0]))]
    assert covered == list(range(shape[0]))


def test_a_block_fits_its_size_and_the_gpu_takes_one():
    rows = torch.empty(1000, 1000)
    assert max((block.stop - block.start) * 1000 for block in row_blocks(rows)) <= ELEMENTS_PER_BLOCK
    assert list(row_blocks(rows.to("meta"))) == [slice(0, 1000)]


@pytest.mark.parametrize("number", range(1, 70))
def test_power_of_2(number):
    side = devices.power_of_2(number)
    assert side.bit_count() == 1
    assert side // 2 < number <= side


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_old_gpus_have_no_kernels(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(devices, "_reason_against_compiling", lambda: None)
    assert (devices.reason_without_triton(0) is None) == expected


class TestTriton:
    @pytest.fixture(autouse=True)
    def asked_anew(self):
        devices._reason_against_compiling.cache_clear()
        yield
        devices._reason_against_compiling.cache_clear()

    @pytest.fixture
    def driver(self, monkeypatch):
        """Of Triton, whose device is what the test says."""
        driver = pytest.importorskip("triton.runtime").driver

        def install(get_current_device):
            class Device:
                def get_current_device(self):
                    return get_current_device()

            monkeypatch.setattr(driver, "_active", Device(), raising=False)

        return install

    def test_it_is_switched_off(self, monkeypatch):
        monkeypatch.setenv("TRANSXSSM_GPU_KERNELS", "0")
        assert devices._reason_against_compiling() == "TRANSXSSM_GPU_KERNELS=0 switches them off"

    def test_it_is_not_there(self, monkeypatch):
        monkeypatch.setattr(devices, "find_spec", lambda name: None)
        assert "pip install triton" in devices._reason_against_compiling()

    def test_it_has_no_compiler(self, driver):
        asked = []

        def fail():
            asked.append(1)
            raise RuntimeError("Failed to find C compiler")

        driver(fail)
        for _ in range(2):
            assert "RuntimeError: Failed to find C compiler" in devices._reason_against_compiling()
        assert len(asked) == 1

    def test_it_compiles(self, driver):
        driver(lambda: 0)
        assert devices._reason_against_compiling() is None


def test_launches_go_where_the_tensors_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert isinstance(devices.launched_on(torch.device("cuda:1")), torch.cuda.device)
    assert isinstance(devices.launched_on(torch.device("cuda:0")), nullcontext)
    assert isinstance(devices.launched_on(torch.device("cpu")), nullcontext)
