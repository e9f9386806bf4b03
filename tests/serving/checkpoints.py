"""Checkpoint folders that take no training: one that recites a text, one of random weights."""

import itertools
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from transxssm.data import Corpus, DataArguments, build_tokenizer
from transxssm.models import TransXSSMConfig, TransXSSMForCausalLM

# No byte twice, so that each one tells the next; characters of 1, 2, 3 and 4 bytes.
RECITED = "def(é€😀):\n"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token b is byte b; `<|endoftext|>` is 256."""
    return build_tokenizer(DataArguments(tokenizer="bytes"), Corpus(train=None, held_out=None, identity=""))


def write_reciting_checkpoint(folder: Path, *, rounds: bool = True) -> Path:
    """A model that says `RECITED` after any prompt, over and over, or (rounds=False) once and then eos."""
    tokenizer = byte_tokenizer()
    config = _config(tokenizer, hidden_size=264, num_attention_heads=4, intermediate_size=8, tie_word_embeddings=False)
    model = TransXSSMForCausalLM(config)
    script = [*RECITED.encode()]
    following = dict.fromkeys(range(config.vocab_size), script[0]) | dict(itertools.pairwise(script))
    following[script[-1]] = script[0] if rounds else tokenizer.eos_token_id
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.zero_()  # nothing is added to the embeddings, which name the token
        model.model.embed_tokens.weight.copy_(torch.eye(config.vocab_size, config.hidden_size))
        for token, next_token in following.items():
            model.lm_head.weight[next_token, token] = 10.0
    return _save(folder, model, tokenizer)


def write_random_checkpoint(folder: Path, **sizes: int) -> Path:
    """A model of random weights, the same at every call, whose samples vary."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    options = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "initializer_range": 0.2}
    return _save(folder, TransXSSMForCausalLM(_config(tokenizer, **(options | sizes))), tokenizer)


def _config(tokenizer: PreTrainedTokenizerFast, **options) -> TransXSSMConfig:
    return TransXSSMConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )


def _save(folder: Path, model: TransXSSMForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
