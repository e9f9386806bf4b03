"""Bytes by formula are those of a real cache, and of a real forward pass within a factor of two."""

import sys
import weakref
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from tests.models.tiny import ALL_VARIANTS, tiny_config, tiny_model, tokens
from transxssm.inspection import activation_bytes, all_attention_bytes, available_bytes, cache_bytes, memory
from transxssm.models import TransXSSMCache, TransXSSMConfig, TransXSSMForCausalLM
from transxssm.models.baselines import BASELINES, new_language_model
from transxssm.ops.csrc import compiled_library
from transxssm.ops.ssd import cpp, ssd_chunk_scan

DTYPES = [torch.float32, torch.bfloat16]


def bytes_of(cache: Cache) -> tuple[int, int]:
    """(keys and values, states) that a cache holds."""
    kv = state = 0
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            held = (*layer.recurrent_states.values(), *layer.conv_states.values())
            state += sum(tensor.nbytes for tensor in held if tensor is not None)
        else:
            kv += layer.keys.nbytes + layer.values.nbytes
    return kv, state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [2, 9])
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_a_real_cache(variant, length, dtype):
    model = tiny_model(variant, dtype=dtype)
    cache = TransXSSMCache(config=model.config)
    with torch.no_grad():
        for piece in tokens(1, length).split(1, dim=1):
            model(piece, past_key_values=cache)
    assert cache_bytes(model.config, length, dtype) == bytes_of(cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BASELINES)
def test_a_real_cache_of_a_baseline(name, dtype):
    model = new_language_model(BASELINES[name](tiny_config()), dtype=dtype).eval()
    with torch.no_grad():
        output = model(input_ids=tokens(1, 9), use_cache=True)
    cache = output.cache_params if name == "mamba2" else output.past_key_values
    assert cache_bytes(model.config, 9, dtype) == bytes_of(cache)


def test_all_attention_keeps_keys_and_values_in_every_layer():
    config = tiny_config("hybrid")  # one attention layer of three
    assert config.layer_types.count("full_attention") == 1
    assert all_attention_bytes(config, 100, torch.bfloat16) == 3 * cache_bytes(config, 100, torch.bfloat16).kv
    llama, jamba, mamba2 = (BASELINES[name](config) for name in ("llama", "jamba", "mamba2"))
    assert all_attention_bytes(llama, 100, torch.bfloat16) == cache_bytes(llama, 100, torch.bfloat16).total
    assert all_attention_bytes(jamba, 100, torch.bfloat16) == 3 * cache_bytes(jamba, 100, torch.bfloat16).kv
    assert all_attention_bytes(mamba2, 100, torch.bfloat16) is None


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at one time; temporaries inside an operator are not seen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peak = self.now = 0
        self.sizes = {parameter.untyped_storage()._cdata: 0 for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return result

    def free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer_types": ["linear_attention"] * 2},
        {"layer_types": ["full_attention"] * 2, "intermediate_size": 64},
        {"layer_types": ["full_attention"] * 2, "qk_norm": True, "intermediate_size": 64},
        {"layer_types": ["full_attention"] * 2, "attention_output_gate": True, "intermediate_size": 64},
        {
            "layer_types": ["full_attention"] * 2,
            "attention_position_embedding": "none",
            "qk_norm": True,
            "intermediate_size": 64,
        },
        {"layer_types": ["full_attention"] * 2, "attention_position_embedding": "none", "intermediate_size": 64},
        {"layer_types": ["sliding_attention"] * 2, "sliding_window": 32},
        {"intermediate_size": 4096},
    ],
    ids=str,
)
def test_activations_within_a_factor_of_two(options, dtype):
    assert 1 <= estimate_over_measurement(options, dtype) <= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"ssd_conv_kernel_size": 4},
        {"ssd_norm_BC": True},
        {"ssd_bias_BC": True},
        {"ssd_output_gate": True},
        {"ssd_scan_in_fp32": True},
        {"ssd_norm_BC": True, "ssd_bias_BC": True, "ssd_output_gate": True},
    ],
    ids=str,
)
def test_what_stands_around_the_scan(options, dtype, monkeypatch):
    """The scan's own tensors, which are not seen, would hide what the options of its layer add."""
    monkeypatch.setattr(memory, "_scan_workspace", lambda config, num_tokens, dtype: 0)
    options = {"layer_types": ["linear_attention"] * 2, "intermediate_size": 64} | options
    assert 1 <= estimate_over_measurement(options, dtype) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [100, 2048])
def test_the_scans_own_workspace(length, dtype, monkeypatch):
    """By counting it, where kernels have one."""
    config = TransXSSMConfig.from_preset("small")
    h, g, p, n = config.ssd_num_heads, config.ssd_num_groups, config.ssd_head_dim, config.ssd_state_size
    x, B = torch.zeros(1, length, h, p, dtype=dtype), torch.zeros(1, length, g, n, dtype=dtype)
    if compiled_library() is None:
        pytest.skip("no C++ compiler here")
    most, workspace = [0], cpp._Scan._workspace

    def counted(scan, *size):
        work = workspace(scan, *size)
        most.append(sum(tensor.nbytes for tensor in work.values()))
        return work

    monkeypatch.setattr(cpp._Scan, "_workspace", counted)
    ssd_chunk_scan(x, torch.zeros(1, length, h), -torch.ones(h), B, B)
    assert 1 <= memory._scan_workspace(config, length, dtype) / max(most) <= 1.7


def estimate_over_measurement(options: dict, dtype: torch.dtype, length: int = 512) -> float:
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}
    config = TransXSSMConfig(**(sizes | {"num_hidden_layers": 2} | options))
    model, ids = TransXSSMForCausalLM(config).to(dtype).eval(), torch.randint(0, 64, (1, length))
    with torch.no_grad(), PeakBytes(model) as measured:
        output = model(ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
    peak = measured.peak - sum(bytes_of(output.past_key_values))
    return activation_bytes(config, length, dtype) / peak


def test_what_is_unused_is_read_where_the_system_tells_it(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMORY_INFO", tmp_path / "meminfo")
    total = psutil.virtual_memory().total
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=700))
    assert memory._unused_memory() == 700  # as on another system than Linux
    monkeypatch.setitem(sys.modules, "psutil", None)  # not installed
    assert memory._unused_memory() == total
    (tmp_path / "meminfo").write_text("MemTotal:       3000 kB\nMemFree:          10 kB\nMemAvailable:   2000 kB\n")
    assert memory._unused_memory() == 2000 * 1024


def test_a_containers_limit_bounds_what_is_available(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_unused_memory", lambda: 1000)
    cpu = torch.device("cpu")
    assert available_bytes(cpu) == 1000
    (tmp_path / "memory.current").write_text("400\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(cpu) == 1000
    (tmp_path / "memory.max").write_text("900\n")
    assert available_bytes(cpu) == 500
