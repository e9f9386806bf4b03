"""A recipe: the YAML that describes a run in the sections `model`, `data` and `training`, and `fit` for one that sizes itself."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, TrainingArguments

from transxssm.data import DataArguments
from transxssm.machine import has_accelerator, has_fast_bfloat16
from transxssm.models import TransXSSMConfig
from transxssm.models.baselines import BASELINES
from transxssm.models.checkpoint import read_config
from transxssm.training.schema import ARCHITECTURES, check_sections, dump_yaml, load_yaml
from transxssm.training.sharding import Parallelism

# What a silent recipe means: the optimiser and the schedule of the paper's Appendix B.1, and ten evaluations and checkpoints.
TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 3e-4,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "weight_decay": 0.01,
    "warmup_steps": 0.1,  # of all steps
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
    "ddp_find_unused_parameters": False,  # every parameter has a part in every step
}
HELD_OUT_METRICS = ("loss", "perplexity", "bits_per_byte")  # less is better
# Kwargs of the default schedule; another lr_scheduler_type would choke on them.
COSINE_TO_A_TENTH = {"min_lr_rate": 0.1}
# Settings that the run's own parts stand on, and why they may not be changed.
FIXED_TRAINING = {
    "logging_nan_inf_filter": (False, "a loss that is not finite must stop the run, not be averaged away"),
    "include_num_input_tokens_seen": ("all", "metrics and summary count tokens with it"),
    "resume_from_checkpoint": (None, "resume the whole run folder instead (--resume)"),
    "save_only_model": (False, "a run resumes from the optimiser's state too"),
    "label_smoothing_factor": (0.0, "the loss is computed without the logits it needs"),
}
# What a recipe with a `fit` section has chosen for it where it is silent.
FITTED = (
    "model.preset",
    "data.vocab_size",
    "data.sequence_length",
    "data.held_out_fraction",
    "data.max_bytes",
    "training.max_steps",
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe with the defaults of data and training filled in, precision and device included.

    Args:
        name: of the file it came from, without suffix.
        model: an optional `preset`, fields of `TransXSSMConfig`, and an optional `architecture`: "transxssm", or a baseline
            ("llama", "mamba2", "jamba"), which then gets the parameters of the TransXSSM that the other keys describe. Or `checkpoint`
            alone, the folder of a TransXSSM whose weights and tokenizer training goes on from.
        data: where text comes from and how it is cut into rows.
        training: fields of `transformers.TrainingArguments`, verbatim.
        fit: `minutes` that the run may take on this machine; empty: nothing is fitted.
        open_settings: names (`section.key`) of what is chosen for the text and the machine when the run begins.
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
        """Where training begins; None begins with new weights."""
        folder = self.model.get("checkpoint")
        return None if folder is None else Path(folder).expanduser()

    def model_config(self, **defaults: Any) -> TransXSSMConfig:
        """The TransXSSM that the model section describes; `defaults` hold where the recipe is silent.

        Raises:
            ValueError: sizes that do not fit each other, an unknown preset, a checkpoint that cannot be read.
        """
        if self.checkpoint is not None:
            return read_config(self.checkpoint)
        fields = {**defaults, **self.model}
        preset, _ = fields.pop("preset", None), fields.pop("architecture", None)
        try:
            return TransXSSMConfig(**fields) if preset is None else TransXSSMConfig.from_preset(preset, **fields)
        except Exception as error:  # a strict dataclass raises its own kinds, with the reason as their cause
            raise ValueError(f"model: {_one_line(error.__cause__ or error)}") from error

    def language_model_config(self, **defaults: Any) -> PreTrainedConfig:
        """The configuration of what is trained: `model_config`, or the baseline `architecture` with as many parameters.

        Raises:
            ValueError: see `model_config`; no baseline comes close enough to its parameters.
        """
        config, architecture = self.model_config(**defaults), self.model.get("architecture", ARCHITECTURES[0])
        if architecture not in BASELINES:
            return config
        try:
            return BASELINES[architecture](config)
        except ValueError as error:
            raise ValueError(f"model: {_one_line(error)}") from error

    def training_arguments(self) -> TrainingArguments:
        """The arguments of the Trainer. Building them chooses the device and joins the other processes, if there are any.

        Raises:
            ValueError: settings that contradict each other or this machine.
        """
        settings = {name: value for name, (value, _) in FIXED_TRAINING.items()}
        settings |= {"disable_tqdm": True}  # the run shows its own progress
        metric = self.training.get("metric_for_best_model")
        if metric is not None:
            if str(metric).removeprefix("eval_") not in HELD_OUT_METRICS:
                raise ValueError(
                    f"training.metric_for_best_model: got {metric!r}, expected one of {', '.join(HELD_OUT_METRICS)}"
                )
            settings |= {"greater_is_better": False}  # transformers would think so of all but a loss
        try:
            given = {name: value for name, value in self.training.items() if name != "parallelism"}
            arguments = TrainingArguments(**(settings | deepcopy(given)))
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise ValueError(f"training: {_one_line(error)}") from error
        arguments.processes_of_a_row = self.parallelism.sharing
        return arguments

    def check_processes(self, processes: int, *, uses_accelerate_fsdp: bool | None = None) -> None:
        """Checks that so many processes can share the run as `training.parallelism` says.

        Args:
            uses_accelerate_fsdp: accelerate shards. Defaults to whether `training.fsdp` says so.

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
        """The recipe with those of the values, by their names, that it leaves open."""
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
        """The recipe with nothing left to choose."""
        return dataclasses.replace(self, open_settings=frozenset())

    def to_dict(self) -> dict[str, Any]:
        """The sections as plain values; `load_recipe` reads them back from `to_yaml()`."""
        sections = {"model": self.model, "data": dataclasses.asdict(self.data), "training": self.training}
        return {"fit": self.fit, **sections} if self.fit else sections

    def to_yaml(self) -> str:
        """The text of a file that `load_recipe` reads as the same recipe."""
        return dump_yaml(self.to_dict())


def bundled_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _bundle().iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, applies overrides and fills in the defaults.

    Args:
        name_or_path: the name of a bundled recipe, or the path of a YAML file.
        overrides: `section.key=value` each, the value in YAML; a deeper key (`training.lr_scheduler_kwargs.min_lr_rate=0.2`) sets
            one entry of a mapping.

    Raises:
        ValueError: no such recipe (with the bundled ones), no valid YAML, an unknown section or key (with the nearest known
            one), a value of a wrong type or out of its range, a model that cannot be built. Always one line.
    """
    name, text = _read(str(name_or_path))
    try:
        sections = load_yaml(text)
    except ValueError as error:
        raise ValueError(f"{name_or_path}: {error}") from None
    sections = {} if sections is None else sections
    if not isinstance(sections, dict):
        raise ValueError(
            f"{name_or_path}: got {type(sections).__name__}, expected the sections model, data, training and fit"
        )
    sections = {section: {} if values is None else values for section, values in sections.items()}
    check_sections(sections)
    for override in overrides:
        apply_override(override, sections)
    return recipe_of(name, sections)


def recipe_of(name: str, sections: Mapping[str, Any]) -> Recipe:
    """The recipe of sections that are there already, checked and with the defaults filled in.

    Args:
        name: of the recipe; its run folder is runs/<name> where the sections name none.
        sections: `model`, `data`, `training` and `fit`, each optional.

    Raises:
        ValueError: as `load_recipe`.
    """
    check_sections(sections)
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
    # What decides the same in another way.
    instead = {
        "model.preset": "model.hidden_size",
        "data.max_bytes": "data.max_documents",
        "data.held_out_fraction": "data.validation",
        "training.max_steps": "training.num_train_epochs",
    }
    return frozenset(name for name in FITTED if name not in given and instead.get(name) not in given)


def _read(name_or_path: str) -> tuple[str, str]:
    if name_or_path in bundled_recipes():
        return name_or_path, (_bundle() / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    path = Path(name_or_path).expanduser()
    bundled = ", ".join(bundled_recipes())
    if path.is_dir():
        raise ValueError(f"recipe {name_or_path} is a folder: expected a YAML file, or one of {bundled}")
    try:
        return path.stem, path.read_text(encoding="utf-8")
    except FileNotFoundError:
        close = difflib.get_close_matches(name_or_path, bundled_recipes(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"no recipe {name_or_path!r}: {hint}Expected a YAML file, or one of {bundled}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {name_or_path} cannot be read as text: {_one_line(error)}") from None


def apply_override(override: str, sections: dict[str, Any]) -> None:
    """Sets what an override `section.key=value` says, in place.

    Raises:
        ValueError: it has another form, or a key below something that has none.
    """
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ValueError(f"override {override!r}: expected section.key=value, for example training.max_steps=100")
    try:
        value = load_yaml(text)
    except ValueError as error:
        raise ValueError(f"override {override!r}: {error}") from None
    target: Any = sections
    for depth, key in enumerate(keys[:-1], start=1):
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise ValueError(f"override {override!r}: {'.'.join(keys[:depth])} is {target!r}, which has no keys")
    target[keys[-1]] = value


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


def _bundle() -> Any:
    return files("transxssm") / "recipes"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
