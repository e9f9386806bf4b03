"""What the server refuses before its engine starts, and how much memory it says that a context takes."""

import json

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-serving` builds an environment that has it")

from tests.models.tiny import tiny_model
from tests.serving.vllm.test_engine import SIZES, engine, save_model
from transxssm.serving.vllm import server


def say(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        server.main(arguments)
    assert ended.value.code == server.EXIT_USER_ERROR
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--nonsense", "3"], "unrecognized arguments: --nonsense"),
        (["--model", "other"], "--model other: the checkpoint is the first argument"),
        (["--tensor-parallel-size", "3"], "--tensor-parallel-size must divide"),
        (["--dtype", "int3"], "--dtype"),
        (["--max-model-len", "4096", "--kv-cache-memory-bytes", "2M"], "give --max-model-len "),
        (["--mamba-ssm-cache-dtype", "bfloat16"], "--mamba-ssm-cache-dtype"),
    ],
)
def test_one_line_before_the_engine(flags, expected, tmp_path, capsys):
    save_model(tmp_path)
    assert expected in say(capsys, str(tmp_path), *flags)


def test_only_our_checkpoints(tmp_path, capsys):
    assert "config.json is missing" in say(capsys, str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "a model of type 'llama'" in say(capsys, str(tmp_path))


@pytest.mark.parametrize("variant", ["hybrid", "all_attention", "grouped", "convolution"])
def test_context_that_is_said_to_fit_just_fits(variant, tmp_path):
    model = save_model(tmp_path, variant) if variant != "grouped" else save_model(tmp_path, num_key_value_heads=1)
    needed = server.sequence_bytes(model.config, 1000, torch.float32)
    assert server.longest_that_fits(model.config, needed, torch.float32) >= 1000
    options = {"max_model_len": 1000, "enable_prefix_caching": True}
    engine(tmp_path, kv_cache_memory_bytes=needed, **options)
    with pytest.raises(ValueError, match="max seq len"):
        engine(tmp_path, kv_cache_memory_bytes=needed - 1, **options)


def test_no_context_fits():
    config = tiny_model(dtype=torch.float32, **SIZES).config
    assert server.longest_that_fits(config, 1000, torch.float32) == 0
