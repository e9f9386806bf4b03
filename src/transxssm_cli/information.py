"""`transxssm info`."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from transformers import PreTrainedConfig

from transxssm.inspection import (
    TRAINING_PER_FORWARD,
    AttentionLayer,
    ScanLayer,
    all_attention_bytes,
    cache_bytes,
    count_parameters,
    flops_per_token,
    layers_of,
)
from transxssm.models import TransXSSMConfig, read_causal_lm_config
from transxssm.models.checkpoint import read_dtype

CONTEXTS = tuple(1024 * 2**power for power in range(2, 8))  # 4K … 128K
LAYER_LABELS = {"linear_attention": "SSD", "full_attention": "attention", "sliding_attention": "sliding attention"}
OPTIONS = (
    "ssd_position_embedding",
    "ssd_partial_rotary_factor",
    "ssd_conv_kernel_size",
    "ssd_skip",
    "ssd_norm_BC",
    "ssd_bias_BC",
    "ssd_output_gate",
    "ssd_scan_in_fp32",
    "attention_position_embedding",
    "qk_norm",
    "attention_output_gate",
    "sliding_window",
    "length_scaling_base",
    "rope_type",
)


def describe(model: str, folder: Path | None, *, context: int, dtype: str) -> dict[str, Any]:
    """Describes a model with plain values: FLOPs for one token, bytes for one sequence.

    Args:
        model: name of the model, which is a preset's if there is no folder.
        folder: checkpoint of this package's model or of a baseline (Llama, Mamba-2, Bamba), or None for a preset.
        context: tokens in the sequence for which FLOPs are counted.
        dtype: dtype of keys and values.

    Raises:
        ValueError: there is no checkpoint, or it is of another kind of model; the dtype is unknown; or the context is below one token.
    """
    kv_dtype = read_dtype(dtype)
    config = TransXSSMConfig.from_preset(model) if folder is None else read_causal_lm_config(folder)
    flops = flops_per_token(config, context)
    parameters = count_parameters(config)
    return {
        "model": model,
        "layers": dict(Counter(map(_kind_of, layers_of(config)))),
        "sizes": _sizes(config),
        "options": {name: getattr(config, name) for name in OPTIONS} if isinstance(config, TransXSSMConfig) else {},
        "tied_head": config.tie_word_embeddings,
        "parameters": {**parameters, "total": sum(parameters.values())},
        "flops_per_token": {
            "context": context,
            **flops._asdict(),
            "forward": flops.total,
            "training": TRAINING_PER_FORWARD * flops.total,
        },
        "cache_dtype": dtype,
        "cache_bytes_per_sequence": [
            {
                "context": length,
                "kv": (own := cache_bytes(config, length, kv_dtype)).kv,
                "state": own.state,
                "total": own.total,
                "all_attention": all_attention_bytes(config, length, kv_dtype),
            }
            for length in CONTEXTS
        ],
    }


def tables(description: dict[str, Any]) -> Iterator[str | Table]:
    """Formats the result of `describe` for the terminal: headings and tables in turn."""
    layers = ", ".join(f"{count} {LAYER_LABELS[kind]}" for kind, count in description["layers"].items())
    counts = dict(description["parameters"])
    total = counts.pop("total")
    yield f"[bold]{description['model']}[/]: {total / 1e6:,.1f}M parameters in {layers} layers"
    papers = TransXSSMConfig()
    chosen = (f"{name}={value}" for name, value in description["options"].items() if value != getattr(papers, name))
    if text := ", ".join(chosen):
        yield f"options: {text}"
    table = _table("", "parameters", "share")
    for kind, count in counts.items():
        tied = kind == "head" and description["tied_head"]
        table.add_row(
            _label(kind), *(("tied to the embeddings", "") if tied else (f"{count:,}", f"{count / total:.1%}"))
        )
    yield table

    flops = dict(description["flops_per_token"])
    context, forward, training = flops.pop("context"), flops.pop("forward"), flops.pop("training")
    yield f"\nMFLOPs per token in a sequence of {context:,}; training, with the backward pass: {training / 1e6:,.1f}"
    table = _table("", "forward", "share")
    for kind, count in flops.items():
        table.add_row(_label(kind), f"{count / 1e6:,.1f}", f"{count / forward:.1%}")
    table.add_row("total", f"{forward / 1e6:,.1f}", "")
    yield table

    yield f"\nCache of one sequence in MB: keys and values in {description['cache_dtype']}, states in float32"
    table = _table("tokens", "keys, values", "states", "total", "all-attention", "ratio")
    for row in description["cache_bytes_per_sequence"]:
        megabytes = (
            "–" if row[name] is None else f"{row[name] / 1e6:,.1f}"
            for name in ("kv", "state", "total", "all_attention")
        )
        ratio = f"{row['all_attention'] / row['total']:.1f}×" if row["all_attention"] and row["total"] else "–"
        table.add_row(f"{row['context'] // 1024}K", *megabytes, ratio)
    yield table


def _kind_of(layer: AttentionLayer | ScanLayer) -> str:
    if isinstance(layer, ScanLayer):
        return "linear_attention"
    return "full_attention" if layer.window is None else "sliding_attention"


def _sizes(config: PreTrainedConfig) -> dict[str, int | None]:
    """Sizes under the names of `TransXSSMConfig`. None for sizes that a model does not have."""
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    sizes["intermediate_size"] = getattr(config, "intermediate_size", None)
    attention = next((layer for layer in layers_of(config) if isinstance(layer, AttentionLayer)), None)
    scan = next((layer for layer in layers_of(config) if isinstance(layer, ScanLayer)), None)
    sizes["num_attention_heads"] = attention and attention.num_heads
    sizes["num_key_value_heads"] = attention and attention.num_key_value_heads
    sizes["head_dim"] = attention and attention.head_dim
    sizes["ssd_num_heads"] = scan and scan.num_heads
    sizes["ssd_head_dim"] = scan and scan.head_dim
    sizes["ssd_state_size"] = scan and scan.state_size
    sizes["ssd_num_groups"] = scan and scan.num_groups
    return sizes


def _label(kind: str) -> str:
    return {"ssd": "SSD", "ffn": "FFN", "linear": "linear layers"}.get(kind, kind)


def _table(first: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table
