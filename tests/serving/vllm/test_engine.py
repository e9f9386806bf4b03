"""In vLLM's engine every model says what `generate` says, whatever shares its steps, its memory and its prefixes."""

import logging
import os
import random

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-serving` builds an environment that has it")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where its errors are seen

from vllm import LLM, SamplingParams

from tests.models.tiny import ALL_VARIANTS, pad_rows, tiny_model, tokens
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
    options = {"dtype": "float32"} | options
    return LLM(model=str(folder), skip_tokenizer_init=True, enforce_eager=True, **options)


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


def expected_at_once(model: TransXSSMForCausalLM, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    ids, mask = pad_rows(
        [torch.tensor(prompt) for prompt in prompts],
        [max(map(len, prompts)) - len(prompt) for prompt in prompts],
        max(map(len, prompts)),
    )
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return output[:, ids.shape[1] :].tolist()


def prompts_of(lengths) -> list[list[int]]:
    return [tokens(1, length, seed=index)[0].tolist() for index, length in enumerate(lengths)]


@pytest.mark.parametrize("variant", [*ALL_VARIANTS, *MORE])
def test_says_what_generate_says(variant, tmp_path):
    model = save_model(tmp_path, variant if variant in ALL_VARIANTS else "hybrid", **MORE.get(variant, {}))
    if model.config.is_selective:
        with pytest.raises(ValueError, match="rope_type 'selective'"):
            engine(tmp_path)
        return
    prompts = prompts_of(LENGTHS)
    assert continuations(engine(tmp_path), prompts) == expected(model, prompts)


def test_two_processes_share_a_model(tmp_path, monkeypatch):
    """Tensor parallelism over heads, groups and the width of the output's norm; the one head of keys is in both."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # two processes on one NUMA node
    model = save_model(tmp_path, "everything")
    prompts = prompts_of(LENGTHS)
    llm = engine(tmp_path, tensor_parallel_size=2)
    try:
        assert continuations(llm, prompts) == expected(model, prompts)
    finally:
        llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("variant", ["hybrid", "convolution", "all_ssd", "everything"])
def test_prompts_in_pieces(variant, tmp_path):
    model = save_model(tmp_path, variant)
    prompts = prompts_of(LENGTHS)
    llm = engine(tmp_path, max_num_batched_tokens=32, max_num_seqs=8)
    assert continuations(llm, prompts) == expected(model, prompts)


@pytest.mark.parametrize(
    ("variant", "options"), [("hybrid", {}), ("convolution", {}), ("all_ssd", {"block_size": 128})]
)
def test_a_prefix_is_read_once(variant, options, tmp_path):
    """A state is kept at the last whole block of a prompt, and where a step's piece of it ends: up to there another prompt, and the second
    turn of a conversation, go on from it."""
    model = save_model(tmp_path, variant)
    prefix, first_end, second_end, answer = prompts_of((650, 40, 50, 30))
    llm = engine(tmp_path, enable_prefix_caching=True, **options)
    first = prefix + first_end
    [reply] = continuations(llm, [first])
    assert reply == expected(model, [first])[0]
    for prompt in (prefix + second_end, first + reply + answer):
        [output] = llm.generate([{"prompt_token_ids": prompt}], greedy(12), use_tqdm=False)
        assert list(output.outputs[0].token_ids) == expected(model, [prompt])[0]
        assert output.num_cached_tokens == 640  # five blocks of 128


def test_a_second_turn_of_states_alone(tmp_path):
    """Without attention blocks are of 16 tokens: a second turn reads what is new, and little more."""
    model = save_model(tmp_path, "all_ssd")
    llm = engine(tmp_path, enable_prefix_caching=True)
    first, answer = prompts_of((690, 30))
    [reply] = continuations(llm, [first])
    second = first + reply + answer
    [output] = llm.generate([{"prompt_token_ids": second}], greedy(12), use_tqdm=False)
    assert list(output.outputs[0].token_ids) == expected(model, [second])[0]
    assert output.num_cached_tokens == 688


def test_requests_come_and_go_in_too_little_memory(tmp_path):
    """Sixty at random times, ten of which are cancelled; some are put back and read again; all memory is free in the end."""
    model = save_model(tmp_path)
    llm = engine(tmp_path, kv_cache_memory_bytes=3 * MEGABYTE, max_num_seqs=16)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    num_free, preempted = pool.get_num_free_blocks(), []
    preempt = scheduler._preempt_request

    def noting(request, *arguments, **options):
        preempted.append(request.request_id)
        return preempt(request, *arguments, **options)

    scheduler._preempt_request = noting
    draw = random.Random(0)
    prompts = prompts_of([draw.randint(100, 127) for _ in range(60)])
    arrivals = [draw.randint(0, 150) for _ in prompts]
    cancellations = {index: arrivals[index] + draw.randint(1, 20) for index in draw.sample(range(60), 10)}
    replies, step = {}, 0
    while step <= max(arrivals) or llm.llm_engine.has_unfinished_requests():
        for index, prompt in enumerate(prompts):
            if arrivals[index] == step:
                llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, greedy(30))
        llm.llm_engine.abort_request([str(index) for index, end in cancellations.items() if end == step])
        for output in llm.llm_engine.step():
            if output.finished:
                replies[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    assert preempted
    rest = [index for index in range(60) if index not in cancellations]
    assert set(replies) == {str(index) for index in rest}
    assert [replies[str(index)] for index in rest] == expected_at_once(model, [prompts[index] for index in rest], 30)
    assert pool.get_num_free_blocks() == num_free


def test_bfloat16_is_close_to_float32(tmp_path, caplog):
    """vLLM's own choice for a checkpoint in float32, which is said."""
    model = save_model(tmp_path, "mamba2", initializer_range=0.05)
    prompt = prompts_of((300,))[0]
    with caplog.at_level(logging.WARNING, logger="transxssm"):
        llm = engine(tmp_path, dtype="auto")
    assert "The checkpoint is float32, and vLLM serves it in bfloat16" in caplog.text
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    [output] = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    got = [each[token].logprob for each, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    with torch.no_grad():
        wanted = model(torch.tensor([prompt])).logits.log_softmax(-1)[0, :-1]
    wanted = wanted.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert wanted.std() > 0.1  # a model that says something
    assert (torch.tensor(got) - wanted).abs().max() <= 0.1


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
