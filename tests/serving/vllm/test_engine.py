"""In vLLM's engine every model says what `generate` says, whatever shares its steps, its memory and its prefixes."""

import os

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-serving` builds an environment that has it")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where its errors are seen

from vllm import LLM, SamplingParams

from tests.models.tiny import ALL_VARIANTS, tiny_model, tokens
from transxssm import TransXSSMForCausalLM

SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}  # heads of 32, the smallest that vLLM has on a CPU
LENGTHS = (1, 2, 17, 63, 64, 65, 130, 300)
MEGABYTE = 2**20
SSD = "linear_attention"
# Beside the variants of the models' laws.
MORE = {
    "untied": {"tie_word_embeddings": False},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "kernel_of_one": {"ssd_conv_kernel_size": 1},
}


def save_model(folder, variant="hybrid", **options) -> TransXSSMForCausalLM:
    model = tiny_model(variant, dtype=torch.float32, **SIZES, **options)
    model.save_pretrained(folder)
    return model


def engine(folder, **options) -> LLM:
    options = {"max_model_len": 1024, "kv_cache_memory_bytes": 256 * MEGABYTE, "enable_prefix_caching": False} | options
    return LLM(model=str(folder), dtype="float32", skip_tokenizer_init=True, enforce_eager=True, **options)


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


def continuations(llm: LLM, prompts: list[list[int]], num_tokens: int = 12) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy(num_tokens), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def expected(model: TransXSSMForCausalLM, prompts: list[list[int]], num_tokens: int = 12) -> list[list[int]]:
    return [
        model.generate(torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)[
            0, len(prompt) :
        ].tolist()
        for prompt in prompts
    ]


def prompts_of(lengths) -> list[list[int]]:
    return [tokens(1, length, seed=index)[0].tolist() for index, length in enumerate(lengths)]


@pytest.mark.parametrize("variant", [*ALL_VARIANTS, *MORE])
def test_says_what_generate_says(variant, tmp_path):
    model = save_model(tmp_path, variant if variant in ALL_VARIANTS else "hybrid", **MORE.get(variant, {}))
    prompts = prompts_of(LENGTHS)
    assert continuations(engine(tmp_path), prompts) == expected(model, prompts)


@pytest.mark.parametrize("variant", ["hybrid", "convolution", "all_ssd", "everything"])
def test_prompts_in_pieces(variant, tmp_path):
    model = save_model(tmp_path, variant)
    prompts = prompts_of(LENGTHS)
    llm = engine(tmp_path, max_num_batched_tokens=32, max_num_seqs=8)
    assert continuations(llm, prompts) == expected(model, prompts)


@pytest.mark.parametrize("variant", ["hybrid", "convolution"])
def test_shared_prefix_is_read_once(variant, tmp_path):
    model = save_model(tmp_path, variant)
    prefix, first_end, second_end = prompts_of((650, 40, 50))
    llm = engine(tmp_path, enable_prefix_caching=True)
    first = prefix + first_end
    assert continuations(llm, [first]) == expected(model, [first])
    second = prefix + second_end
    [output] = llm.generate([{"prompt_token_ids": second}], greedy(12), use_tqdm=False)
    assert list(output.outputs[0].token_ids) == expected(model, [second])[0]
    assert output.num_cached_tokens > 0


def test_more_sequences_than_memory(tmp_path):
    model = save_model(tmp_path)
    prompts = prompts_of([100 + 10 * (index % 5) for index in range(12)])
    llm = engine(tmp_path, kv_cache_memory_bytes=3 * MEGABYTE, max_num_seqs=12)
    assert continuations(llm, prompts, 60) == expected(model, prompts, 60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mamba_ssm_cache_dtype": "float16"}, "--mamba-ssm-cache-dtype"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative-config"),
    ],
)
def test_refuses_what_states_do_not_allow(options, message, tmp_path):
    save_model(tmp_path)
    with pytest.raises(ValueError, match=message):
        engine(tmp_path, **options)


def test_refuses_heads_that_vllm_lacks(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)  # heads of 8
    with pytest.raises(ValueError, match="head_dim"):
        engine(tmp_path)
