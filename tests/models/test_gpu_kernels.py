"""Decoding with the GPU's kernels is the whole row at once: on a GPU, and on a CPU through Triton's interpreter."""

import pytest
import torch

from tests import gpu_kernels
from tests.models.tiny import combinations, one_of_each, tiny_model, tokens
from tests.tolerances import assert_close
from transxssm.models.configuration_transxssm import SSD_LAYER_TYPE


@pytest.mark.parametrize(("variant", "num_pads"), combinations([0, 3]))
def test_prefill_and_decode_is_full(variant, num_pads, device, monkeypatch):
    kernels = gpu_kernels.install(monkeypatch, device)
    steps = gpu_kernels.counted(monkeypatch, kernels.step, "step_over_state")
    queries = gpu_kernels.counted(monkeypatch, kernels.single_query_attention, "attend_once")
    model = tiny_model(variant, torch.float32, attn_implementation="sdpa", **one_of_each(variant)).to(device)
    input_ids = tokens(2, 7).to(device)
    mask = torch.ones_like(input_ids)
    mask[0, :num_pads] = 0
    with torch.no_grad():
        expected = model(input_ids, attention_mask=mask, use_cache=False).logits[:, 5:]
        cache = model(input_ids[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values
        logits = [
            model(input_ids[:, t, None], attention_mask=mask[:, : t + 1], past_key_values=cache).logits
            for t in range(5, 7)
        ]
    config = model.config
    assert_close(torch.cat(logits, dim=1), expected, torch.float32, num_ops=config.num_hidden_layers)
    num_ssd = config.layer_types.count(SSD_LAYER_TYPE)
    has_own_keys = config.num_key_value_heads == config.num_attention_heads
    num_attention = (config.num_hidden_layers - num_ssd) if has_own_keys else 0
    assert (len(steps), len(queries)) == (2 * num_ssd, 2 * num_attention)


def attention(device):
    """A model of attention alone, and a cache of seven tokens in two rows."""
    model = tiny_model("all_attention", torch.float32, attn_implementation="sdpa").to(device)
    with torch.no_grad():
        return model, model(tokens(2, 7).to(device), use_cache=True).past_key_values


@pytest.fixture
def queries(monkeypatch, device):
    kernels = gpu_kernels.install(monkeypatch, device)
    return gpu_kernels.counted(monkeypatch, kernels.single_query_attention, "attend_once")


def test_a_token_with_gradients_takes_torch(queries, device):
    model, cache = attention(device)
    model(tokens(2, 1).to(device), past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    assert not queries


def test_a_token_in_training_takes_torch(queries, device):
    """Dropout would be left out."""
    model, cache = attention(device)
    with torch.no_grad():
        model.train()(tokens(2, 1).to(device), past_key_values=cache)
    assert not queries


@pytest.mark.parametrize("kind", ["of each head", "of numbers"])
def test_other_masks_take_torch(kind, queries, device):
    model, cache = attention(device)
    seen = torch.rand(2, model.config.num_attention_heads, 1, 8, device=device) < 0.5
    seen[..., -1] = True
    if kind == "of numbers":
        seen = torch.zeros(2, 1, 1, 8, device=device).masked_fill(~seen[:, :1], -1e9)
    with torch.no_grad():
        model(tokens(2, 1).to(device), attention_mask=seen, past_key_values=cache)
    assert not queries
