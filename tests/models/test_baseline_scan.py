"""transformers' Mamba-2 models compute the same on this package's scan."""

import pytest
import torch

from tests.models.tiny import tiny_config, tokens
from tests.tolerances import assert_close
from transxssm.models import baseline_scan
from transxssm.models.baseline_scan import use_our_scan
from transxssm.models.baselines import BASELINES, new_language_model
from transxssm.ops.ssd import ssd_chunk_scan

LENGTH = 300  # more than one of their chunks


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
        baseline_scan, "ssd_chunk_scan", lambda *args, **kwargs: calls.append(1) or ssd_chunk_scan(*args, **kwargs)
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
