"""A prompt read once and repeated is the prompt read in every row."""

import pytest
import torch

from tests.models.tiny import tiny_config, tokens
from transxssm.inspection import cache_bytes
from transxssm_lab.benchmarking import steps
from transxssm_lab.benchmarking.contenders import CONTENDERS, build_prompt
from transxssm_lab.benchmarking.steps import DECODE_TOKENS, read_prompt

CPU = torch.device("cpu")
LENGTH, BATCH = 9, 3
DECODING = [name for name, contender in CONTENDERS.items() if "decode" in contender.modes]


@pytest.fixture(autouse=True)
def _without_code_generation(monkeypatch):
    """What is compiled is traced, each layer or a step as one graph, and code is not generated for half a minute."""
    torch.compiler.reset()
    compile_module = torch.nn.Module.compile
    traced = {"mode": None, "backend": "eager"}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **given: compile_module(module, **(given | traced)))


def prompt_of(name, batch, dtype=torch.float64):
    config = CONTENDERS[name].config(tiny_config())
    return build_prompt(name, config, LENGTH, batch, dtype, 2 * DECODE_TOKENS, device=CPU)


@torch.no_grad()
def decoded(prompt, rows):
    """(b, t, v) logits of (b, t) tokens, one by one."""
    name = "cache_params" if hasattr(prompt.model, "backbone") else "past_key_values"
    steps = [prompt.model(input_ids=column[:, None], use_cache=True, **{name: prompt.cache}) for column in rows.T]
    return torch.cat([step.logits for step in steps], dim=1)


@pytest.mark.parametrize("name", DECODING)
def test_a_repeated_cache_decodes_as_rows_that_were_read_together(name):
    """Each row goes on with other tokens, so that rows that shared memory would be found out."""
    one, rows = prompt_of(name, 1), tokens(BATCH, 5)
    new_cache = CONTENDERS[name].new_cache
    cache = new_cache and new_cache(one.model.config, LENGTH + 2 * DECODE_TOKENS)
    together = read_prompt(one.model, one.input_ids.repeat(BATCH, 1), cache)
    expected = decoded(together, rows)
    torch.testing.assert_close(decoded(one.repeated(BATCH), rows), expected, rtol=1e-5, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", DECODING)
def test_a_repeated_step_runs_and_leaves_the_prompt_as_it_was(name):
    one = prompt_of(name, 1, torch.float32)
    held = one.cache_bytes()
    repeated = one.repeated(BATCH)
    assert repeated.input_ids.shape == (BATCH, LENGTH)
    step = repeated.step()
    for _ in range(2):
        step.run()
    assert one.cache_bytes() == held


def test_cache_bytes_are_those_of_the_states_the_keys_and_their_room():
    prompt = prompt_of("transxssm-ssd", 1).repeated(BATCH)
    config = CONTENDERS["transxssm-ssd"].config(tiny_config())
    assert prompt.cache_bytes() == BATCH * 2 * cache_bytes(config, LENGTH, torch.float64).total  # states in float64
    static = prompt_of("llama-static", 1).repeated(BATCH)
    config = static.model.config
    per_token = 2 * 8 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    assert static.cache_bytes() == BATCH * (LENGTH + 2 * DECODE_TOKENS) * per_token


def test_a_repeated_static_cache_stays_where_a_cuda_graph_wrote():
    """What transformers marks when it makes its tensors; without the mark there is no CUDA graph."""
    for name in ("transxssm-graph", "llama-static"):
        tensors = steps._tensors_of_cache(prompt_of(name, 1).repeated(BATCH).cache)
        assert tensors
        assert all(hasattr(tensor, "_dynamo_static_input_type") for tensor in tensors)


def test_several_rows_are_not_repeated():
    with pytest.raises(ValueError, match="a prompt of one row can be repeated: got 2 rows"):
        prompt_of("llama", 2).repeated(3)
