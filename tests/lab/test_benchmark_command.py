"""`transxssm benchmark`."""

import json

import pytest

from transxssm_lab.benchmarking import CONTENDERS, DEFAULT_CONTENDERS, DEFAULT_MODES, MODES
from transxssm_lab.benchmarking.decode import DEFAULT_CONTENDERS as DECODE_CONTENDERS
from transxssm_lab.benchmarking.ops import REFERENCES


@pytest.mark.parametrize("command", ["throughput", "ops"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lengths", "0"], "a length is a number of tokens ≥ 1, such as 4096 or 4K: got '0'"),
        (["--lengths", "1K,4M"], "got '4M'"),
        (["--lengths", ","], "lengths must be 1 token or more: got []"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--dtype", "int8"], "unknown dtype 'int8': expected one of float32, bfloat16, float16"),
        (["--preset", "huge"], "unknown preset 'huge': expected one of tiny, small, 320m, 1.3b"),
        (["--batch", "0"], "batch must be at least 1 sequence: got 0"),
        (["--repeats", "0"], "repeats must be at least 1: got 0"),
        (["--budget-minutes", "0"], "budget-minutes must be more than 0: got 0"),
        (["--memory-limit-gb", "-1"], "the memory limit must be more than 0 bytes"),
        (["--threads", "0"], "threads must be at least 1: got 0"),
    ],
    ids=str,
)
def test_refusals(error_of, tmp_path, command, arguments, words):
    assert words in error_of("benchmark", command, *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--contenders", "transxssm,gpt2"], "unknown contender 'gpt2': expected one of transxssm, "),
        (["--contenders", "llama,llama"], "each contender can be named once: got llama, llama"),
        (["--contenders", ""], "expected at least one contender of transxssm, "),
        (
            ["--contenders", "llama-static", "--modes", "train"],
            "llama-static can be measured in decode only: got modes train",
        ),
        (["--modes", "train,dream"], "unknown mode 'dream'"),
        (["--modes", "train-autocast"], "got dtype float32, expected bfloat16 or float16"),
        (["--lengths", "1"], "train needs 2 tokens"),
        (["--chunk-size", "0"], "chunk-size must be at least 1 token: got 0"),
    ],
    ids=str,
)
def test_refusals_of_throughput(error_of, arguments, words):
    assert words in error_of("benchmark", "throughput", *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batches", "0"], "a batch is a number of sequences ≥ 1, such as 64: got '0'"),
        (["--batches", "1,a"], "got 'a'"),
        (["--batches", "1,-2"], "got '-2'"),
        (["--batches", ","], "batches must be 1 sequence or more: got []"),
        (["--length", "0"], "a length is a number of tokens ≥ 1, such as 4096 or 4K: got '0'"),
        (["--contenders", "transxssm,gpt2"], "unknown contender 'gpt2': expected one of transxssm, "),
        (
            ["--contenders", "llama-compiled"],
            "llama-compiled can be measured in train, train-autocast, train-checkpointed, prefill only: got modes decode",
        ),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--repeats", "0"], "repeats must be at least 1: got 0"),
        (["--budget-minutes", "0"], "budget-minutes must be more than 0: got 0"),
        (["--memory-limit-gb", "-1"], "the memory limit must be more than 0 bytes"),
        (["--threads", "0"], "threads must be at least 1: got 0"),
    ],
    ids=str,
)
def test_refusals_of_decode(error_of, tmp_path, arguments, words):
    assert words in error_of("benchmark", "decode", *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_decode(run, tmp_path):
    options = ("--preset", "tiny", "--contenders", "llama-static,transxssm", "--length", "16", "--batches", "4,1,4")
    options = ("benchmark", "decode", *options, "--repeats", "1", "--threads", "1", "--output", tmp_path / "out")
    result = run(*options)
    assert (result.exit_code, result.stderr) == (0, "")
    results = json.loads((tmp_path / "out" / "decode.json").read_text(encoding="utf-8"))
    assert results["settings"]["batches"] == [1, 4]
    got = [(cell["contender"], cell["batch"], cell["status"]) for cell in results["cells"]]
    assert got == [(name, batch, "ok") for name in ("llama-static", "transxssm") for batch in (1, 4)]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"decode.json", "decode.md", "decode.png"}
    for words in ("ms a step", "largest batch", "llama-static", f"{results['cells'][-1]['tokens_per_second']:,.0f}"):
        assert words in result.stdout

    again = run(*options)
    assert "decode.json is complete: nothing is measured again" in again.stderr
    assert json.loads((tmp_path / "out" / "decode.json").read_text(encoding="utf-8"))["cells"] == results["cells"]


def test_help_names_what_there_is(run):
    """The help must not import torch, so that the names stand there a second time."""
    text = " ".join(run("benchmark", "throughput", "--help", env={"COLUMNS": "400"}).stdout.split())
    assert f"Of {', '.join(CONTENDERS)}." in text
    assert f"Of {', '.join(MODES)}." in text
    assert ",".join(DEFAULT_CONTENDERS) in text
    assert ",".join(DEFAULT_MODES) in text
    text = " ".join(run("benchmark", "decode", "--help", env={"COLUMNS": "400"}).stdout.split())
    assert f"Of {', '.join(name for name, each in CONTENDERS.items() if 'decode' in each.modes)}." in text
    assert ",".join(DECODE_CONTENDERS) in text


def test_ops(run, tmp_path):
    options = ("--preset", "tiny", "--lengths", "16", "--repeats", "1", "--threads", "1", "--output", tmp_path / "out")
    result = run("benchmark", "ops", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    results = json.loads((tmp_path / "out" / "ops.json").read_text(encoding="utf-8"))
    assert results["status"] == "complete"
    assert {cell["mode"] for cell in results["cells"]} == {
        f"{operator}, {direction}" for operator in REFERENCES for direction in ("forward", "forward+backward")
    }
    assert {cell["status"] for cell in results["cells"]} == {"ok"}
    for mode in {cell["mode"] for cell in results["cells"]}:
        assert mode in result.stdout
    for name in ("scan", "scan-32", "sdpa", "dual-form", "linear-cross-entropy", "full-logits"):
        assert name in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ops.json", "ops.md", "ops.png"}

    again = run("benchmark", "ops", *options)
    assert "ops.json is complete: nothing is measured again" in again.stderr
    assert json.loads((tmp_path / "out" / "ops.json").read_text(encoding="utf-8"))["cells"] == results["cells"]


@pytest.mark.parametrize(
    "options", [("throughput", "--modes", "prefill", "--lengths", "8"), ("decode", "--length", "8")], ids=lambda o: o[0]
)
def test_what_does_not_fit_is_reported(run, tmp_path, options):
    options = (*options, "--preset", "tiny", "--contenders", "transxssm", "--threads", "1", "--output", tmp_path)
    result = run("benchmark", *options, "--memory-limit-gb", "0.001")
    assert result.exit_code == 0
    assert "out of memory" in result.stdout
    assert "Traceback" not in result.output
