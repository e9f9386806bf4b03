"""`transxssm kernels` tells what runs: what it names is what a model's layers take, and a slower machine shows why."""

import re

import pytest
import torch

from transxssm.models import TransXSSMConfig, TransXSSMForCausalLM
from transxssm.ops import dispatch
from transxssm.ops.dispatch import Op
from transxssm.ops.explain import OPS
from transxssm_cli.kernels import choices


@pytest.fixture
def taken(monkeypatch):
    """The backends that calls of the ops take, by the op's name."""
    found: dict[str, set[str]] = {}
    choose = Op.choose

    def watched(op, requested, *call):
        backend = choose(op, requested, *call)
        found.setdefault(op.name, set()).add(str(backend.name))
        return backend

    monkeypatch.setattr(Op, "choose", watched)
    return found


def run_model(config, dtype, situation, length):
    torch.manual_seed(0)
    model = TransXSSMForCausalLM(config).to(dtype).train(situation == "training")
    ids = torch.randint(config.vocab_size, (1, length))
    if situation == "training":
        model(input_ids=ids, labels=ids).loss.backward()
        return None
    with torch.no_grad():
        return model, model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("situation", ["training", "prefill", "decoding"])
def test_what_it_names_is_what_the_layers_take(situation, dtype, taken):
    """Of the ops that a layer calls once: a linear layer or a norm may be wider or narrower than the one that is shown."""
    length = 640
    config = TransXSSMConfig.from_preset("tiny-conv")
    expected = {each.op: each.backend for each in choices(config, dtype, torch.device("cpu"), length)[situation]}
    taken.clear()
    after = run_model(config, dtype, situation, length)
    if situation == "decoding":
        taken.clear()
        model, cache = after
        with torch.no_grad():
            model(input_ids=torch.ones(1, 1, dtype=torch.int64), past_key_values=cache)
    around = {"layer_start", "layer_end"} if situation == "decoding" else {"swiglu"}
    assert expected.keys() >= {"linear", "rms_norm", "short_convolution"} | around
    for op, backend in expected.items():
        if op == "causal_attention" and backend == "sdpa":  # which the model takes from transformers
            continue
        assert backend in taken[op], op


def test_every_op_is_shown_with_its_implementations(run):
    text = run("kernels", "--preset", "tiny-conv", "--device", "cpu").stdout
    assert "tiny-conv in bfloat16 on " in text
    for name, op in OPS.items():
        assert re.search(rf"{name} +{', '.join(str(backend.name) for backend in op.backends)}", text)
    for situation in ("training", "prefill", "decoding"):
        assert re.search(rf"\n {situation} +ssd_", text)


def test_a_machine_without_a_compiler_says_so(run, monkeypatch):
    reason = "there is no C++ compiler: install g++ or set CXX"
    monkeypatch.setattr(dispatch, "_reason_without_library", lambda: reason)
    text = run("kernels", "--preset", "tiny", "--device", "cpu", "--dtype", "float32").stdout
    assert f"C++ kernels: {reason}\n" in text
    assert re.search(rf"ssd_chunk_scan +chunked +.*\n.*\n.*cpp: {re.escape(reason)}", text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "float61"], "unknown dtype 'float61'"),
        (["--device", "gpu9"], "unknown device 'gpu9'"),
        (["--preset", "smal"], "did you mean small?"),
        (["--length", "0"], "length"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(error_of, arguments, words):
    assert words in error_of("kernels", *arguments)


def test_a_model_of_another_kind_is_refused(error_of, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1).save_pretrained(tmp_path)
    assert "no TransXSSM model: got model_type 'llama'" in error_of("kernels", "--preset", tmp_path)
