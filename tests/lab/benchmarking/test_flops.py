"""FLOPs by formula are those that torch counts while a baseline runs."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.models.tiny import tiny_config, tokens
from transxssm.inspection import flops_per_token
from transxssm.models.baselines import BASELINES, jamba_config, mamba2_config, new_language_model
from transxssm_lab.benchmarking.flops import step_flops

LENGTH, CHUNK = 12, 4
CONV_KERNEL = 4
COUNTS_ALIKE = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers 5.17 multiplies matrices for its angles, and none in Mamba-2's reference",
)


def counted(config, *, training: bool) -> dict[str, float]:
    """FLOPs of linear layers, of attention (eager: the whole square) and of Mamba-2's mixers without their convolutions."""
    model = new_language_model(config, **({"attn_implementation": "eager"} if config.model_type != "mamba2" else {}))
    counter = FlopCounterMode(display=False)
    input_ids = tokens(1, LENGTH)
    with counter:
        logits = model(input_ids=input_ids, use_cache=False).logits
        if training:
            logits.sum().backward()
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    linear = sum(
        by_module.get(f"{type(model).__name__}.{name}", 0)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    )
    return {"linear": linear, "rest": counter.get_total_flops() - linear}


@COUNTS_ALIKE
def test_llama():
    config = BASELINES["llama"](tiny_config())
    forward, training = (counted(config, training=training) for training in (False, True))
    flops = step_flops(config, "train", LENGTH, 1)
    assert forward["linear"] * 3 == flops.linear
    square = 2 * LENGTH / (LENGTH + 1)
    assert forward["rest"] * 3 == pytest.approx(flops.attention * square)
    assert sum(training.values()) == pytest.approx(flops.linear + flops.attention * square)


@COUNTS_ALIKE
@pytest.mark.parametrize("match", [mamba2_config, jamba_config])
def test_mamba2_blocks(match):
    config = match(tiny_config())
    names = (
        ("n_groups", "num_heads", "chunk_size", "conv_kernel")
        if match is mamba2_config
        else ("mamba_n_groups", "mamba_n_heads", "mamba_chunk_size", "mamba_d_conv")
    )
    # transformers repeats B and C for every head before it multiplies: with a group for each head the counts agree.
    setattr(config, names[0], getattr(config, names[1]))
    setattr(config, names[2], CHUNK)
    setattr(config, names[3], CONV_KERNEL)
    got, flops = counted(config, training=False), step_flops(config, "train", LENGTH, 1).times(1 / 3)
    num_scans = config.layer_types.count("linear_attention")
    heads, state = getattr(config, names[1]), getattr(config, "state_size", None) or config.mamba_d_state
    width = 2 * config.hidden_size  # of all heads
    channels = width + 2 * heads * state
    convolution = 2 * CONV_KERNEL * channels * (LENGTH + CONV_KERNEL - 1)
    num_states = LENGTH // CHUNK + 1
    between_chunks = 2 * num_states**2 * width * state  # transformers forms this short recurrence as a product too
    attention = flops.attention * 2 * LENGTH / (LENGTH + 1)
    assert got["linear"] == pytest.approx(flops.linear)
    assert got["rest"] == pytest.approx(flops.ssd + attention + num_scans * (convolution + between_chunks))


@pytest.mark.parametrize("name", [*BASELINES, "transxssm"])
def test_modes(name):
    config = BASELINES.get(name, lambda config: config)(tiny_config())
    train, prefill, decode = (step_flops(config, mode, LENGTH, 1) for mode in ("train", "prefill", "decode"))
    head = 2 * config.hidden_size * config.vocab_size
    assert prefill.linear == train.linear / 3 - (LENGTH - 1) * head
    assert (prefill.attention, prefill.ssd) == pytest.approx((train.attention / 3, train.ssd / 3))
    assert decode.linear == train.linear / 3 / LENGTH
    assert step_flops(config, "train", LENGTH, 5).total == pytest.approx(5 * train.total)
    checkpointed = step_flops(config, "train-checkpointed", LENGTH, 1)
    assert checkpointed.total == pytest.approx(train.total * 4 / 3 - LENGTH * head)
    assert step_flops(config, "train-checkpointed", LENGTH, 5).total == pytest.approx(5 * checkpointed.total)
    later = step_flops(config, "decode", 2 * LENGTH, 1)
    assert later.ssd == decode.ssd
    if decode.attention:  # the new token sees itself too
        assert later.attention / decode.attention == pytest.approx((2 * LENGTH + 1) / (LENGTH + 1))


def test_a_decoded_token_sees_a_windows_keys():
    config = tiny_config("sliding", layer_types=["sliding_attention"] * 3)  # windows of 4
    long, short = (step_flops(config, "decode", length, 1).attention for length in (LENGTH, 1))
    assert (long, short) == (3 * 4 * 32 * 4, 3 * 4 * 32 * 2)


def test_ours_are_those_that_inspection_counts():
    config = tiny_config()
    assert step_flops(config, "train", LENGTH, 1).total == pytest.approx(
        3 * LENGTH * flops_per_token(config, LENGTH).total
    )


def test_another_kind_of_model_is_refused():
    from transformers import GPT2Config

    with torch.device("meta"), pytest.raises(ValueError, match="got 'gpt2'"):
        step_flops(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9), "prefill", 2, 1)
