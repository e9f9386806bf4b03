"""Tiny models of every kind that the laws must hold for, and what the tests of the models share.

Weights are drawn ten times wider than a real initialisation, so that every layer moves the logits and no law holds for want of
signal; chunks are four tokens, so that short rows cross them.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from transxssm import TransXSSMConfig, TransXSSMForCausalLM
from transxssm.models.selective_rotation import TransXSSMSelectiveRotation
from transxssm.models.ssd_mixer import name_in_checkpoints

VOCAB_SIZE = 97
FILLER = 5  # what pads are filled with: an ordinary token, since a pad token's embedding is zero and would hide a leak

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "ssd_chunk_size": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
MAMBA2 = {"ssd_position_embedding": "none", "ssd_conv_kernel_size": 4, "ssd_skip": True}

# One entry per option or two, then combinations: every law is held on each.
VARIANTS = {
    "hybrid": {},
    "all_ssd": {"layer_types": ["linear_attention"] * 3},
    "all_attention": {"layer_types": ["full_attention"] * 3},
    "sliding": {"layer_types": ["linear_attention", "sliding_attention", "full_attention"], "sliding_window": 4},
    "grouped_queries": {"num_key_value_heads": 2, "ssd_num_groups": 1},
    "no_rope": {"ssd_position_embedding": "none"},
    "convolution": {"ssd_conv_kernel_size": 4},
    "skip": {"ssd_skip": True},
    "length_scaling": {"length_scaling_base": 3},
    "normed": {"ssd_norm_BC": True, "ssd_bias_BC": True, "qk_norm": True},
    "gated": {"ssd_output_gate": True, "attention_output_gate": True},
    "partly_rotated": {"ssd_partial_rotary_factor": 0.5, "attention_position_embedding": "none"},
    "mamba2": MAMBA2,
    "all_ssd_mamba2": {"layer_types": ["linear_attention"] * 3, **MAMBA2},
    "selective": {
        "layer_types": ["linear_attention", "sliding_attention", "full_attention"],
        "sliding_window": 4,
        "num_key_value_heads": 2,
        "ssd_partial_rotary_factor": 0.5,
        "rope_parameters": {"rope_type": "selective", "rank": 3, "kernel_size": 3, "gate": True},
    },
    "everything": {
        "layer_types": ["sliding_attention", "linear_attention", "full_attention"],
        "sliding_window": 4,
        "num_key_value_heads": 1,
        "ssd_conv_kernel_size": 3,
        "ssd_skip": True,
        "length_scaling_base": 3,
        "ssd_partial_rotary_factor": 0.25,
        "ssd_norm_BC": True,
        "ssd_bias_BC": True,
        "ssd_output_gate": True,
        "ssd_scan_in_fp32": True,
        "qk_norm": True,
        "attention_output_gate": True,
    },
}
ALL_VARIANTS = list(VARIANTS)
SLIDING = [name for name, options in VARIANTS.items() if "sliding_window" in options]
WITH_ATTENTION = [name for name in VARIANTS if not name.startswith("all_ssd")]


def combinations(*options: Iterable[Any]) -> list[tuple[Any, ...]]:
    """(variant, option, …) for `parametrize`: the default and `everything` with every combination of the options, which is where two
    options could get in each other's way, and every other variant with one of them, in turn."""
    products = list(itertools.product(*options))
    thorough = ["hybrid", "everything"]
    others = [name for name in ALL_VARIANTS if name not in thorough]
    return [(name, *chosen) for name in thorough for chosen in products] + [
        (name, *chosen) for name, chosen in zip(others, itertools.cycle(products), strict=False)
    ]


def one_of_each(variant: str) -> dict[str, Any]:
    """Overrides that leave a variant one layer of each of its kinds: compiling takes time by the layer."""
    kinds = list(dict.fromkeys({**SIZES, **VARIANTS[variant]}["layer_types"]))
    return {"layer_types": kinds, "num_hidden_layers": len(kinds)}


def transformers_is_wrong(variant: str, affected: list[str]) -> bool:
    """Whether transformers itself gets an `affected` variant wrong, as 5.17 does; 5.23 was found right."""
    return variant in affected and Version(transformers.__version__) < Version("5.23")


def tiny_config(variant: str = "hybrid", **overrides) -> TransXSSMConfig:
    """The configuration of a variant, with fields replaced by `overrides`."""
    return TransXSSMConfig(**{**SIZES, **VARIANTS[variant], **overrides})


def tiny_model(variant: str = "hybrid", dtype: torch.dtype = torch.float64, **overrides) -> TransXSSMForCausalLM:
    """A model of a variant in evaluation mode; the same weights at every call. In float64 the laws hold to 1e-10."""
    torch.manual_seed(1)
    model = TransXSSMForCausalLM(tiny_config(variant, **overrides))
    for module in model.modules():
        if isinstance(module, TransXSSMSelectiveRotation):  # which begins as a fixed one
            for weight in module.parameters():
                nn.init.normal_(weight)
    return model.to(dtype).eval()


def saved_weights(model: TransXSSMForCausalLM) -> dict[str, Tensor]:
    """The state of a model by the names that its weights have in a checkpoint."""
    return {name_in_checkpoints(name): weight for name, weight in model.state_dict().items()}


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """(b, t) random token ids, none of them the pad token."""
    return torch.randint(1, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: TransXSSMForCausalLM, input_ids: Tensor, **arguments) -> Tensor:
    """(b, t, v) logits of one forward call."""
    return model(input_ids, **arguments).logits


def pad_rows(rows: list[Tensor], left: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Rows of (t_i,) ids with `left[i]` pads before and the rest of `width` after; (b, width) ids and attention mask."""
    ids = torch.full((len(rows), width), FILLER)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (row, start) in enumerate(zip(rows, left, strict=True)):
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return ids, mask


def gradients_of(model: TransXSSMForCausalLM) -> dict[str, Tensor]:
    """The gradient of every parameter, taken off the model."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    assert all(gradient is not None for gradient in gradients.values())
    return gradients
