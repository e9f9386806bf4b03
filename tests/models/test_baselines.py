"""Baselines have the parameters of the model they are matched to, and are ordinary models of transformers."""

import pytest
import torch

from tests.models.tiny import tiny_config, tokens
from tests.tolerances import assert_close
from transxssm.models import PRESETS, TransXSSMConfig, baselines
from transxssm.models.baselines import (
    BASELINES,
    PARAMETER_TOLERANCE,
    count_baseline_parameters,
    jamba_config,
    llama_config,
    mamba2_config,
    new_language_model,
    use_our_scan,
)
from transxssm.ops.ssd import ssd_chunk_scan

LENGTH = 300  # more than one of their chunks


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_match(preset, name):
    config = TransXSSMConfig.from_preset(preset)
    baseline = BASELINES[name](config)
    assert abs(count_baseline_parameters(baseline) / count_baseline_parameters(config) - 1) <= PARAMETER_TOLERANCE
    shared = ("vocab_size", "hidden_size", "tie_word_embeddings", "initializer_range")
    assert all(getattr(baseline, field) == getattr(config, field) for field in shared)


def test_parameters_are_those_of_a_real_model():
    config = tiny_config()
    for each in (config, *(match(config) for match in BASELINES.values())):
        assert count_baseline_parameters(each) == sum(p.numel() for p in new_language_model(each).parameters())


def test_the_papers_llama():
    """Table 4 with our choice of FFN: Llama's is as wide as the hybrid's."""
    config = TransXSSMConfig.from_preset("320m")
    llama = llama_config(config)
    sizes = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    assert [getattr(llama, size) for size in sizes] == [getattr(config, size) for size in sizes]
    assert llama.rope_parameters["rope_theta"] == config.rope_parameters["rope_theta"]
    assert round(count_baseline_parameters(llama) / 1e6, 1) == 321.8


def test_jamba_has_attention_where_the_hybrid_has_it():
    config = TransXSSMConfig.from_preset("320m")
    jamba = jamba_config(config)
    assert jamba.layer_types == config.layer_types
    assert (jamba.mamba_d_state, jamba.mamba_chunk_size) == (128, 256)
    rotary = new_language_model(jamba_config(tiny_config())).model.rotary_emb
    assert 2 * len(rotary.inv_freq) == tiny_config().head_dim  # the whole head


def test_mamba2_makes_up_for_the_missing_ffn_in_depth():
    config = TransXSSMConfig.from_preset("320m")
    mamba2 = mamba2_config(config)
    assert mamba2.num_hidden_layers > 2 * config.num_hidden_layers
    assert (mamba2.state_size, mamba2.chunk_size, mamba2.n_groups) == (128, 256, 1)


def test_where_a_layer_is_too_coarse_mamba2s_state_is_resized():
    config = tiny_config()
    mamba2 = mamba2_config(config)
    assert mamba2.state_size != config.ssd_state_size
    assert abs(count_baseline_parameters(mamba2) / count_baseline_parameters(config) - 1) <= PARAMETER_TOLERANCE


def test_bambas_time_steps_start_as_mamba2s():
    torch.manual_seed(0)
    config = TransXSSMConfig.from_preset("tiny")
    models = [new_language_model(match(config)) for match in (jamba_config, mamba2_config)]
    for model in models:
        biases = torch.cat([p.detach() for name, p in model.named_parameters() if name.endswith("dt_bias")])
        steps = torch.nn.functional.softplus(biases)
        assert steps.min() >= 0.999e-3
        assert steps.max() <= 0.1001
        assert steps.std() > 0


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_trains_and_generates(name):
    model = new_language_model(BASELINES[name](tiny_config()))
    input_ids = tokens(2, 12)
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    generated = model.eval().generate(input_ids[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 15)


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        # One unit of FFN width is more than 4 % of a model that is all FFN and next to nothing else.
        ("jamba", {"intermediate_size": 1, "hidden_size": 32}, "no jamba matches the model's"),
        ("mamba2", {"ssd_head_dim": 24, "ssd_num_heads": 2}, "must be a multiple of ssd_head_dim: got 64 and 24"),
    ],
)
def test_what_cannot_be_matched_is_refused(name, sizes, words):
    with pytest.raises(ValueError, match=words):
        BASELINES[name](tiny_config(**sizes))


def losses_and_gradients(model, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(**inputs, use_cache=False)
    output.logits.float().logsumexp(-1).mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"logits": output.logits.detach(), **gradients}


@pytest.mark.parametrize("name", ["mamba2", "jamba"])
@pytest.mark.parametrize("padded", [False, True])
def test_computes_what_transformers_does(name, padded):
    torch.manual_seed(0)
    model = new_language_model(BASELINES[name](tiny_config()))
    model.train()
    inputs = {"input_ids": tokens(2, LENGTH)}
    if padded:
        inputs["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long)
        inputs["attention_mask"][0, :5] = 0
    expected = losses_and_gradients(model, **inputs)
    use_our_scan(model)
    actual = losses_and_gradients(model, **inputs)
    if padded:  # what pads compute is nobody's
        for results in (actual, expected):
            results["logits"] = results["logits"] * inputs["attention_mask"][..., None]
    for key, value in expected.items():
        # Rounding adds up over the layers; the gradient of what hardly has one is compared by its size in the model.
        assert_close(actual[key], value, torch.float32, key, scale=1e-4, num_ops=16)


@pytest.mark.parametrize("name", ["mamba2", "jamba"])
def test_is_what_runs(name, monkeypatch):
    model = new_language_model(BASELINES[name](tiny_config()))
    use_our_scan(model)
    calls = []
    monkeypatch.setattr(
        baselines, "ssd_chunk_scan", lambda *args, **kwargs: calls.append(1) or ssd_chunk_scan(*args, **kwargs)
    )
    model(tokens(1, 8), use_cache=False)
    assert calls


@pytest.mark.parametrize("name", ["mamba2", "jamba"])
def test_generates_as_before(name):
    torch.manual_seed(0)
    model = new_language_model(BASELINES[name](tiny_config())).eval()
    prompt = tokens(1, 7)
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    use_our_scan(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), expected)
