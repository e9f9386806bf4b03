"""FLOPs by formula are those that torch counts while a model runs."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.models.tiny import ALL_VARIANTS, tiny_config, tiny_model, tokens
from transxssm.inspection import TRAINING_PER_FORWARD, flops_per_token
from transxssm.models import TransXSSMConfig
from transxssm.ops.ssd import chunked

LENGTH = 12  # three chunks


@pytest.fixture
def counter(monkeypatch):
    """Counts every product that is computed: inside the scan's own operator too, where torch's counter does not look."""
    monkeypatch.setattr(chunked, "_scan", chunked._scan._init_fn)
    return FlopCounterMode(display=False)


def counted(counter: FlopCounterMode, model: nn.Module) -> dict[str, int]:
    """FLOPs by kind: of linear layers, and of the rest inside attention and SSD layers."""
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    kinds = dict.fromkeys(("linear", "attention", "ssd"), 0)
    for name, module in model.named_modules():
        flops = by_module.get(f"{type(model).__name__}.{name}", 0)
        if isinstance(module, nn.Linear):
            kinds["linear"] += flops
            mixer = {"self_attn": "attention", "ssd": "ssd"}.get(name.split(".")[-2] if "." in name else "")
            if mixer:
                kinds[mixer] -= flops
        elif name.endswith(("self_attn", "ssd")):
            kinds["attention" if name.endswith("self_attn") else "ssd"] += flops
    assert sum(kinds.values()) == counter.get_total_flops()  # nothing multiplies matrices elsewhere
    return kinds


@pytest.mark.parametrize("variant", [name for name in ALL_VARIANTS if name not in ("sliding", "everything")])
def test_forward(variant, counter):
    model = tiny_model(variant, attn_implementation="eager")
    with counter, torch.no_grad():
        model(tokens(1, LENGTH), use_cache=False)
    kinds, flops = counted(counter, model), flops_per_token(model.config, LENGTH)
    assert kinds["linear"] == flops.linear * LENGTH
    assert kinds["ssd"] == flops.ssd * LENGTH
    # Eager attention computes the whole square, of which causality leaves (t + 1) / 2t.
    assert kinds["attention"] * (LENGTH + 1) / (2 * LENGTH) == pytest.approx(flops.attention * LENGTH)


def test_training_is_a_forward_pass_and_twice_as_much_backward(counter):
    model = tiny_model("all_attention", attn_implementation="eager")
    with counter:
        model(tokens(1, LENGTH), use_cache=False).logits.sum().backward()
    flops = flops_per_token(model.config, LENGTH)
    squares = flops.attention * (2 * LENGTH / (LENGTH + 1))
    assert counter.get_total_flops() == pytest.approx(TRAINING_PER_FORWARD * LENGTH * (flops.linear + squares))


@pytest.mark.parametrize(("context", "mean_keys"), [(1, 1), (3, 2), (4, 2.5), (10, (1 + 2 + 3 + 4 * 7) / 10)])
def test_a_sliding_window_bounds_the_keys(context, mean_keys):
    config = tiny_config("sliding", layer_types=["sliding_attention"] * 3)  # windows of 4
    assert flops_per_token(config, context).attention == pytest.approx(3 * 4 * 32 * mean_keys)


def test_an_ssd_layers_flops_do_not_grow_with_the_context():
    config = TransXSSMConfig.from_preset("320m", layer_types=["linear_attention"] * 24)
    assert flops_per_token(config, 4096) == flops_per_token(config, 131072)


def test_a_context_without_tokens_is_refused():
    with pytest.raises(ValueError, match="at least 1 token: got 0"):
        flops_per_token(tiny_config(), 0)
