"""TransXSSM: 7 SSD layers to 1 attention layer, each with an FFN, and one rotary position embedding for all (paper, Section 3).

Letters: b batch, t time, n state size, d head_dim of attention.
"""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer, StaticCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from transxssm.models.attention import TransXSSMAttention
from transxssm.models.cache_transxssm import (
    StaticStatesCache,
    TransXSSMCache,
    angle_states_of,
    count_tokens,
    has_keys,
    num_cached_tokens,
    ssd_state_of,
)
from transxssm.models.configuration_transxssm import SSD_LAYER_TYPE, TransXSSMConfig
from transxssm.models.context_parallel import (
    ContextPart,
    SequencePart,
    context_part,
    mask_of_part,
    part_of_group,
    refusal_of_parts,
)
from transxssm.models.linear import apply_linear, at_least_float32, is_plain_linear, is_untouched, plain_weights
from transxssm.models.masks import (
    attention_masks,
    documents_of,
    first_keys_by_kind,
    next_token_masks,
    padding_of,
    refusal_of_documents,
    refusal_of_pads_between,
)
from transxssm.models.norm import TransXSSMRMSNorm
from transxssm.models.positions import (
    FirstKeys,
    Positions,
    Rotary,
    default_positions,
    document_bounds,
    documents_from_positions,
    has_pads_between,
    last_document_start,
    length_scale,
    local_padding,
)
from transxssm.models.selective_rotation import TransXSSMSelectiveRotation
from transxssm.models.ssd_mixer import TransXSSMDynamics, TransXSSMSSDMixer
from transxssm.models.tensor_parallel import register_styles
from transxssm.ops import (
    keep_pairs,
    layer_end,
    layer_start,
    linear_cross_entropy,
    rotary_cos_sin,
    subsample_rotary,
    swiglu,
)
from transxssm.ops.devices import has_float64
from transxssm.ops.token_layer import MOST_TOKENS

register_styles()

SILU = type(ACT2FN["silu"])
MODEL_CARD = "README.md"
_CARD = """\
---
library_name: transformers
tags: [transxssm]
---
# A TransXSSM model

A hybrid of state-space and attention layers under one rotary position embedding ([arXiv 2506.09507](https://arxiv.org/abs/2506.09507)).
transformers loads it once the package `transxssm` is installed and imported. Without the import it says that it does not recognize
the model type `transxssm`, and no upgrade of transformers changes that.

```python
import transxssm  # registers the model with transformers
from transformers import {auto_class}

model = {auto_class}.from_pretrained("path/to/this/folder")
```
"""


class TransXSSMRotaryEmbedding(nn.Module):
    """Unified RoPE (Eq. 2): cos and sin of one frequency table, read by SSD layers and, subsampled, by attention.

    It holds no buffer, which would be cast to bfloat16 with the model and left uninitialised when loading from the meta device.
    """

    def __init__(self, config: TransXSSMConfig) -> None:
        super().__init__()
        self.frequencies, self.attention_factor = config.rotary_frequencies() if config.rotary_width else ([], 1.0)
        self.attention_dim = config.head_dim if config.rotates_attention else None
        self.ssd_dim = config.ssd_state_size if config.rotates_ssd else None
        self.num_rotated_pairs = config.ssd_num_rotated_pairs

    def forward(self, x: Tensor, position_ids: Tensor) -> Rotary:
        """(cos, sin) of attention in transformers' format, for code that works with any of its models.

        Both are (b or 1, t, head_dim) in x's dtype, with equal halves.

        Raises:
            ValueError: attention does not rotate, or there is no attention layer.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        _, attention = self.tables(position_ids, dtype)
        if attention is None:
            raise ValueError(
                "rotary_emb gives attention's cos and sin, and no attention layer rotates in this model: "
                "rotary_emb.tables(position_ids, dtype) gives those of SSD layers"
            )
        cos, sin = (torch.cat((table, table), dim=-1).to(x.dtype) for table in attention)
        return cos, sin

    def pair_frequencies(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The frequencies of the pairs that rotate, in radians, of SSD layers and of attention. None as in `tables`."""
        if not self.frequencies:
            return None, None
        frequencies = torch.tensor(self.frequencies, dtype=dtype, device=device)
        width = 2 * len(self.frequencies)
        ssd = attention = None
        if self.ssd_dim is not None:
            ssd = frequencies[:: width // self.ssd_dim][: self.num_rotated_pairs]
        if self.attention_dim is not None:
            attention = frequencies[:: width // self.attention_dim]
        return ssd, attention

    def tables(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Rotary | None, Rotary | None]:
        """(cos, sin) for SSD layers and for attention, in `dtype`. None for a kind of layer that the model lacks or does not rotate."""
        if not self.frequencies:
            return None, None
        device = position_ids.device if has_float64(position_ids.device) else torch.device("cpu")
        frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device=device)
        table = rotary_cos_sin(position_ids, frequencies, dtype)
        ssd = attention = None
        if self.ssd_dim is not None:
            ssd = keep_pairs(subsample_rotary(table, self.ssd_dim), self.num_rotated_pairs)
        if self.attention_dim is not None:
            cos, sin = subsample_rotary(table, self.attention_dim)
            attention = (cos * self.attention_factor, sin * self.attention_factor)
        return ssd, attention


class TransXSSMMLP(nn.Module):
    """SwiGLU: down(act(gate u) ∘ up u)."""

    def __init__(self, config: TransXSSMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = apply_linear(self.gate_proj, hidden_states), apply_linear(self.up_proj, hidden_states)
        gated = swiglu(gate, up) if type(self.act_fn) is SILU else self.act_fn(gate) * up
        del gate, up  # the two largest tensors of a forward pass without gradients
        return apply_linear(self.down_proj, gated)


class CheckpointsGradients:
    """Ignores transformers' `gradient_checkpointing` where no gradients are formed, so that a model can generate while it is trained.

    transformers removes the cache from layers that it recomputes. Without gradients nothing is recomputed, and the cache can stay.
    """

    _gradient_checkpointing = False

    @property
    def gradient_checkpointing(self) -> bool:
        return self._gradient_checkpointing and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self._gradient_checkpointing = enable


class TransXSSMDecoderLayer(CheckpointsGradients, GradientCheckpointingLayer):
    """A mixer (SSD or attention), then an FFN; a pre-RMSNorm and a residual around each (Section 3, principles 3 and 4)."""

    def __init__(self, config: TransXSSMConfig, layer_idx: int) -> None:
        super().__init__()
        self.is_ssd = config.layer_types[layer_idx] == SSD_LAYER_TYPE
        if self.is_ssd:
            self.ssd = TransXSSMSSDMixer(config)
        else:
            self.self_attn = TransXSSMAttention(config, layer_idx)
        self.mlp = TransXSSMMLP(config)
        self.input_layernorm = TransXSSMRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = TransXSSMRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        positions: Positions,
        attention_mask: Tensor | FirstKeys | None = None,
        past_key_values: Cache | LinearAttentionLayer | None = None,
        angle_state: LinearAttentionLayer | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Computes the layer.

        Args:
            past_key_values: the cache for an attention layer, or an SSD layer's own part of it (`ssd_state_of`).
            angle_state: the state of the layer's selective rotation in the cache (`angle_states_of`).
        """
        weights = self._weights_of_a_token(hidden_states, positions)
        if weights is not None:
            start, end = weights
            projected = layer_start(hidden_states, *start)
            if self.is_ssd:
                mixed = self.ssd.mix(projected, positions, past_key_values)
            else:
                mixed, _ = self.self_attn.mix(projected, positions, attention_mask, past_key_values, **kwargs)
            return layer_end(mixed, hidden_states, *end)
        normed = self.input_layernorm(hidden_states)
        if self.is_ssd:
            mixed = self.ssd(normed, positions, past_key_values, angle_state)
        else:
            mixed, _ = self.self_attn(normed, positions, attention_mask, past_key_values, angle_state, **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def _weights_of_a_token(self, hidden_states: Tensor, positions: Positions) -> tuple[Any, Any] | None:
        """The weights for `layer_start` and `layer_end`, if few tokens are decoded and no module of the layer has hooks or the like.

        Otherwise None.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or positions.padding_mask is not None:
            return None
        if hidden_states.device.type != "cpu" or hidden_states.shape[0] * hidden_states.shape[1] > MOST_TOKENS:
            return None
        mixer, mlp, before, after = (
            self.ssd if self.is_ssd else self.self_attn,
            self.mlp,
            self.input_layernorm,
            self.post_attention_layernorm,
        )
        is_plain = (
            type(mixer) in (TransXSSMSSDMixer, TransXSSMAttention)
            and mixer.rotation is None  # a rotation reads the norm's output, too
            and type(mlp) is TransXSSMMLP
            and type(mlp.act_fn) is SILU
            and type(before) is type(after) is TransXSSMRMSNorm
            and all(map(is_untouched, (mixer, mlp, before, after)))
        )
        if not is_plain:
            return None
        inputs = plain_weights(mixer.input_layers)
        others = plain_weights((mixer.output_layer, mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        if inputs is None or others is None:
            return None
        output, *ffn = others
        return (before.weight, before.eps, inputs), (output, after.weight, after.eps, *ffn)


_IN_FLOAT32 = (TransXSSMDynamics, TransXSSMSelectiveRotation)  # in a model of any dtype


class TransXSSMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: TransXSSMConfig
    config_class = TransXSSMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 (transformers' own form)
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = False  # transformers' backends know only masks of attention, no states
    _can_compile_fullgraph = True
    _is_stateful = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": TransXSSMDecoderLayer,
        "attentions": TransXSSMAttention,
    }

    def __init__(self, config: TransXSSMConfig, *args: Any, **kwargs: Any) -> None:
        config.check()
        super().__init__(config, *args, **kwargs)
        self._keep_in_fp32_modules_strict = []  # only existing modules may be named
        if SSD_LAYER_TYPE in config.layer_types:
            self._keep_in_fp32_modules_strict.append("dynamics")
        if config.is_selective:
            self._keep_in_fp32_modules_strict.append("rotation")

    @property
    def _no_split_modules(self) -> set[str]:
        """The modules that stay on one device. accelerate makes an FSDP unit of each, whose parameters must have one dtype.

        So float32 parameters in a model of another dtype are units of their own. If all dtypes are the same they are not, since
        accelerate's mixed precision rounds the results of a unit.
        """
        names = self.__dict__.setdefault("_names_of_undivided_modules", {TransXSSMDecoderLayer.__name__})
        dtypes = {weight.dtype for weight in self.parameters() if weight.is_floating_point()}
        in_float32 = {type(module).__name__ for module in self.modules() if isinstance(module, _IN_FLOAT32)}
        return names | in_float32 if len(dtypes) > 1 else names

    @_no_split_modules.setter
    def _no_split_modules(self, names: Iterable[str]) -> None:
        self.__dict__["_names_of_undivided_modules"] = set(names) - {module.__name__ for module in _IN_FLOAT32}

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Saves as transformers does. A folder without a model card gets one that says what to import before loading."""
        super().save_pretrained(save_directory, is_main_process, **kwargs)
        card = Path(save_directory) / MODEL_CARD
        if is_main_process and not card.exists():
            auto_class = "AutoModel" + type(self).__name__.removeprefix("TransXSSM").removeprefix("Model")
            card.write_text(_CARD.format(auto_class=auto_class), encoding="utf-8")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        config = self.config
        if isinstance(module, TransXSSMDynamics):
            rates = torch.empty_like(module.A_log).uniform_(config.ssd_A_min, config.ssd_A_max)
            init.copy_(module.A_log, rates.log())
            log_range = math.log(config.ssd_dt_min), math.log(config.ssd_dt_max)
            dt = torch.empty_like(module.dt_bias).uniform_(*log_range).exp().clamp(min=config.ssd_dt_floor)
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # softplus⁻¹
            if module.D is not None:
                init.ones_(module.D)
        elif isinstance(module, TransXSSMSSDMixer):
            for ones in (module.B_bias, module.C_bias):
                if ones is not None:
                    init.ones_(ones)
            if module.conv_weight is not None:
                bound = config.ssd_conv_kernel_size**-0.5  # as torch initialises a depthwise convolution
                init.uniform_(module.conv_weight, -bound, bound)
        elif isinstance(module, TransXSSMSelectiveRotation):  # φ = 1
            init.normal_(module.down_weight, std=len(module.down_weight) ** -0.5)  # so that norms are kept, which are 1
            init.zeros_(module.up_weight)
            taps = torch.zeros_like(module.conv_weight)
            taps[:, -1] = 1.0  # the token itself
            init.copy_(module.conv_weight, taps)
            if module.gate_weight is not None:
                init.zeros_(module.gate_weight)


class TransXSSMModel(CheckpointsGradients, TransXSSMPreTrainedModel):
    """The decoder without its head: embeddings, layers, final norm."""

    def __init__(self, config: TransXSSMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(TransXSSMDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = TransXSSMRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = TransXSSMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.sequence_part: SequencePart | None = None
        self.post_init()

    def enable_context_parallel(self, group: dist.ProcessGroup | None) -> None:
        """Makes processes share the tokens of each row: all call the model with the same whole rows, and each computes its part.

        `forward` returns results for that part only: process i of r has the tokens i t/r … (i + 1) t/r − 1. The loss is that of whole rows
        on every process. Call backward on all processes and average gradients over the group, as DDP and FSDP do. The averages equal the
        gradients of a single process.

        Args:
            group: the processes that share rows. None ends the sharing.
        """
        self.sequence_part = None if group is None or dist.get_world_size(group) == 1 else part_of_group(group)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Computes the hidden states of every token.

        Args:
            input_ids: (b, t), or inputs_embeds: (b, t, hidden); exactly one of them.
            attention_mask: (b, cached + t), 0 at pads; or masks by layer type, as `generate` prepares them.
            position_ids: (b or 1, t). Defaults to counting the tokens that are not pads.
            past_key_values: a `TransXSSMCache`, or transformers' dynamic or static cache made from this config.
            use_cache: whether to make a cache if none is given.
            seq_idx: (b, t) non-decreasing, the documents of packed rows, which do not see each other. Defaults to what restarts in
                position_ids say. With a cache, the first token continues the cached document.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds are given; the mask has another shape; rows are packed with a cache
                or an attention implementation that would let documents leak; or there is a cache while gradient checkpointing recomputes
                layers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("specify exactly one of input_ids and inputs_embeds")
        if self.gradient_checkpointing and self.training and past_key_values is not None:
            raise ValueError(
                f"gradient checkpointing runs each layer twice, which writes a cache twice: got a {type(past_key_values).__name__}; "
                "pass no past_key_values, call the model under torch.no_grad(), or call gradient_checkpointing_disable()"
            )
        part = self.sequence_part
        if use_cache and past_key_values is None and part is None:
            past_key_values = TransXSSMCache(config=self.config)
        tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
        if 0 in tokens.shape[:2]:
            raise ValueError(f"expected one row and one token or more: got (b, t) = {tuple(tokens.shape[:2])}")
        batch, length = tokens.shape[:2]
        past_length = num_cached_tokens(past_key_values)
        padding = padding_of(self.config, attention_mask, past_length, length)
        if seq_idx is None and position_ids is not None and not isinstance(attention_mask, dict):
            seq_idx = documents_of(self.config, position_ids, padding, past_key_values)
        if seq_idx is not None:
            if seq_idx.shape[-1] != length:
                raise ValueError(
                    f"seq_idx must number each of the {length} tokens' documents: got shape {tuple(seq_idx.shape)}"
                )
            seq_idx = seq_idx.expand(batch, -1)
        if position_ids is None:
            start = past_key_values.document_start if isinstance(past_key_values, TransXSSMCache) else None
            position_ids = default_positions(tokens, past_length, padding, seq_idx, start)

        context: ContextPart | None = None
        masks: Mapping[str, Tensor | FirstKeys | None] = {}
        if part is not None:
            self._check_parts(part, length, attention_mask, past_key_values)
            context = context_part(part, seq_idx, tokens.device)
            windows = {"full_attention": None, "sliding_attention": self.config.sliding_window}
            masks = {
                kind: mask_of_part(context, length, seq_idx, window, tokens.device)
                for kind, window in windows.items()
                if kind in self.config.layer_types
            }
            position_ids, tokens = part.of(position_ids), part.of(tokens)
            seq_idx = None if seq_idx is None else part.of(seq_idx)
        inputs_embeds = self.embed_tokens(tokens) if inputs_embeds is None else tokens

        # A static cache returns its whole capacity (and keeps its length in a tensor), and packed rows need more from a cache than keys.
        is_whole = past_key_values is None or (
            isinstance(past_key_values, DynamicCache) and seq_idx is None and past_length == 0
        )
        if isinstance(attention_mask, dict):
            masks = attention_mask
        elif context is None:
            first_keys = None
            if is_whole and (attention_mask is None or padding is not None):
                first_keys = first_keys_by_kind(self.config, self.training, kwargs, inputs_embeds, seq_idx, padding)
            masks = (
                attention_masks(self.config, inputs_embeds, attention_mask, past_key_values, past_length, seq_idx)
                if first_keys is None
                else first_keys
            )
        dtype = torch.float64 if inputs_embeds.dtype == torch.float64 else torch.float32
        ssd_rotary, attention_rotary = self.rotary_emb.tables(position_ids, dtype)
        padding_mask = None
        if isinstance(attention_mask, dict):
            padding_mask = attention_mask.get(SSD_LAYER_TYPE)
        elif context is None:
            padding_mask = local_padding(padding, length)
        positions = Positions(
            ssd_rotary=ssd_rotary,
            attention_rotary=attention_rotary,
            length_scale=length_scale(position_ids, self.config.length_scaling_base, dtype),
            padding_mask=padding_mask,
            seq_idx=seq_idx,
            context=context,
        )
        angle_states = None
        if self.config.is_selective:
            ssd_frequencies, attention_frequencies = self.rotary_emb.pair_frequencies(inputs_embeds.device, dtype)
            positions = positions._replace(
                ssd_frequencies=ssd_frequencies,
                attention_frequencies=attention_frequencies,
                bounds=None if seq_idx is None else document_bounds(seq_idx, padding_mask),
            )
            angle_states = angle_states_of(past_key_values, len(self.layers))
        hidden_states = inputs_embeds
        for index, (layer, layer_type) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
            is_ssd = layer_type == SSD_LAYER_TYPE
            hidden_states = layer(
                hidden_states,
                positions=positions,
                attention_mask=None if is_ssd else masks[layer_type],
                past_key_values=ssd_state_of(past_key_values, index) if is_ssd else past_key_values,
                **({} if angle_states is None else {"angle_state": angle_states[index]}),
                **kwargs,
            )
        if isinstance(past_key_values, TransXSSMCache) and seq_idx is not None:
            past_key_values.document_start = last_document_start(seq_idx, past_length, past_key_values.document_start)
        if past_key_values is not None:
            count_tokens(past_key_values, past_length, length)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _check_parts(self, part: SequencePart, length: int, attention_mask: Any, cache: Cache | None) -> None:
        is_plain = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2)
        has_pads = not is_plain or local_padding(attention_mask, length) is not None
        implementation = self.config._attn_implementation if self.config.has_attention else None
        kernel_sizes = (self.config.ssd_conv_kernel_size, (self.config.rope_parameters or {}).get("kernel_size", 0))
        smallest = max(1, *(size - 1 for size in kernel_sizes))
        refusal = refusal_of_parts(part, length, smallest, has_pads, cache is not None, implementation)
        if refusal is not None:
            raise ValueError(refusal)


class TransXSSMForCausalLM(TransXSSMPreTrainedModel, GenerationMixin):
    """The language model: the decoder and a linear head, tied to the embeddings by default."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own form)
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    accepts_loss_kwargs = True  # the loss is a sum over num_items_in_batch, however many batches a step accumulates

    def __init__(self, config: TransXSSMConfig) -> None:
        super().__init__(config)
        self.model = TransXSSMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def enable_context_parallel(self, group: dist.ProcessGroup | None) -> None:
        """See `TransXSSMModel.enable_context_parallel`."""
        self.model.enable_context_parallel(group)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Computes the logits of the next token, and the loss if labels are given. See `TransXSSMModel.forward` for other arguments.

        Args:
            labels: (b, t) token ids, −100 where a token doesn't count; label t is predicted from token t − 1.
            logits_to_keep: number of last positions for which logits are computed, or their indices. 0 computes all of them.
            skip_logits: if there are labels, return only the loss, without ever forming the (tokens × vocabulary) logits.
            num_items_in_batch: divides the summed loss. Defaults to the number of labels that count, which gives their mean.
            shift_labels: (b, t) labels that are already shifted, in place of labels. It is not an explicit parameter, since Trainer
                expects every argument with "label" in its name in each batch.
        """
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = all_logits = logits = None
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        if shift_labels is not None:
            if not is_plain_linear(
                self.lm_head
            ):  # adapted, quantised, sharded or hooked: the head computes with more than its weight
                all_logits = apply_linear(self.lm_head, hidden_states)
            loss = self._loss(hidden_states, all_logits, shift_labels, num_items_in_batch, self.model.sequence_part)
        if loss is None or not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = apply_linear(self.lm_head, hidden_states[:, kept]) if all_logits is None else all_logits[:, kept]
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(
        self,
        hidden_states: Tensor,
        logits: Tensor | None,
        shift_labels: Tensor,
        num_items: Tensor | int | None,
        part: SequencePart | None,
    ) -> Tensor:
        """The loss of whole rows. If `logits` is None, it is computed without forming them."""
        if part is not None:
            num_items = (shift_labels != -100).sum() if num_items is None else num_items
            shift_labels = part.of(shift_labels)
        hidden_states, shift_labels = hidden_states.flatten(0, 1), shift_labels.flatten().to(hidden_states.device)
        reduction: Literal["mean", "sum"] = "mean" if num_items is None else "sum"
        if logits is None:
            loss = linear_cross_entropy(hidden_states, self.lm_head.weight, shift_labels, reduction=reduction)
        else:
            loss = F.cross_entropy(at_least_float32(logits.flatten(0, 1)), shift_labels, reduction=reduction)
        if part is not None:
            loss = part.sum(loss)
        if num_items is None:
            return loss
        return loss / (num_items.to(loss.device) if isinstance(num_items, Tensor) else num_items)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, for models with attention layers only.

        Raises:
            ValueError: there are SSD layers, whose states cannot be kept in pages like keys and values.
        """
        if "linear_attention" in self.config.layer_types:
            raise ValueError(
                "continuous batching (generate_batch, cache_implementation='paged') keeps keys and values in pages, and the states of "
                "SSD layers have none: call generate with the prompts as a left-padded batch and without cache_implementation"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Reads the part of the prompt that is not in the cache, which must have at least one token.

        transformers takes the last tokens by a negative slice, which for no tokens would be the whole prompt.

        Raises:
            ValueError: the cache holds the whole prompt or more, or a prompt of embeddings is to be read in chunks.
        """
        embeds, cache = model_kwargs.get("inputs_embeds"), model_kwargs.get("past_key_values")
        if embeds is not None and generation_config.prefill_chunk_size is not None:
            raise ValueError(
                f"prefill_chunk_size cuts a prompt of tokens: got prefill_chunk_size={generation_config.prefill_chunk_size} and "
                "inputs_embeds; pass input_ids, or no prefill_chunk_size"
            )
        mask = model_kwargs.get("attention_mask")
        num_masked = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        length = input_ids.shape[1] if embeds is None else embeds.shape[1]
        if cache is not None and (embeds is not None or num_masked == length):  # else all of the prompt is new
            num_cached = int(cache.get_seq_length())
            if num_cached >= length:
                raise ValueError(
                    f"nothing of the prompt is left to read: got past_key_values of {num_cached} tokens and a prompt of {length}; "
                    "pass the cached text with one token or more behind it, or no past_key_values"
                )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(  # generate looks for inputs_embeds in the signature
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Adds `generate(seq_idx=…)`, the documents of the prompt. Generated tokens continue the last one."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        seq_idx, cache = inputs.get("seq_idx"), inputs.get("past_key_values")
        is_masked_by_kind = isinstance(inputs.get("attention_mask"), dict)  # as with static caches
        refusal = refusal_of_documents(self.config, cache)
        if seq_idx is not None and is_masked_by_kind and refusal is not None:
            raise ValueError(refusal)
        if seq_idx is not None:
            tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            start = 0 if cache is None else cache.get_seq_length()
            wanted = torch.arange(start, start + tokens.shape[1], device=seq_idx.device).clamp(max=seq_idx.shape[1] - 1)
            inputs["seq_idx"] = seq_idx[:, wanted]
        return inputs

    @staticmethod
    def create_masks_for_generate(
        config: TransXSSMConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Masks by layer type for a static cache, made outside the compiled step. transformers derives no documents from positions here.

        Raises:
            ValueError: the positions are those of a packed row, or there are pads between tokens in a sliding window.
        """
        refusal = refusal_of_documents(config, past_key_values)
        documents = None if position_ids is None else documents_from_positions(position_ids, attention_mask)
        if documents is not None and refusal is not None:
            raise ValueError(refusal)
        refusal = refusal_of_pads_between(config, past_key_values)
        if refusal is not None and attention_mask is not None and has_pads_between(attention_mask).any():
            raise ValueError(refusal)
        masks = next_token_masks(config, inputs_embeds, attention_mask, past_key_values)
        if masks is None:
            masks = create_masks_for_generate(
                config, inputs_embeds, attention_mask, past_key_values, position_ids=position_ids, **kwargs
            )
        if attention_mask is not None and (
            SSD_LAYER_TYPE in masks or config.is_selective
        ):  # transformers drops the mask of a single token, which may be a pad
            masks[SSD_LAYER_TYPE] = local_padding(attention_mask, inputs_embeds.shape[1])
        return masks

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Gives `generate` the cache that counts its tokens, unless another kind was requested.

        Raises:
            ValueError: the model has SSD layers, and is to assist another model.
        """
        has_states = SSD_LAYER_TYPE in self.config.layer_types
        if generation_config.is_assistant and (has_states or self.config.is_selective):
            raise ValueError(
                "an assistant takes back the tokens that are not accepted, and a state that has summed a token cannot be put back: got a "
                f"{type(self).__name__} with {'SSD layers' if has_states else 'selective rotations'} as assistant_model; "
                "expected a model of attention layers alone, with fixed rotations"
            )
        kind, given = generation_config.cache_implementation, model_kwargs.get("past_key_values")
        if generation_config.use_cache is not False and given is None and kind in (None, "dynamic"):
            model_kwargs["past_key_values"] = TransXSSMCache(config=self.config)
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is None or has_keys(cache) or isinstance(cache, TransXSSMCache | StaticStatesCache):
            return
        # `generate` asks for the number of cached tokens. transformers' caches of states alone lack it, and are replaced.
        is_static = isinstance(cache, StaticCache)
        counting = StaticStatesCache(self.config, max_cache_len=0) if is_static else TransXSSMCache(self.config)
        counting.layers = cache.layers
        model_kwargs["past_key_values"] = counting


class TransXSSMForSequenceClassification(GenericForSequenceClassification, TransXSSMPreTrainedModel):
    """The decoder with a classifier on its last token."""

    # The loss is the mean over each batch, so that Trainer must average over the microbatches of a step. From `**kwargs` it would conclude
    # that the loss takes num_items_in_batch.
    accepts_loss_kwargs = False
