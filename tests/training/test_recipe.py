import dataclasses

import pytest
from transformers import TrainingArguments

from transxssm.models.baselines import count_baseline_parameters
from transxssm.training import bundled_recipes, load_recipe
from transxssm.training import recipe as recipe_module
from transxssm.training.recipe import TRAINING_RANGES


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.learning_rat=1e-3", ["training.learning_rat", "training.learning_rate"]),
        ("training.sequence_length=64", ["training.sequence_length", "data.sequence_length"]),
        ("model.num_layers=4", ["model.num_layers", "model.num_hidden_layers"]),
        ("trainin.max_steps=3", ["'trainin'", "training"]),
        ("training.learning_rate=abc", ["training.learning_rate", "got 'abc' (str)", "expected float"]),
        ("training.learning_rate=true", ["got True (bool)", "expected float"]),
        ("training.max_steps=2.5", ["training.max_steps", "got 2.5 (float)", "expected int"]),
        ("training.max_steps='3'", ["got '3' (str)", "expected int"]),
        ("training.bf16=1", ["got 1 (int)", "expected bool"]),
        ("data.sequence_length=1.5", ["data.sequence_length", "got 1.5 (float)", "expected int"]),
        ("data.sequence_length=0", ["data", "sequence_length", "0"]),
        ("data.seed=-1", ["data.seed", "-1"]),
        ("training.eval_strategy=stps", ["got 'stps'", "no, steps, epoch"]),
        ("training.ddp_backend=glo", ["got 'glo'", "gloo"]),
        ("model.preset=huge", ["got 'huge'", "tiny, small, 320m, 1.3b"]),
        ("model.num_attention_heads=3", ["num_attention_heads", "got 64 and 3"]),
        ("model.ssd_state_size=48", ["ssd_state_size", "got 48 and 32"]),
        ("model.rope_parameters={rope_type: dynamic, rope_theta: 1e4}", ["dynamic"]),
        ("model.hidden_size=wide", ["model.hidden_size", "got 'wide' (str)", "expected int"]),
        ("max_steps=3", ["max_steps=3", "section.key=value"]),
        ("training.max_steps", ["section.key=value"]),
        ("training.max_steps.x=3", ["training.max_steps is 20"]),
        ("training.optim_args=[1", ["training.optim_args=[1", "expected"]),
        ("training.max_steps=0", ["training.max_steps", "got 0", "at least 1"]),
        ("training.save_only_model=true", ["save_only_model", "must stay False"]),
        ("training.logging_nan_inf_filter=true", ["logging_nan_inf_filter", "must stay False"]),
    ],
)
def test_a_bad_override_is_one_line_that_says_what_and_what_instead(recipe, override, parts):
    with pytest.raises(ValueError, match=r".") as caught:
        recipe(override)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_settings_that_contradict_each_other_are_one_line(recipe):
    with pytest.raises(ValueError, match=r"training: .*requires the save and eval strategy to match") as caught:
        recipe("training.load_best_model_at_end=true", "training.save_strategy=epoch").training_arguments()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("metric", ["loss", "eval_perplexity", "bits_per_byte"])
def test_the_best_model_may_be_chosen_by(recipe, metric):
    arguments = recipe(f"training.metric_for_best_model={metric}").training_arguments()
    assert arguments.metric_for_best_model == metric
    assert arguments.greater_is_better is False


def test_a_metric_that_is_not_measured_is_refused_before_training(recipe):
    with pytest.raises(ValueError, match="got 'accuracy', expected one of loss, perplexity, bits_per_byte"):
        recipe("training.metric_for_best_model=accuracy").training_arguments()


def test_a_missing_recipe_names_the_bundled_ones():
    with pytest.raises(ValueError, match="did you mean tiny") as caught:
        load_recipe("tinny")
    assert all(name in str(caught.value) for name in bundled_recipes())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xd0\xff", "cannot be read as text"),
        (b"model: [1", "line 1"),
        (b"- model", "expected the sections"),
        (b"model: tiny", "model: got 'tiny'"),
        (b"model: {preset: tiny}\nmodel: {preset: small}", "given twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path, content, reason):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipes_load_and_build_their_arguments(name):
    recipe = load_recipe(name)
    assert recipe.output_dir.as_posix() == f"runs/{name}"
    has_length = {"max_steps", "num_train_epochs"} & recipe.training.keys()
    assert has_length or "training.max_steps" in recipe.open_settings
    recipe.training_arguments()


def test_recipes_of_table_4_hold_the_papers_figures():
    for name, rate, hidden, tokens in (("table4-320m", 3e-4, 768, 2**20), ("table4-1.3b", 2e-4, 2048, 2**21)):
        recipe = load_recipe(name)
        training, config = recipe.training, recipe.model_config()
        rows = 8 * training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
        assert (training["learning_rate"], config.hidden_size, config.ssd_chunk_size) == (rate, hidden, 256)
        assert rows * recipe.data.sequence_length == tokens


def test_a_silent_recipe_trains_as_appendix_b_1_says(tmp_path):
    path = tmp_path / "silent.yaml"
    path.write_text("model: {preset: tiny}\ndata:\ntraining: {use_cpu: true, max_steps: 1000}\n", encoding="utf-8")
    arguments = load_recipe(path).training_arguments()
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.weight_decay) == (0.9, 0.999, 0.01)
    assert arguments.get_warmup_steps(1000) == 100
    assert arguments.lr_scheduler_type == "cosine_with_min_lr"
    assert arguments.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert arguments.max_grad_norm == 1.0
    assert arguments.output_dir == "runs/silent"
    assert arguments.logging_nan_inf_filter is False


def test_another_schedule_comes_without_the_default_ones_settings(recipe):
    assert recipe("training.lr_scheduler_type=linear").training_arguments().lr_scheduler_kwargs is None


def test_overrides_reach_into_mappings_and_take_yaml_values(recipe):
    training = recipe("training.lr_scheduler_kwargs.min_lr_rate=0.2", "training.learning_rate=3e-4").training
    assert training["lr_scheduler_kwargs"] == {"min_lr_rate": 0.2}
    assert training["learning_rate"] == 3e-4


def test_a_resolved_recipe_loads_as_the_same_recipe(recipe, tmp_path):
    resolved = recipe("model.ssd_skip=true", "data.vocab_size=300")
    path = tmp_path / "resolved.yaml"
    path.write_text(resolved.to_yaml(), encoding="utf-8")
    assert load_recipe(path).to_dict() == resolved.to_dict()


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_follows_the_hardware_unless_told(recipe_file, monkeypatch, fast):
    text = recipe_file.read_text().replace("  bf16: false\n", "")
    recipe_file.write_text(text)
    monkeypatch.setattr(recipe_module, "has_fast_bfloat16", lambda: fast)
    assert load_recipe(recipe_file).training["bf16"] is fast
    assert load_recipe(recipe_file, [f"training.bf16={'false' if fast else 'true'}"]).training["bf16"] is not fast


@pytest.mark.parametrize("architecture", ["llama", "mamba2", "jamba"])
def test_a_recipe_may_name_a_baseline_of_the_same_size(architecture):
    own = load_recipe("tiny").language_model_config(vocab_size=512)
    baseline = load_recipe("tiny", [f"model.architecture={architecture}"]).language_model_config(vocab_size=512)
    assert own.model_type == "transxssm"
    assert baseline.model_type != "transxssm"
    assert count_baseline_parameters(baseline) == pytest.approx(count_baseline_parameters(own), rel=0.02)


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"model\.architecture: got 'lama'.* expected one of transxssm, llama, mamba2, jamba"
    ):
        load_recipe("tiny", ["model.architecture=lama"])


class TestRanges:
    """Numbers that TrainingArguments takes and a run would stumble over, or silently do something else with."""

    @pytest.mark.parametrize(
        "setting",
        [
            *("max_steps=-5", "max_steps=0", "num_train_epochs=0.0", "learning_rate=-1.0", "learning_rate=.nan", "learning_rate=.inf"),
            *("logging_steps=0", "eval_steps=-0.1", "save_steps=2.5", "warmup_steps=-1", "warmup_steps=1.5", "save_total_limit=-1"),
            *("weight_decay=-0.1", "adam_beta1=1.0", "adam_beta2=-0.1", "adam_epsilon=-1.0", "max_grad_norm=-1.0", "seed=-1"),
            *("per_device_train_batch_size=0", "per_device_eval_batch_size=0", "gradient_accumulation_steps=0", "data_seed=-1"),
            *("dataloader_num_workers=-1", "eval_accumulation_steps=0", "eval_delay=-1", "ddp_timeout=0"),
        ],
    )  # fmt: skip
    def test_out_of_them(self, setting):
        with pytest.raises(ValueError, match=rf"^training\.{setting.partition('=')[0]}: got .*, expected "):
            load_recipe("tiny", [f"training.{setting}"])

    @pytest.mark.parametrize(
        "setting",
        [
            *("max_steps=-1", "max_steps=1", "num_train_epochs=0.5", "learning_rate=0.0", "logging_steps=0.1", "logging_steps=7"),
            *("save_steps=0.5", "warmup_steps=0", "warmup_steps=0.1", "warmup_steps=100", "max_grad_norm=0.0", "eval_steps=null"),
        ],
    )  # fmt: skip
    def test_inside_them(self, setting):
        load_recipe("tiny", [f"training.{setting}"])

    def test_they_are_of_settings_that_exist(self):
        assert TRAINING_RANGES.keys() <= {field.name for field in dataclasses.fields(TrainingArguments)}
