"""Configuration of TransXSSM: one dataclass, the presets of the paper's Table 4, and checks that say got and expected."""

import copy
import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from transxssm.ops import rotary_frequencies

# Fields that may be None on construction. `__post_init__` derives their values.
DERIVED: Any = None
if TYPE_CHECKING:
    DerivedInt = int
    DerivedNames = list[str]
else:
    DerivedInt = int | None
    DerivedNames = list[str] | None

ATTENTION_LAYER_TYPES = ("full_attention", "sliding_attention")
SSD_LAYER_TYPE = "linear_attention"  # the name under which transformers caches recurrent layers
LAYERS_PER_MODULE = 8  # 7 SSD layers, then 1 attention layer (Section 3)
_GIVEN_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
SELECTIVE_ROPE_TYPE = "selective"
_SELECTIVE_DEFAULTS = {"rank": 16, "kernel_size": 4, "gate": False}

_PAPERS_PRESETS: dict[str, dict[str, Any]] = {
    # For five minutes of training on a laptop's CPU. The vocabulary size is that of the tokenizer.
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
    },
    "small": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
    # The paper's two sizes (Table 4). It gives no FFN width, groups or tying: these match a Llama's parameters. Its chunk of 256
    # tokens, which changes time and no result, is the default on GPUs.
    "320m": {
        "hidden_size": 768,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 12,
    },
    "1.3b": {
        "hidden_size": 2048,
        "intermediate_size": 5376,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
    },
}
# Recommended by the experiments from some ten million tokens on (docs/results.md): Mamba-2's convolution and skip besides the rotation.
_CONVOLUTION = {"ssd_conv_kernel_size": 4, "ssd_skip": True}
PRESETS: dict[str, dict[str, Any]] = _PAPERS_PRESETS | {
    f"{name}-conv": sizes | _CONVOLUTION for name, sizes in _PAPERS_PRESETS.items()
}


@strict
class TransXSSMConfig(PreTrainedConfig):
    """Sizes and options of a TransXSSM model (paper, Section 3 and Table 4).

    `TransXSSMConfig(hidden_size=…, num_attention_heads=…)` alone gives the paper's model of that width: every eighth layer is
    attention, heads are hidden_size / num_attention_heads wide, states twice that, and two SSD heads share one B and C.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers: as in Llama; the FFN is a SwiGLU.
        num_attention_heads, num_key_value_heads, head_dim: attention layers; key-value heads default to all heads.
        layer_types: one name per layer, "linear_attention" (SSD), "full_attention" or "sliding_attention". Defaults to 7 SSD layers
            to 1 full attention layer; with fewer than 8 layers the last one is the attention layer.
        sliding_window: tokens that a "sliding_attention" layer sees, itself included.
        ssd_num_heads, ssd_head_dim: SSD heads. Defaults to hidden_size / head_dim heads as wide as attention's.
        ssd_state_size: n. Defaults to 2 · head_dim.
        ssd_num_groups: groups of heads that share B and C. Defaults to half the heads, so that the SSD layer's projections cost
            what an attention layer's do.
        ssd_chunk_size: tokens in a chunk of the scan. Defaults to what is best for the device.
        ssd_position_embedding: "rope" rotates C and B (Unified RoPE); "none" leaves positions to the recurrence.
        ssd_partial_rotary_factor: part of the state's pairs that rotates, those of the highest frequencies. The others are not rotated.
        ssd_conv_kernel_size: width of a short causal convolution with SiLU on x, B and C, as in Mamba-2; 0 leaves it out.
        ssd_skip: adds D x to an SSD layer's output, as in Mamba-2.
        ssd_norm_BC: an RMSNorm over the state on every group's B and C, before their bias and rotation, as in Mamba-3.
        ssd_bias_BC: a bias for every group and channel on B and C, before their rotation; starts at 1, as in Mamba-3.
        ssd_output_gate: multiplies an SSD layer's output by silu(z), from an additional projection, and normalises it, as in Mamba-2.
        ssd_scan_in_fp32: upcasts x, B and C to float32 for the scan of a model in half precision. Slower: its products are float32 too.
        attention_position_embedding: "rope" rotates Q and K (Unified RoPE); "none" leaves positions to the SSD layers (NoPE).
        qk_norm: an RMSNorm on every head of Q and K before their rotation, as in Qwen3.
        attention_output_gate: multiplies every channel of the heads' output by sigmoid(g), from an additional projection, as in Qwen3-Next.
        ssd_A_min, ssd_A_max: A starts uniform in −[min, max].
        ssd_dt_min, ssd_dt_max, ssd_dt_floor: time steps start log-uniform in [min, max], at least floor.
        length_scaling_base: base of the factor max(1, log_base n) on C and Q at position n − 1 (Appendix A, end); the mean length
            in training. Defaults to no scaling.
        rope_parameters: Hugging Face's; rope_type "default", "linear", "llama3" or "yarn", or "selective": every layer that rotates adds
            running angles of its own, which depend on its input, with the keys rank (of their projection, by default 16), kernel_size (of
            their convolution, 4) and gate (for every head, false); see `TransXSSMSelectiveRotation`.

    Raises:
        ValueError: sizes that do not fit each other; "dynamic" or "longrope" RoPE.
    """

    model_type = "transxssm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (Trainer adds a list to it)
    # Rules of mixers come from `_tensor_parallel_plan`.
    base_model_tp_plan = {  # noqa: RUF012 (transformers' own form)
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 12
    num_key_value_heads: DerivedInt = DERIVED
    head_dim: DerivedInt = DERIVED
    hidden_act: str = "silu"
    layer_types: DerivedNames = DERIVED
    sliding_window: int | None = None
    ssd_num_heads: DerivedInt = DERIVED
    ssd_head_dim: DerivedInt = DERIVED
    ssd_state_size: DerivedInt = DERIVED
    ssd_num_groups: DerivedInt = DERIVED
    ssd_chunk_size: int | None = None
    ssd_position_embedding: Literal["rope", "none"] = "rope"
    ssd_partial_rotary_factor: float = 1.0
    ssd_conv_kernel_size: int = 0
    ssd_skip: bool = False
    ssd_norm_BC: bool = False
    ssd_bias_BC: bool = False
    ssd_output_gate: bool = False
    ssd_scan_in_fp32: bool = False
    attention_position_embedding: Literal["rope", "none"] = "rope"
    qk_norm: bool = False
    attention_output_gate: bool = False
    ssd_A_min: float = 1.0
    ssd_A_max: float = 16.0
    ssd_dt_min: float = 1e-3
    ssd_dt_max: float = 0.1
    ssd_dt_floor: float = 1e-4
    length_scaling_base: int | None = None
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int = 16384
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.rope_parameters = copy.deepcopy(self.rope_parameters)  # the caller's, which transformers would write into
        self._check_positive(*_GIVEN_SIZES)
        self._derive()
        self._check_layer_types()  # before transformers renames kinds of layers of other models
        self.base_model_tp_plan = self._tensor_parallel_plan()
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "TransXSSMConfig":
        """The configuration of a preset (`PRESETS`), with fields replaced by `overrides`.

        "tiny", "small", "320m" and "1.3b" are the paper's model at four sizes. The suffix "-conv" adds a short convolution and
        the D skip to the SSD layers, which is what we recommend for all but the shortest runs.

        Raises:
            ValueError: there is no such preset, or the result is not a valid configuration.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    def check(self) -> None:
        """Completes `rope_parameters`, and checks that the fields fit each other.

        It runs on construction and again when a model is built, since fields may have been set in between.

        Raises:
            ValueError: see the class.
        """
        self.convert_rope_params_to_dict()
        self._check_positive(*_GIVEN_SIZES, "head_dim")
        _require_multiple(
            "num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads
        )
        self._check_layer_types()
        self._check_ssd()
        self._check_rope()
        self._check_partial_rotation()

    @property
    def has_attention(self) -> bool:
        """Whether any layer is an attention layer."""
        return any(layer_type in ATTENTION_LAYER_TYPES for layer_type in self.layer_types)

    @property
    def rotates_ssd(self) -> bool:
        """Whether any layer rotates C and B."""
        return SSD_LAYER_TYPE in self.layer_types and self.ssd_position_embedding == "rope"

    @property
    def rotates_attention(self) -> bool:
        """Whether any layer rotates Q and K."""
        return self.has_attention and self.attention_position_embedding == "rope"

    @property
    def rope_type(self) -> str:
        """The rope_type in `rope_parameters`."""
        return str((self.rope_parameters or {}).get("rope_type", "default"))

    @property
    def is_selective(self) -> bool:
        """Whether rotations depend on the tokens (`TransXSSMSelectiveRotation`)."""
        return bool(self._rotated_widths()) and self.rope_type == SELECTIVE_ROPE_TYPE

    @property
    def ssd_num_rotated_pairs(self) -> int:
        """The number of a state's ssd_state_size / 2 pairs that rotate, if states rotate."""
        return round(self.ssd_partial_rotary_factor * self.ssd_state_size / 2)

    @property
    def rotary_width(self) -> int:
        """Width of the table of frequencies that all rotated layers share."""
        return max(self._rotated_widths(), default=0)

    def rotary_frequencies(self) -> tuple[list[float], float]:
        """The table's angular frequencies (Eq. 3) after static scaling, and yarn's factor for attention (1 elsewhere).

        Raises:
            ValueError: `rope_parameters` name a scaling that is not static. They may have been set after construction.
        """
        self._check_rope()
        rope = self.rope_parameters or {}
        with torch.device("cpu"):  # so that there are values even while a model is built on the meta device
            if self.rope_type in ("default", SELECTIVE_ROPE_TYPE):
                return rotary_frequencies(self.rotary_width, rope["rope_theta"]).tolist(), 1.0
            table = copy.copy(self)
            table.head_dim = self.rotary_width  # the width of the table that transformers computes
            frequencies, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](table)
            return frequencies.double().tolist(), float(attention_factor)

    def _derive(self) -> None:
        if self.head_dim is None:
            _require_multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = _default_layer_types(self.num_hidden_layers)
        if self.ssd_head_dim is None:
            self.ssd_head_dim = self.head_dim
        if self.ssd_num_heads is None:
            _require_multiple("hidden_size", self.hidden_size, "ssd_head_dim", self.ssd_head_dim)
            self.ssd_num_heads = self.hidden_size // self.ssd_head_dim
        if self.ssd_num_groups is None:
            heads = self.ssd_num_heads
            self.ssd_num_groups = max(groups for groups in range(1, max(1, heads // 2) + 1) if heads % groups == 0)
        if self.ssd_state_size is None:
            self.ssd_state_size = 2 * self.head_dim

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: got {getattr(self, name)}")

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """The rules for the modules that the model has. transformers warns of a rule without a module.

        A layer with a selective rotation is replicated: one projection makes the angles of all its heads.
        """
        plan, is_selective = dict(self.base_model_tp_plan), self.is_selective
        if SSD_LAYER_TYPE in self.layer_types and not (self.rotates_ssd and is_selective):
            plan |= {f"layers.*.ssd{name}": style for name, style in self._ssd_styles().items()}
        if not self.has_attention or (self.rotates_attention and is_selective):
            return plan
        styles = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise") | {"o_proj": "rowwise"}
        if self.attention_output_gate:
            styles["g_proj"] = "colwise"
        if self.qk_norm:  # all shards' heads share one weight
            styles |= dict.fromkeys(("q_norm", "k_norm"), "replicated_with_grad_allreduce")
        plan["layers.*.self_attn"] = "transxssm_attention"
        return plan | {f"layers.*.self_attn.{name}": style for name, style in styles.items()}

    def _ssd_styles(self) -> dict[str, str]:
        """Styles that divide the heads and groups of SSD layers. Those of this package are in `transxssm.models.tensor_parallel`."""
        styles = {"": "transxssm_mixer", ".dynamics": "transxssm_heads", ".out_proj": "rowwise"}
        styles |= dict.fromkeys((".x_proj", ".B_proj", ".C_proj", ".dt_proj"), "colwise")
        if self.ssd_norm_BC:  # all shards' groups share one weight
            styles |= dict.fromkeys((".B_norm", ".C_norm"), "replicated_with_grad_allreduce")
        if self.ssd_output_gate:
            styles |= {".z_proj": "colwise", ".norm": "transxssm_wide_norm"}
        return styles

    def _check_layer_types(self) -> None:
        allowed = (SSD_LAYER_TYPE, *ATTENTION_LAYER_TYPES)
        for layer_type in self.layer_types:
            if layer_type not in allowed:
                raise ValueError(f"layer_types may contain {', '.join(allowed)}: got {layer_type!r}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must name each of the num_hidden_layers={self.num_hidden_layers} layers: got {len(self.layer_types)} names"
            )
        if "sliding_attention" in self.layer_types and (self.sliding_window is None or self.sliding_window < 1):
            raise ValueError(f"sliding_attention layers need sliding_window ≥ 1 tokens: got {self.sliding_window}")

    def _check_ssd(self) -> None:
        self._check_positive("ssd_head_dim", "ssd_num_heads", "ssd_state_size")
        _require_multiple("ssd_num_heads", self.ssd_num_heads, "ssd_num_groups", self.ssd_num_groups)
        if self.ssd_chunk_size is not None:
            self._check_positive("ssd_chunk_size")
        if self.ssd_conv_kernel_size < 0:
            raise ValueError(
                f"ssd_conv_kernel_size must be 0 (no convolution) or more: got {self.ssd_conv_kernel_size}"
            )
        if not 0 < self.ssd_A_min <= self.ssd_A_max:
            raise ValueError(f"expected 0 < ssd_A_min ≤ ssd_A_max: got {self.ssd_A_min} and {self.ssd_A_max}")
        if not 0 < self.ssd_dt_floor <= self.ssd_dt_min <= self.ssd_dt_max:
            raise ValueError(
                "expected 0 < ssd_dt_floor ≤ ssd_dt_min ≤ ssd_dt_max: "
                f"got {self.ssd_dt_floor}, {self.ssd_dt_min} and {self.ssd_dt_max}"
            )
        if self.length_scaling_base is not None and self.length_scaling_base < 2:
            raise ValueError(
                f"length_scaling_base must be at least 2 tokens, the base of a logarithm: got {self.length_scaling_base}"
            )

    def _check_rope(self) -> None:
        rope = self.rope_parameters or {}
        rope_type = rope.get("rope_type", "default")
        if rope_type in ("dynamic", "longrope"):
            name = "'dynamic' (dynamic NTK)" if rope_type == "dynamic" else repr(rope_type)
            raise ValueError(
                f"rope_type {name} changes frequencies with the length, but a state summed under old frequencies cannot be "
                f"rotated again: use one of {', '.join(STATIC_ROPE_TYPES)}"
            )
        if rope_type not in (*STATIC_ROPE_TYPES, SELECTIVE_ROPE_TYPE):
            raise ValueError(
                f"rope_type must be one of {', '.join((*STATIC_ROPE_TYPES, SELECTIVE_ROPE_TYPE))}: got {rope_type!r}"
            )
        if rope_type == SELECTIVE_ROPE_TYPE:
            self._check_selective_rope(rope)
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                "partial_rotary_factor must be 1 in rope_parameters, since attention rotates whole heads: "
                f"got {rope['partial_rotary_factor']}; for states there is ssd_partial_rotary_factor"
            )
        widths = self._rotated_widths()
        if any(width % 2 or max(widths) % width for width in widths):
            raise ValueError(
                "ssd_state_size and head_dim must be even, one a multiple of the other, so that both rotate on one table: "
                f"got {self.ssd_state_size} and {self.head_dim}"
            )

    def _check_selective_rope(self, rope: dict[str, Any]) -> None:
        """Completes the keys of a selective rotation, and refuses unknown ones."""
        known = ("rope_type", "rope_theta", "partial_rotary_factor", *_SELECTIVE_DEFAULTS)
        if unknown := [name for name in rope if name not in known]:
            raise ValueError(
                f"rope_parameters of rope_type 'selective' may have {', '.join(known)}: got {', '.join(unknown)}"
            )
        self.rope_parameters = rope = {**_SELECTIVE_DEFAULTS, **rope}
        for name in ("rank", "kernel_size"):
            if type(rope[name]) is not int or rope[name] < 1:
                raise ValueError(f"rope_parameters' {name} must be a whole number of at least 1: got {rope[name]!r}")
        if not isinstance(rope["gate"], bool):
            raise ValueError(f"rope_parameters' gate must be true or false: got {rope['gate']!r}")

    def _validate_selective_rope_parameters(self, rope: dict[str, Any], ignore_keys: set[str] | None = None) -> None:
        """A hook that transformers calls by the name of the rope_type. `_check_rope` has already checked more."""

    def _check_partial_rotation(self) -> None:
        factor, pairs = self.ssd_partial_rotary_factor, self.ssd_state_size / 2
        if not 0 < factor <= 1:
            raise ValueError(
                "ssd_partial_rotary_factor must be above 0 and at most 1, all pairs of the state: "
                f"got {factor}; without any rotation, set ssd_position_embedding to 'none'"
            )
        if factor == 1:
            return
        if self.ssd_position_embedding == "none":
            raise ValueError(
                f"ssd_partial_rotary_factor must be 1 where ssd_position_embedding is 'none', as nothing rotates: got {factor}"
            )
        if self.ssd_num_rotated_pairs < 1 or not math.isclose(factor * pairs, self.ssd_num_rotated_pairs):
            raise ValueError(
                f"ssd_partial_rotary_factor must leave a whole number of the state's {pairs:g} pairs: got {factor}, "
                f"which leaves {factor * pairs:g}"
            )

    def _rotated_widths(self) -> list[int]:
        widths = [self.head_dim] if self.rotates_attention else []
        return [*widths, self.ssd_state_size] if self.rotates_ssd else widths


def _default_layer_types(num_layers: int) -> list[str]:
    layer_types = [
        "full_attention" if (layer + 1) % LAYERS_PER_MODULE == 0 else SSD_LAYER_TYPE for layer in range(num_layers)
    ]
    if num_layers < LAYERS_PER_MODULE:
        layer_types[-1] = "full_attention"
    return layer_types


def _require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if divisor < 1 or value % divisor:
        raise ValueError(f"{name} must be a multiple of {divisor_name}: got {value} and {divisor}")
