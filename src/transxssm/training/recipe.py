"""A recipe: a YAML file that describes a run in the sections `model`, `data` and `training`, and `fit` to fit it into a time."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, TrainingArguments

from transxssm.data import DataArguments
from transxssm.machine import has_accelerator, has_fast_bfloat16
from transxssm.models import PRESETS, TransXSSMConfig
from transxssm.models.baselines import BASELINES
from transxssm.models.checkpoint import read_config
from transxssm.training.schema import (
    apply_override,
    bundled,
    dump_yaml,
    fields_of,
    read_document,
    sections_of,
    validated,
    within,
    words,
)
from transxssm.training.sharding import Parallelism
from transxssm.wording import one_line

SECTIONS = ("model", "data", "training", "fit")
# Defaults of a recipe: optimizer and schedule of the paper's Appendix B.1, and ten evaluations and checkpoints.
TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 3e-4,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "weight_decay": 0.01,
    "warmup_steps": 0.1,  # share of all steps
    "lr_scheduler_type": "cosine_with_min_lr",
    "max_grad_norm": 1.0,
    "seed": 0,
    "logging_steps": 10,
    "logging_first_step": True,
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,
    "report_to": "tensorboard",
    "ddp_find_unused_parameters": False,  # every step uses every parameter
}
HELD_OUT_METRICS = ("loss", "perplexity", "bits_per_byte")  # lower is better
# Keyword arguments of the default schedule. Other values of lr_scheduler_type do not take them.
COSINE_TO_A_TENTH = {"min_lr_rate": 0.1}
# Settings on which the training loop relies, and why they may not be changed.
FIXED_TRAINING = {
    "logging_nan_inf_filter": (False, "a loss that is not finite must stop the run, not be averaged away"),
    "include_num_input_tokens_seen": ("all", "metrics and summary count tokens with it"),
    "resume_from_checkpoint": (None, "resume the whole run folder instead (--resume)"),
    "save_only_model": (False, "a run resumes from the optimiser's state too"),
    "label_smoothing_factor": (0.0, "the loss is computed without the logits it needs"),
}
# Settings that are chosen for a recipe with a `fit` section if it leaves them open.
FITTED = (
    "model.preset",
    "data.vocab_size",
    "data.sequence_length",
    "data.held_out_fraction",
    "data.max_bytes",
    "training.max_steps",
)

# The values of model.architecture: this package's model, or a baseline.
ARCHITECTURES = ("transxssm", *BASELINES)
_FROM_1 = (lambda n: 1 <= n < math.inf, "at least 1")
_FROM_0 = (lambda n: 0 <= n < math.inf, "0 or more")
_ABOVE_0 = (lambda n: 0 < n < math.inf, "more than 0")
_BELOW_1 = (lambda n: 0 <= n < 1, "at least 0 and less than 1")
_SEED = (lambda n: 0 <= n < 2**32, "at least 0 and less than 2**32")
_INTERVAL = (
    lambda n: 0 < n < 1 or (1 <= n < math.inf and n == int(n)),
    "a whole number of steps from 1 on, or a share of all steps between 0 and 1",
)
_WARMUP = (
    lambda n: 0 <= n < 1 or (1 <= n < math.inf and n == int(n)),
    "a whole number of steps from 0 on, or a share of all steps between 0 and 1",
)
_MAX_STEPS = (lambda n: n >= 1 or n == -1, "at least 1, or -1 to train for training.num_train_epochs")
# Ranges of numbers in TrainingArguments, which accepts nearly any and then fails during a run or does something else.
TRAINING_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "max_steps": _MAX_STEPS,
    "num_train_epochs": _ABOVE_0,
    "per_device_train_batch_size": _FROM_1,
    "per_device_eval_batch_size": _FROM_1,
    "gradient_accumulation_steps": _FROM_1,
    "eval_accumulation_steps": _FROM_1,
    "torch_empty_cache_steps": _FROM_1,
    "learning_rate": _FROM_0,
    "warmup_steps": _WARMUP,
    "weight_decay": _FROM_0,
    "adam_beta1": _BELOW_1,
    "adam_beta2": _BELOW_1,
    "adam_epsilon": _FROM_0,
    "max_grad_norm": _FROM_0,
    "neftune_noise_alpha": _FROM_0,
    "logging_steps": _INTERVAL,
    "eval_steps": _INTERVAL,
    "save_steps": _INTERVAL,
    "eval_delay": _FROM_0,
    "save_total_limit": _FROM_0,
    "seed": _SEED,
    "data_seed": _SEED,
    "dataloader_num_workers": _FROM_0,
    "dataloader_prefetch_factor": _FROM_1,
    "ddp_bucket_cap_mb": _FROM_1,
    "ddp_timeout": _ABOVE_0,
}


@functools.cache
def recipe_schema() -> Any:
    """The type of a recipe: fields of `TransXSSMConfig`, `DataArguments` and `TrainingArguments`, and a few of its own."""
    training = fields_of(TrainingArguments, parallelism=str | dict | None)
    # Annotated as transformers' own command line takes it; its documentation and YAML say `fsdp: true`.
    training["fsdp"] = bool | str | None
    training |= {name: within(training[name], *allowed) for name, allowed in TRAINING_RANGES.items()}
    model = {"preset": words(str | None, PRESETS), "architecture": words(str, ARCHITECTURES), "checkpoint": str}
    return sections_of(
        "recipe",
        {
            "model": sections_of("model", model | TransXSSMConfig.__annotations__),
            "data": sections_of("data", fields_of(DataArguments)),
            "training": sections_of("training", training),
            "fit": sections_of("fit", {"minutes": float}),
        },
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe with the defaults of data and training filled in, precision and device included.

    Args:
        name: name of its file, without suffix.
        model: an optional `preset`, fields of `TransXSSMConfig`, and an optional `architecture`: "transxssm", or a baseline
            ("llama", "mamba2", "jamba"), which then gets the parameters of the TransXSSM that the other keys describe. Or `checkpoint`
            alone, the folder of a TransXSSM with whose weights and tokenizer training begins.
        data: the source of the text, and how it is packed into rows.
        training: fields of `transformers.TrainingArguments`, verbatim.
        fit: `minutes` that the run may take on this machine, or empty to fit nothing.
        open_settings: names (`section.key`) of settings that are chosen for the text and the machine when the run begins.
    """

    name: str
    model: dict[str, Any]
    data: DataArguments
    training: dict[str, Any]
    fit: dict[str, Any] = dataclasses.field(default_factory=dict)
    open_settings: frozenset[str] = frozenset()

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(self.training["output_dir"]).expanduser()

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint from which training begins, or None for new weights."""
        folder = self.model.get("checkpoint")
        return None if folder is None else Path(folder).expanduser()

    def model_config(self, **defaults: Any) -> TransXSSMConfig:
        """The TransXSSM that the model section describes. `defaults` apply to fields that it does not set.

        Raises:
            ValueError: sizes do not fit each other, the preset is unknown, or the checkpoint cannot be read.
        """
        if self.checkpoint is not None:
            return read_config(self.checkpoint)
        fields = {**defaults, **self.model}
        preset, _ = fields.pop("preset", None), fields.pop("architecture", None)
        try:
            return TransXSSMConfig(**fields) if preset is None else TransXSSMConfig.from_preset(preset, **fields)
        except Exception as error:  # a strict dataclass raises its own kinds, with the reason as their cause
            raise ValueError(f"model: {one_line(error.__cause__ or error)}") from error

    def language_model_config(self, **defaults: Any) -> PreTrainedConfig:
        """The configuration of the model that is trained: `model_config`, or the baseline `architecture` with as many parameters.

        Raises:
            ValueError: see `model_config`; or no baseline comes close enough to its number of parameters.
        """
        config, architecture = self.model_config(**defaults), self.model.get("architecture", ARCHITECTURES[0])
        if architecture not in BASELINES:
            return config
        try:
            return BASELINES[architecture](config)
        except ValueError as error:
            raise ValueError(f"model: {one_line(error)}") from error

    def training_arguments(self) -> TrainingArguments:
        """The arguments of the Trainer. Building them chooses the device and joins the other processes, if there are any.

        Raises:
            ValueError: settings contradict each other, or this machine does not support them.
        """
        settings = {name: value for name, (value, _) in FIXED_TRAINING.items()}
        settings |= {"disable_tqdm": True}  # the run shows its own progress
        metric = self.training.get("metric_for_best_model")
        if metric is not None:
            if str(metric).removeprefix("eval_") not in HELD_OUT_METRICS:
                raise ValueError(
                    f"training.metric_for_best_model: got {metric!r}, expected one of {', '.join(HELD_OUT_METRICS)}"
                )
            settings |= {"greater_is_better": False}  # transformers assumes the opposite for all metrics but a loss
        try:
            given = {name: value for name, value in self.training.items() if name != "parallelism"}
            arguments = TrainingArguments(**(settings | deepcopy(given)))
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise ValueError(f"training: {one_line(error)}") from error
        arguments.processes_of_a_row = self.parallelism.sharing
        return arguments

    def check_processes(self, processes: int, *, uses_accelerate_fsdp: bool | None = None) -> None:
        """Checks that so many processes can share the run as `training.parallelism` says.

        Args:
            uses_accelerate_fsdp: whether accelerate shards the model. Defaults to the setting `training.fsdp`.

        Raises:
            ValueError: see `Parallelism.check`.
        """
        is_own_model = self.model.get("architecture", ARCHITECTURES[0]) == ARCHITECTURES[0]
        self.parallelism.check(
            processes,
            self.data.sequence_length,
            config=self.model_config() if is_own_model else None,
            uses_accelerate_fsdp=bool(self.training.get("fsdp"))
            if uses_accelerate_fsdp is None
            else uses_accelerate_fsdp,
            compiles=bool(self.training.get("torch_compile")),
        )

    @property
    def parallelism(self) -> Parallelism:
        """How processes share the run."""
        return Parallelism.of(self.training.get("parallelism"))

    def with_choices(self, values: Mapping[str, Any]) -> "Recipe":
        """The recipe with those values, given by name, for settings that it leaves open."""
        sections: dict[str, dict[str, Any]] = {"model": {}, "data": {}, "training": {}}
        for name in self.open_settings & values.keys():
            section, key = name.split(".")
            sections[section][key] = values[name]
        return dataclasses.replace(
            self,
            model={**self.model, **sections["model"]},
            data=dataclasses.replace(self.data, **sections["data"]),
            training={**self.training, **sections["training"]},
        )

    def closed(self) -> "Recipe":
        """The recipe with no open settings."""
        return dataclasses.replace(self, open_settings=frozenset())

    def to_dict(self) -> dict[str, Any]:
        """The sections as plain values; `load_recipe` reads them back from `to_yaml()`."""
        sections = {"model": self.model, "data": dataclasses.asdict(self.data), "training": self.training}
        return {"fit": self.fit, **sections} if self.fit else sections

    def to_yaml(self) -> str:
        """The text of a file that `load_recipe` reads as the same recipe."""
        return dump_yaml(self.to_dict())


def bundled_recipes() -> list[str]:
    """Names of the recipes that the package contains."""
    return bundled("transxssm")


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, applies overrides and fills in the defaults.

    Args:
        name_or_path: the name of a bundled recipe, or the path of a YAML file.
        overrides: `section.key=value` each, the value in YAML; a deeper key (`training.lr_scheduler_kwargs.min_lr_rate=0.2`) sets
            one entry of a mapping.

    Raises:
        ValueError: there is no such recipe (the message lists the bundled ones), the YAML is invalid, a section or key is unknown (the
            message names the nearest known one), a value has a wrong type or is out of its range, or the model cannot be built. The
            message is one line.
    """
    name, sections = read_document("recipe", "transxssm", str(name_or_path), SECTIONS)
    sections = {section: {} if values is None else values for section, values in sections.items()}
    validated(recipe_schema(), sections, "recipe")
    for override in overrides:
        apply_override(override, sections)
    return recipe_of(name, sections)


def recipe_of(name: str, sections: Mapping[str, Any]) -> Recipe:
    """Makes a recipe from sections, with all checks and defaults.

    Args:
        name: name of the recipe. Its run folder defaults to runs/<name>.
        sections: `model`, `data`, `training` and `fit`, each optional.

    Raises:
        ValueError: as for `load_recipe`.
    """
    validated(recipe_schema(), sections, "recipe")
    model, data = sections.get("model", {}), dict(sections.get("data", {}))
    if "checkpoint" in model:
        if len(model) > 1:
            others = ", ".join(f"model.{key}" for key in model if key != "checkpoint")
            raise ValueError(f"model.checkpoint says what the model is: got {others} beside it; leave out either")
        data.setdefault("tokenizer", model["checkpoint"])
    recipe = Recipe(
        name=name,
        model=model,
        data=DataArguments(**data),
        training=_with_defaults(sections.get("training", {}), name),
        fit=_checked_fit(sections.get("fit", {})),
        open_settings=_open_settings(sections) if sections.get("fit") else frozenset(),
    )
    recipe.model_config()
    _ = recipe.parallelism
    return recipe


def _checked_fit(fit: dict[str, Any]) -> dict[str, Any]:
    if fit and not fit.get("minutes", 0) > 0:
        raise ValueError(f"fit.minutes: got {fit.get('minutes')}, expected the minutes that the run may take")
    return fit


def _open_settings(sections: Mapping[str, Any]) -> frozenset[str]:
    given = {f"{section}.{key}" for section, values in sections.items() for key in values}
    # Other settings that decide the same.
    instead = {
        "model.preset": "model.hidden_size",
        "data.max_bytes": "data.max_documents",
        "data.held_out_fraction": "data.validation",
        "training.max_steps": "training.num_train_epochs",
    }
    return frozenset(name for name in FITTED if name not in given and instead.get(name) not in given)


def _with_defaults(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    for key, (value, reason) in FIXED_TRAINING.items():
        if key in given and given[key] != value:
            raise ValueError(f"training.{key}: got {given[key]!r}, but it must stay {value!r}: {reason}")
    training = {**TRAINING_DEFAULTS, **given, "output_dir": given.get("output_dir") or f"runs/{name}"}
    if "lr_scheduler_type" not in given:
        training.setdefault("lr_scheduler_kwargs", dict(COSINE_TO_A_TENTH))
    training.setdefault("use_cpu", not has_accelerator())
    if not training.get("fp16"):
        training.setdefault("bf16", has_fast_bfloat16())
    return training
