"""Which layers mix tokens, and that models without a formula are refused."""

import pytest
from transformers import GPT2Config

from tests.models.tiny import tiny_config
from transxssm.inspection import AttentionLayer, ScanLayer, layers_of
from transxssm.models.baselines import BASELINES


def test_a_window_belongs_to_its_layer():
    sliding, linear, full = layers_of(tiny_config("everything"))
    assert isinstance(linear, ScanLayer)
    assert linear.conv_state_size == 2  # a convolution of 3
    assert isinstance(sliding, AttentionLayer)
    assert sliding.window == 4
    assert full == sliding._replace(window=None)


def test_baselines():
    config = tiny_config("hybrid")
    assert [type(layer) for layer in layers_of(BASELINES["jamba"](config))] == [ScanLayer, AttentionLayer, ScanLayer]
    assert {type(layer) for layer in layers_of(BASELINES["llama"](config))} == {AttentionLayer}
    mamba2 = BASELINES["mamba2"](config)
    assert layers_of(mamba2) == [ScanLayer(8, 8, 1, mamba2.state_size, 256, 4)] * mamba2.num_hidden_layers


def test_another_kind_of_model_is_refused():
    with pytest.raises(ValueError, match="TransXSSM, Llama, Mamba-2 and Bamba: got 'gpt2'"):
        layers_of(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
