"""Models whose score is known: small ones of several kinds with random weights, and oracles that always answer rightly."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.models.tiny import tiny_model

VOCAB_SIZE = 97
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
POSITIONS = 64  # of the model that has no more


def random_model(kind: str) -> PreTrainedModel:
    """A model of random weights, the same at every call: transxssm, llama, gemma2 (soft-capped logits), gpt2 (learned positions)."""
    torch.manual_seed(0)
    match kind:
        case "transxssm":
            return tiny_model(dtype=torch.float32)
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2)).eval()
        case "gemma2":
            options = {
                "head_dim": 8,
                "num_key_value_heads": 4,
                "initializer_range": 0.2,
                "final_logit_softcapping": 2.0,
            }
            return Gemma2ForCausalLM(Gemma2Config(**SIZES, **options)).eval()
        case "gpt2":
            config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS)
            return GPT2LMHeadModel(config).eval()
    raise AssertionError(kind)


class OracleConfig(PreTrainedConfig):
    model_type = "oracle"
    num_hidden_layers: int = 1  # which caches are made for


class Oracle(PreTrainedModel, GenerationMixin):
    """A model that expects the token that a rule names: the rule gets the ids so far, and may know none."""

    config_class = OracleConfig

    def __init__(self, vocab_size: int, rule: Callable[[Sequence[int]], int | None], last: int) -> None:
        """
        Args:
            last: the rule is asked at so many positions at the end of each row; elsewhere all tokens are equally likely.
        """
        super().__init__(OracleConfig(vocab_size=vocab_size, use_cache=False))
        self.rule, self.last = rule, last
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # which gives the model a device and a type

    def forward(self, input_ids: Tensor, **arguments: object) -> CausalLMOutputWithPast:
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            for position in range(max(0, len(ids) - self.last), len(ids)):
                token = self.rule(ids[: position + 1])
                if token is not None:
                    logits[row, position, token] = 30.0
        return CausalLMOutputWithPast(logits=logits)

    def get_output_embeddings(self) -> None:
        return None

    def prepare_inputs_for_generation(  # generate looks for attention_mask among the names
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **arguments: object
    ) -> dict[str, Tensor]:
        return {"input_ids": input_ids}
