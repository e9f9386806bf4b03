"""FLOPs of a contender's step: linear layers, causal attention and the scan, as `transxssm.inspection` counts them.

Elementwise work, norms, the convolution and the softmax are left out: the time that these FLOPs take at the measured peak of a
matrix product is a floor for everything that multiplies in the same dtype.
"""

from transformers import PreTrainedConfig

from transxssm.inspection import (
    TRAINING_PER_FORWARD,
    AttentionLayer,
    Flops,
    attention_flops,
    flops_per_token,
    layers_of,
)


def step_flops(config: PreTrainedConfig, mode: str, length: int, batch: int) -> Flops:
    """FLOPs of a training step or a prefill over (batch, length) tokens, or of decoding one token in each row after `length`.

    A prefill needs the head for its last token only. Gradient checkpointing repeats the layers' forward pass, not the head's. A
    decoded token reads every key, and a state once in and once out.

    Raises:
        ValueError: a kind of model that is no contender.
    """
    forward = flops_per_token(config, length)
    if mode == "decode":
        attention = ssd = 0.0
        for layer in layers_of(config):
            if isinstance(layer, AttentionLayer):
                num_keys = length + 1 if layer.window is None else min(length + 1, layer.window)
                attention += attention_flops(layer.num_heads, layer.head_dim, num_keys)
            else:
                ssd += 4 * layer.num_heads * layer.head_dim * layer.state_size
        return Flops(forward.linear, attention, ssd).times(batch)
    whole = forward.times(length)
    head = 2 * config.hidden_size * config.vocab_size
    if mode == "prefill":
        return whole._replace(linear=whole.linear - (length - 1) * head).times(batch)
    if mode == "train-checkpointed":
        repeated = whole.times(TRAINING_PER_FORWARD + 1)
        return repeated._replace(linear=repeated.linear - length * head).times(batch)
    return whole.times(TRAINING_PER_FORWARD * batch)
