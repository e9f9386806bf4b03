"""`transxssm info`."""

import json

import pytest
import torch
from transformers import GPT2Config

from transxssm.inspection import cache_bytes, count_parameters, flops_per_token
from transxssm.models import TransXSSMConfig, read_config
from transxssm.models.baselines import BASELINES


@pytest.fixture
def described(run):
    def describe(*arguments):
        result = run("info", *arguments, "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        return json.loads(result.stdout)

    return describe


def test_the_papers_model(described):
    description = described("320m")
    assert description["parameters"]["total"] == 321_980_664
    assert description["layers"] == {"linear_attention": 21, "full_attention": 3}
    rows = description["cache_bytes_per_sequence"]
    assert [row["context"] for row in rows] == [4096, 8192, 16384, 32768, 65536, 131072]
    # 3 attention layers of 24: 2 · 768 values of 2 bytes a token; 21 SSD layers: 12 heads of 64 × 128 floats of 4 bytes.
    assert (rows[0]["kv"], rows[0]["state"]) == (4096 * 3 * 2 * 768 * 2, 21 * 12 * 64 * 128 * 4)
    assert all(row["state"] == rows[0]["state"] for row in rows)
    assert rows[-1]["all_attention"] == 131072 * 24 * 2 * 768 * 2
    assert all(row["total"] == row["kv"] + row["state"] for row in rows)


def test_options_reach_the_counts(described):
    config = TransXSSMConfig.from_preset("tiny")
    flops = described("tiny", "--context", 100)["flops_per_token"]
    expected = flops_per_token(config, 100)
    assert flops == {"context": 100, **expected._asdict(), "forward": expected.total, "training": 3 * expected.total}
    half, full = (
        described("tiny", "--dtype", dtype)["cache_bytes_per_sequence"][0]["kv"] for dtype in ("float16", "float32")
    )
    assert full == 2 * half


def test_a_checkpoint_is_described_without_its_weights(described, reciting, tmp_path):
    (tmp_path / "config.json").write_bytes((reciting / "config.json").read_bytes())
    description = described(tmp_path)
    config = read_config(reciting)
    counts = count_parameters(config)
    assert description["parameters"] == {**counts, "total": sum(counts.values())}
    assert description["tied_head"] is False
    assert counts["head"] == 258 * 264


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_described_too(run, described, tmp_path, name):
    hybrid = TransXSSMConfig.from_preset("tiny")
    config = BASELINES[name](hybrid)
    config.save_pretrained(tmp_path)
    description, ours = described(tmp_path), described("tiny")
    assert description["parameters"]["total"] == pytest.approx(ours["parameters"]["total"], rel=0.02)
    assert sum(description["layers"].values()) == description["sizes"]["num_hidden_layers"]
    assert description["flops_per_token"]["forward"] == flops_per_token(config, 4096).total
    missing = {size for size, value in description["sizes"].items() if value is None}
    ssd = {"ssd_num_heads", "ssd_head_dim", "ssd_state_size", "ssd_num_groups"}
    attention = {"intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"}
    assert missing == {"llama": ssd, "mamba2": attention, "jamba": set()}[name]
    text = run("info", tmp_path).stdout
    assert f"{description['flops_per_token']['training'] / 1e6:,.1f}" in text
    assert "options" not in text
    assert ("–" in text) == (name == "mamba2")  # what its attention would take is not known


def test_tables_say_the_same(run, described):
    text, description = run("info", "tiny").stdout, described("tiny")
    for kind, count in description["parameters"].items():
        if kind != "head":
            assert f"{count:,}" in text or kind == "total"
    assert "tied to the embeddings" in text
    assert f"{description['flops_per_token']['training'] / 1e6:,.1f}" in text
    for row in description["cache_bytes_per_sequence"]:
        assert f"{row['total'] / 1e6:,.1f}" in text
        assert f"{row['all_attention'] / row['total']:.1f}×" in text


def test_options_that_are_on_are_named(run, described, tmp_path):
    assert "options" not in run("info", "tiny").stdout
    TransXSSMConfig.from_preset("tiny", ssd_output_gate=True, ssd_partial_rotary_factor=0.5).save_pretrained(tmp_path)
    assert "options: ssd_partial_rotary_factor=0.5, ssd_output_gate=True\n" in run("info", tmp_path).stdout
    options = described(tmp_path)["options"]
    assert (options["ssd_output_gate"], options["qk_norm"], options["attention_position_embedding"]) == (
        True,
        False,
        "rope",
    )


def test_an_all_ssd_model_keeps_the_same_bytes_at_every_length(described, tmp_path):
    config = TransXSSMConfig.from_preset("tiny", layer_types=["linear_attention"] * 8)
    config.save_pretrained(tmp_path)
    rows = described(tmp_path)["cache_bytes_per_sequence"]
    assert {row["total"] for row in rows} == {cache_bytes(config, 1, torch.bfloat16).state}
    assert described(tmp_path)["sizes"]["num_attention_heads"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["huge"],
            "'huge' is neither a preset (tiny, small, 320m, 1.3b, tiny-conv, small-conv, 320m-conv, 1.3b-conv) nor a checkpoint folder",
        ),
        (["tiny", "--dtype", "int8"], "unknown dtype 'int8': expected one of float32, bfloat16, float16"),
        (["tiny", "--context", "0"], "context must be at least 1 token: got 0"),
    ],
    ids=str,
)
def test_refusals(error_of, arguments, words):
    assert words in error_of("info", *arguments)


def test_a_model_without_a_formula_is_refused(error_of, tmp_path):
    GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9).save_pretrained(tmp_path)
    assert "costs are known of TransXSSM, Llama, Mamba-2 and Bamba: got 'gpt2'" in error_of("info", tmp_path)


def test_a_baseline_whose_sizes_do_not_fit_is_refused(error_of, tmp_path):
    BASELINES["llama"](TransXSSMConfig.from_preset("tiny")).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 65}))
    assert f"{path}: " in error_of("info", tmp_path)


def test_a_folder_without_a_model_is_refused(error_of, tmp_path):
    assert "config.json is missing" in error_of("info", tmp_path)
