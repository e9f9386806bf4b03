"""Weights on their way through files, precisions and the meta device arrive whole, and what is missing is initialised as it should be."""

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils.import_utils import direct_transformers_import

from tests.models.tiny import ALL_VARIANTS, logits_of, saved_weights, tiny_config, tiny_model, tokens
from tests.tolerances import assert_close, relative_error
from transxssm import (
    TransXSSMConfig,
    TransXSSMForCausalLM,
    TransXSSMForSequenceClassification,
    TransXSSMModel,
)
from transxssm.models import ssd_mixer
from transxssm.models.ssd_mixer import name_in_checkpoints

FLOAT32_NAMES = ("A_log", "dt_bias", "D")  # these set the decays, whose errors accumulate over a whole text


def is_float32(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in FLOAT32_NAMES or ".rotation." in name


def edit_checkpoint(folder: Path, remove: str) -> list[str]:
    """Takes every tensor whose name ends in `remove` out of a checkpoint; their names."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    removed = [name for name in tensors if name.endswith(remove)]
    save_file({name: tensor for name, tensor in tensors.items() if name not in removed}, path, {"format": "pt"})
    return removed


@pytest.mark.parametrize("variant", ALL_VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_model_gives_back_the_bits_that_were_saved(variant, dtype, tmp_path):
    tiny_model(variant, dtype=torch.float32).save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    again = tmp_path / "again"
    saved.save_pretrained(again)
    loaded = AutoModelForCausalLM.from_pretrained(again).eval()
    assert type(loaded) is TransXSSMForCausalLM
    assert loaded.config.layer_types == saved.config.layer_types
    expected = saved.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == expected[name].dtype
        assert torch.equal(weight, expected[name]), name
    ids = tokens(2, 9)
    assert torch.equal(logits_of(loaded, ids), logits_of(saved, ids))


@pytest.mark.parametrize("model_class", [TransXSSMForCausalLM, TransXSSMForSequenceClassification, TransXSSMModel])
class TestNames:
    def test_a_saved_folder_says_what_to_import(self, model_class, tmp_path):
        """transformers itself advises an upgrade where it does not know the model type."""
        model_class(tiny_config()).save_pretrained(tmp_path)
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        names: dict[str, Any] = {}
        exec(code.replace("path/to/this/folder", str(tmp_path)), names)
        assert type(names["model"]) is model_class
        assert ModelCard(card).data.library_name == "transformers"

    def test_a_card_that_is_there_stays(self, model_class, tmp_path):
        (tmp_path / "README.md").write_text("mine")
        model_class(tiny_config()).save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == "mine"

    def test_transformers_has_the_name_in_the_config(self, model_class, tmp_path, monkeypatch):
        """`transformers serve`, pipelines and TRL look there for the class of a folder, also after its own second execution."""
        model_class(tiny_config()).save_pretrained(tmp_path)
        (name,) = AutoConfig.from_pretrained(tmp_path).architectures
        assert getattr(transformers, name) is model_class
        monkeypatch.setitem(sys.modules, "transformers", sys.modules["transformers"])
        again = direct_transformers_import(str(Path(transformers.__file__).parent))
        assert again is not transformers
        assert getattr(again, name) is model_class


def test_the_head_is_tied_and_saved_once(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_an_untied_head_is_saved(tmp_path):
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_resized_vocabulary_keeps_the_tie():
    model = tiny_model(dtype=torch.float32)
    model.resize_token_embeddings(120)
    assert model.config.vocab_size == 120
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert logits_of(model, tokens(1, 3)).shape == (1, 3, 120)


def test_the_decoder_loads_out_of_a_language_model(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder) is TransXSSMModel
    for name, weight in decoder.state_dict().items():
        assert torch.equal(weight, model.model.state_dict()[name]), name


@pytest.mark.parametrize("variant", ["hybrid", "mamba2", "normed", "gated"])
class TestPrecision:
    def test_bfloat16_keeps_what_sets_the_decays_in_float32(self, variant, tmp_path):
        model = tiny_model(variant, dtype=torch.float32)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        for name, weight in loaded.state_dict().items():
            expected = model.state_dict()[name]
            assert weight.dtype == (torch.float32 if is_float32(name) else torch.bfloat16), name
            assert torch.equal(weight, expected.to(weight.dtype)), name

    def test_a_bfloat16_checkpoint_loads_as_float32(self, variant, tmp_path):
        tiny_model(variant, dtype=torch.float32).save_pretrained(tmp_path)
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        for name, weight in saved.items():
            assert saved_weights(loaded)[name].dtype == torch.float32
            assert torch.equal(saved_weights(loaded)[name], weight.float()), name

    def test_a_bfloat16_model_computes_its_decays_in_float32(self, variant, tmp_path, monkeypatch):
        model = tiny_model(variant, dtype=torch.float32)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        seen = []
        scan = ssd_mixer.ssd_chunk_scan

        def watched(x, dt, A, B, C, **options):
            seen.append((x.dtype, dt.dtype, A, options["rotary"]))
            return scan(x, dt, A, B, C, **options)

        monkeypatch.setattr(ssd_mixer, "ssd_chunk_scan", watched)
        logits = logits_of(loaded, tokens(2, 9))
        assert logits.dtype == torch.bfloat16
        layers = [layer.ssd for layer in model.model.layers if layer.is_ssd]
        for (x_dtype, dt_dtype, A, rotary), layer in zip(seen, layers, strict=True):
            assert (x_dtype, dt_dtype) == (torch.bfloat16, torch.float32)
            assert torch.equal(A, -layer.A_log.exp())  # not a bit lost
            assert rotary is None or {table.dtype for table in rotary} == {torch.float32}

    def test_a_bfloat16_model_speaks_like_the_float32_one(self, variant, tmp_path):
        model = tiny_model(variant, dtype=torch.float32)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        ids = tokens(2, 9)
        assert (
            relative_error(logits_of(loaded, ids), logits_of(model, ids)) < 0.05
        )  # 2^-8 in each of some forty products
        generated = loaded.generate(ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(generated, loaded.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False))

    def test_a_model_built_in_bfloat16_keeps_them_too(self, variant):
        model = AutoModelForCausalLM.from_config(tiny_config(variant), dtype=torch.bfloat16)
        for name, weight in model.state_dict().items():
            assert weight.dtype == (torch.float32 if is_float32(name) else torch.bfloat16), name


def test_a_model_cast_to_bfloat16_still_computes_its_decays_in_float32(monkeypatch):
    """`.to(bfloat16)` rounds A_log and dt_bias, but what is computed from them isn't rounded again."""
    seen = []
    scan = ssd_mixer.ssd_chunk_scan

    def watched(x, dt, A, B, C, **options):
        seen.append((dt.dtype, A.dtype))
        return scan(x, dt, A, B, C, **options)

    monkeypatch.setattr(ssd_mixer, "ssd_chunk_scan", watched)
    logits_of(tiny_model(dtype=torch.bfloat16), tokens(1, 5))
    assert set(seen) == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_what_is_kept_in_float32_and_never_split_is_there(variant):
    model = tiny_model(variant)
    types = {type(module).__name__ for module in model.modules()}
    assert model._no_split_modules <= types
    kept = model._keep_in_fp32_modules_strict
    classes = {"dynamics": "TransXSSMDynamics", "rotation": "TransXSSMSelectiveRotation"}
    assert kept == {name for name, module in classes.items() if module in types}
    names = {name for name, _ in model.named_parameters()}
    assert {name for name in names if kept & set(name.split("."))} == {name for name in names if is_float32(name)}


def test_per_head_parameters_are_an_ssd_layers_own_in_checkpoints(tmp_path):
    """A checkpoint has the names that it has always had, and `load_state_dict`, which Trainer resumes with, takes them too."""
    model = tiny_model("mamba2", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    layer = {name.rsplit(".", 1)[-1] for name in saved if name.startswith("model.layers.0.ssd.")}
    assert layer == {"A_log", "dt_bias", "D", "conv_weight", "weight"}
    assert {name for name in saved if name.endswith(FLOAT32_NAMES)} == {
        f"model.layers.{index}.ssd.{name}" for index in (0, 2) for name in FLOAT32_NAMES
    }
    other = TransXSSMForCausalLM(model.config)
    report = other.load_state_dict(saved, strict=False)
    assert report.missing_keys == ["lm_head.weight"]
    assert report.unexpected_keys == []
    for name, weight in other.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    other.load_state_dict(model.state_dict())


def softplus(dt_bias: Tensor) -> Tensor:
    return F.softplus(dt_bias.double())


def assert_initialised(model: nn.Module, config: TransXSSMConfig) -> None:
    """Every parameter is real and finite, and has the distribution that its kind is given."""
    for name, weight in model.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        assert weight.device.type == "cpu", name
        assert weight.isfinite().all(), name
        if kind == "A_log":
            rates = weight.exp()
            assert (rates >= config.ssd_A_min * (1 - 1e-6)).all(), name
            assert (rates <= config.ssd_A_max * (1 + 1e-6)).all(), name
        elif kind == "dt_bias":
            assert (softplus(weight) >= config.ssd_dt_min * (1 - 1e-4)).all(), name
            assert (softplus(weight) <= config.ssd_dt_max * (1 + 1e-4)).all(), name
        elif kind == "down_weight":
            assert weight.std().item() == pytest.approx(len(weight) ** -0.5, rel=0.2), name
        elif ".rotation." in name:  # φ = 1, which is fixed RoPE
            started = torch.zeros_like(weight)
            started[:, -1] = 1 if kind == "conv_weight" else 0
            assert torch.equal(weight, started), name
        elif kind in ("D", "B_bias", "C_bias") or "norm" in name:
            assert (weight == 1).all(), name
        elif kind == "conv_weight":
            bound = config.ssd_conv_kernel_size**-0.5
            assert weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
        else:
            assert weight.std().item() == pytest.approx(config.initializer_range, rel=0.2), name


INITIALISED = {"initializer_range": 0.02, "hidden_size": 64, "num_attention_heads": 8}


@pytest.mark.parametrize("variant", ALL_VARIANTS)
class TestInitialisation:
    def test_of_a_new_model(self, variant):
        config = tiny_config(variant, **INITIALISED)
        assert_initialised(TransXSSMForCausalLM(config), config)

    def test_through_the_meta_device(self, variant, tmp_path):
        """`from_pretrained` lays a model out on meta; with every key missing, each parameter must be drawn afresh."""
        config = tiny_config(variant, **INITIALISED)
        TransXSSMForCausalLM(config).save_pretrained(tmp_path)
        assert edit_checkpoint(tmp_path, remove="")
        save_file({"unrelated": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
        assert_initialised(AutoModelForCausalLM.from_pretrained(tmp_path), config)

    def test_leaves_nothing_on_the_meta_device_after_loading(self, variant, tmp_path):
        TransXSSMForCausalLM(tiny_config(variant)).save_pretrained(tmp_path)
        with torch.device("meta"):
            laid_out = TransXSSMForCausalLM(tiny_config(variant))
        assert {weight.device.type for weight in laid_out.parameters()} == {"meta"}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
        assert logits_of(loaded.eval(), tokens(1, 5)).isfinite().all()


def test_rates_and_steps_are_spread_over_their_whole_range():
    config = tiny_config(hidden_size=1024, num_attention_heads=256, vocab_size=8, intermediate_size=8)
    ssd = TransXSSMForCausalLM(config).model.layers[0].ssd
    rates, steps = ssd.A_log.exp(), softplus(ssd.dt_bias).log10()
    assert rates.mean().item() == pytest.approx(8.5, abs=1)  # uniform in [1, 16]
    assert steps.mean().item() == pytest.approx(-2, abs=0.15)  # log-uniform in [1e-3, 1e-1]
    for spread, low, high in ((rates, 1, 16), (steps, -3, -1)):
        assert spread.min() < low + 0.1 * (high - low)
        assert spread.max() > high - 0.1 * (high - low)


@pytest.mark.parametrize(
    ("variant", "missing"),
    [
        *(("mamba2", name) for name in ("ssd.A_log", "ssd.dt_bias", "ssd.D", "ssd.conv_weight", "mlp.up_proj.weight")),
        *(("normed", name) for name in ("ssd.B_norm.weight", "ssd.C_bias", "self_attn.k_norm.weight")),
        *(("gated", name) for name in ("ssd.z_proj.weight", "ssd.norm.weight")),
        *(("selective", name) for name in ("rotation.down_weight", "rotation.conv_weight")),
    ],
)
def test_a_missing_key_is_initialised_and_the_others_stay(variant, missing, tmp_path):
    config = tiny_config(variant, **INITIALISED)
    TransXSSMForCausalLM(config).save_pretrained(tmp_path)
    removed = edit_checkpoint(tmp_path, remove=missing)
    assert removed
    kept = load_file(tmp_path / "model.safetensors")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(map(name_in_checkpoints, report["missing_keys"])) == set(removed)
    assert_initialised(loaded, config)
    for name, weight in kept.items():
        assert torch.equal(saved_weights(loaded)[name], weight), name


def test_an_option_can_be_added_to_a_checkpoint(tmp_path):
    """What is given to a model that was trained without it starts as in a new model."""
    TransXSSMForCausalLM(tiny_config(**INITIALISED)).save_pretrained(tmp_path)
    options = ("ssd_skip", "ssd_norm_BC", "ssd_bias_BC", "ssd_output_gate", "qk_norm", "attention_output_gate")
    config = tiny_config(**INITIALISED, ssd_conv_kernel_size=4, **dict.fromkeys(options, True))
    assert_initialised(AutoModelForCausalLM.from_pretrained(tmp_path, config=config), config)


def test_a_classifier_starts_from_a_language_model(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier) is TransXSSMForSequenceClassification
    assert classifier.score.weight.shape == (3, 32)
    assert classifier.score.weight.std() > 0
    assert torch.equal(classifier.model.layers[0].ssd.A_log, model.model.layers[0].ssd.A_log)


def test_a_model_can_be_copied():
    """Trainers and averaging copy models; the frequencies are no buffer and must come along."""
    model, ids = tiny_model(), tokens(1, 5)
    assert_close(logits_of(copy.deepcopy(model), ids), logits_of(model, ids), torch.float64)
