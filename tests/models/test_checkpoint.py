"""A checkpoint folder is loaded as it was saved, or refused in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, T5Config

from tests.models.tiny import saved_weights
from tests.serving.checkpoints import byte_tokenizer, write_random_checkpoint
from transxssm.models import TransXSSMForCausalLM, load_causal_lm, load_model, load_tokenizer, read_config, read_device

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the caller looks at the words)
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refusal_of_weights(folder) -> str:
    return refusal(load_model, folder, dtype=None, device=CPU)


def test_weights_and_types_are_those_that_were_saved(folder):
    weights = load_file(folder / "model.safetensors")
    model = load_model(folder, dtype=None, device=CPU)
    assert not model.training
    saved = saved_weights(model)
    assert weights.keys() | {"lm_head.weight"} == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in weights.items())
    half = load_model(folder, dtype=torch.bfloat16, device=CPU)
    assert half.dtype == torch.bfloat16
    assert half.model.layers[0].ssd.A_log.dtype == torch.float32


def test_a_tokenizer_comes_with_it(folder):
    tokenizer = load_tokenizer(folder, read_config(folder))
    assert tokenizer("é")["input_ids"] == [256, 0xC3, 0xA9]


class TestNoModel:
    def test_no_folder(self, tmp_path):
        assert "found nothing there" in refusal(read_config, tmp_path / "absent")

    def test_a_file(self, folder):
        assert "found a file there" in refusal(read_config, folder / "config.json")

    def test_no_config(self, tmp_path):
        assert "config.json is missing; expected a run folder" in refusal(read_config, tmp_path)

    def test_an_unfinished_run_names_its_last_checkpoint(self, tmp_path):
        for step in (20, 100):
            (tmp_path / f"checkpoint-{step}").mkdir()
        words = refusal(read_config, tmp_path)
        assert "continue it with --resume" in words
        assert words.endswith("checkpoint-100")

    def test_a_config_cut_short(self, folder):
        path = folder / "config.json"
        path.write_text(path.read_text()[:40])
        assert "damaged, not JSON" in refusal(read_config, folder)

    @pytest.mark.parametrize("content", ['{"model_type": "llama"}', "{}", "[]"])
    def test_another_kind_of_model(self, folder, content):
        (folder / "config.json").write_text(content)
        assert "expected 'transxssm'" in refusal(read_config, folder)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads"),
            ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "cannot be rotated again"),
            ({"hidden_size": "wide"}, "hidden_size"),
        ],
    )
    def test_sizes_that_do_not_fit(self, folder, changes, words):
        edit_config(folder, **changes)
        assert words in refusal(read_config, folder)


class TestDamagedWeights:
    @pytest.mark.parametrize("kept", [0, 5, 100, -1])
    def test_cut_short(self, folder, kept):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        assert "model.safetensors is truncated or damaged" in refusal_of_weights(folder)

    def test_of_another_shape_than_the_config_says(self, folder):
        edit_config(folder, intermediate_size=40)
        words = refusal_of_weights(folder)
        assert f"the weights in {folder} do not fit its config.json" in words
        assert "mlp.down_proj.weight among them: got (" in words
        assert "report" not in words

    def test_of_more_layers_than_the_config_says(self, folder):
        layer_types = json.loads((folder / "config.json").read_text())["layer_types"]
        edit_config(folder, num_hidden_layers=1, layer_types=layer_types[:1])
        words = refusal_of_weights(folder)
        assert "it has no place for" in words
        assert "model.layers.1." in words

    def test_the_sizes_are_named(self, folder):
        path = folder / "model.safetensors"
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-7])
        assert f"got {size - 7} bytes, expected {size}" in refusal_of_weights(folder)

    def test_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        assert "cannot be loaded" in refusal_of_weights(folder)

    def test_a_weight_is_missing(self, folder):
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.0.ssd.dt_bias"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        assert "lacks 1 of the model's weights, model.layers.0.ssd.dt_bias" in refusal_of_weights(folder)


class TestTokenizer:
    def test_none(self, folder):
        for path in folder.glob("tokenizer*"):
            path.unlink()
        assert "no tokenizer in" in refusal(load_tokenizer, folder, read_config(folder))

    def test_damaged(self, folder):
        path = folder / "tokenizer.json"
        path.write_text(path.read_text()[:100])
        assert "no tokenizer in" in refusal(load_tokenizer, folder, read_config(folder))

    def test_of_another_model(self, folder):
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["one more"])
        tokenizer.save_pretrained(folder)
        words = refusal(load_tokenizer, folder, read_config(folder))
        assert "got token ids up to 258, expected less than vocab_size=258" in words


class TestDevice:
    def test_cpu(self):
        assert read_device("cpu") == CPU
        assert read_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")

    def test_unknown(self):
        assert refusal(read_device, "gpu").startswith("unknown device 'gpu': expected auto, cpu, cuda")

    @pytest.mark.parametrize("name", ["meta", "cuda:99", "mps", "xpu", "hpu", "mtia", "vulkan"])
    def test_not_on_this_machine(self, name):
        if torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == name:
            pytest.skip("this machine has one")
        words = refusal(read_device, name)
        assert words.startswith(f"device '{name}' cannot be used here: ")
        assert "expected cpu" in words
        assert len(words) < 160  # not torch's list of dispatch keys


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, **sizes))
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder, model


class TestOtherModels:
    def test_any_causal_language_model_is_loaded(self, llama):
        folder, model = llama
        loaded = load_causal_lm(folder, dtype=None, device=CPU)
        assert not loaded.training
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())

    def test_ours_is_loaded_as_ever(self, folder):
        assert isinstance(load_causal_lm(folder, dtype=None, device=CPU), TransXSSMForCausalLM)

    def test_weights_cut_short(self, llama, tmp_path):
        folder = shutil.copytree(llama[0], tmp_path / "llama")
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
        assert "is truncated or damaged" in refusal(load_causal_lm, folder, dtype=None, device=CPU)

    def test_a_masked_model_is_none(self, tmp_path):
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        BertForMaskedLM(BertConfig(vocab_size=258, **sizes)).save_pretrained(tmp_path)
        assert "'bert', a masked model: expected a causal" in refusal(load_causal_lm, tmp_path, dtype=None, device=CPU)

    def test_an_encoder_decoder_is_none(self, tmp_path):
        T5Config(vocab_size=258).save_pretrained(tmp_path)
        words = "'t5', an encoder-decoder model: expected a causal"
        assert words in refusal(load_causal_lm, tmp_path, dtype=None, device=CPU)

    @pytest.mark.parametrize(("kind", "words"), [("no-such-kind", "no-such-kind"), ("vit", "cannot be loaded")])
    def test_what_is_no_language_model(self, folder, kind, words):
        edit_config(folder, model_type=kind)
        assert words in refusal(load_causal_lm, folder, dtype=None, device=CPU)
