"""Decoding with the GPU's kernels is the whole row at once: on a GPU, and on a CPU through Triton's interpreter."""

import pytest
import torch

from tests import gpu_kernels
from tests.models.tiny import ALL_VARIANTS, tiny_model, tokens
from tests.tolerances import assert_close
from transxssm.models.configuration_transxssm import SSD_LAYER_TYPE


@pytest.mark.parametrize("num_pads", [0, 3])
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_prefill_and_decode_is_full(variant, num_pads, device, monkeypatch):
    kernels = gpu_kernels.install(monkeypatch, device)
    calls = {"step_over_state": 0, "attend_once": 0}

    def count(module, name):
        function = getattr(module, name)

        def counted(*arguments, **options):
            calls[name] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    count(kernels.step, "step_over_state")
    count(kernels.single_query_attention, "attend_once")
    model = tiny_model(variant, torch.float32, attn_implementation="sdpa").to(device)
    input_ids = tokens(2, 9).to(device)
    mask = torch.ones_like(input_ids)
    mask[0, :num_pads] = 0
    with torch.no_grad():
        expected = model(input_ids, attention_mask=mask, use_cache=False).logits[:, 5:]
        cache = model(input_ids[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values
        logits = [
            model(input_ids[:, t, None], attention_mask=mask[:, : t + 1], past_key_values=cache).logits
            for t in range(5, 9)
        ]
    config = model.config
    assert_close(torch.cat(logits, dim=1), expected, torch.float32, num_ops=config.num_hidden_layers)
    num_ssd = config.layer_types.count(SSD_LAYER_TYPE)
    has_own_keys = config.num_key_value_heads == config.num_attention_heads
    num_attention = (config.num_hidden_layers - num_ssd) if has_own_keys else 0
    assert calls == {"step_over_state": 4 * num_ssd, "attend_once": 4 * num_attention}
