"""What a CPU multiplies in hardware is read off its instruction sets."""

import pytest
import torch

from transxssm.ops.precision import has_fast_products, has_float64

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
