"""The YAML of recipes: version 1.2 scalars, so that `3e-4` is a number and `no` is a word, no key given twice, and known keys only.

An unknown key names the nearest known one.
"""

import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments

from transxssm.data import DataArguments
from transxssm.models import PRESETS, TransXSSMConfig
from transxssm.models.baselines import BASELINES

# PyYAML reads YAML 1.1, where `3e-4` is a string, `no` is false, `1:30` is 90 and `010` is 8. These are 1.2's rules, with
# underscores allowed in whole numbers (1_000_000).
_SCALARS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", ["t", "T", "f", "F"]),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


# Annotated as transformers' own command line takes it; its documentation and YAML say `fsdp: true`.
_WIDER_TYPES: dict[str, Any] = {"fsdp": bool | str | None}
# The values of model.architecture: this package's model, or one that it is compared with.
ARCHITECTURES = ("transxssm", *BASELINES)
# No coercion: "1" is no number, 1.5 no whole number, 1 no truth value. A whole number is a float all the same.
_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own form)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key_node.value!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers  # quotes a string exactly where the loader needs it


for _tag, _pattern, _first in _SCALARS:
    # PyYAML looks a scalar's rules up by its first character, those of the empty one under "".
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)


def load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: no valid YAML, with the line and what is wrong there.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise ValueError(where + (getattr(error, "problem", None) or " ".join(str(error).split()))) from None


def dump_yaml(value: Any) -> str:
    """A YAML text that `load_yaml` reads as the same value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


@dataclasses.dataclass(frozen=True)
class Range:
    """Which of the numbers of a type a setting may have; comparisons are written so that not-a-number is in no range."""

    holds: Callable[[float], bool]
    expected: str


_FROM_1 = Range(lambda n: 1 <= n < math.inf, "at least 1")
_FROM_0 = Range(lambda n: 0 <= n < math.inf, "0 or more")
_ABOVE_0 = Range(lambda n: 0 < n < math.inf, "more than 0")
_BELOW_1 = Range(lambda n: 0 <= n < 1, "at least 0 and less than 1")
_SEED = Range(lambda n: 0 <= n < 2**32, "at least 0 and less than 2**32")
_INTERVAL = Range(
    lambda n: 0 < n < 1 or (1 <= n < math.inf and n == int(n)),
    "a whole number of steps from 1 on, or a share of all steps between 0 and 1",
)
_WARMUP = Range(
    lambda n: 0 <= n < 1 or (1 <= n < math.inf and n == int(n)),
    "a whole number of steps from 0 on, or a share of all steps between 0 and 1",
)
_MAX_STEPS = Range(lambda n: n >= 1 or n == -1, "at least 1, or -1 to train for training.num_train_epochs")
# Of TrainingArguments' numbers, which takes nearly any and fails in the middle of a run, or does something else than it was told.
_TRAINING_RANGES = {
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


@dataclasses.dataclass(frozen=True)
class Field:
    """One key of a section: the type of its values and, where there is one, the closed list of its words."""

    type: Any
    choices: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """The choices or the type, for an error message."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        is_union = typing.get_origin(self.type) in (typing.Union, types.UnionType)
        return " or ".join(_type_name(part) for part in (typing.get_args(self.type) if is_union else (self.type,)))


def known_fields() -> dict[str, dict[str, Field]]:
    """Every key that a recipe may hold, by section."""
    config = {name: Field(kind) for name, kind in TransXSSMConfig.__annotations__.items()}
    return {
        "model": {
            "preset": Field(str | None, tuple(PRESETS)),
            "architecture": Field(str, ARCHITECTURES),
            "checkpoint": Field(str),
            **config,
        },
        "data": _dataclass_fields(DataArguments),
        "training": _dataclass_fields(TrainingArguments) | {"parallelism": Field(str | dict | None)},
        "fit": {"minutes": Field(float)},
    }


def check_sections(sections: Mapping[str, Any]) -> None:
    """Checks every key and value of a recipe.

    Raises:
        ValueError: an unknown section or key (with the nearest known one), a value of a wrong type (with the expected one), or a
            number of the training section that is out of its range.
    """
    fields = known_fields()
    for section, values in sections.items():
        if section not in fields:
            raise ValueError(f"unknown section {section!r}: {_nearest(str(section), fields)}")
        if not isinstance(values, Mapping):
            raise ValueError(f"{section}: got {_shown(values)}, expected keys with values")
        for key, value in values.items():
            if key not in fields[section]:
                raise ValueError(f"unknown key {section}.{key}: {_nearest_key(section, str(key), fields)}")
            _check_value(f"{section}.{key}", value, fields[section][key])
            if section == "training":
                _check_range(key, value)


def _check_value(name: str, value: Any, field: Field) -> None:
    try:
        TypeAdapter(field.type, config=_STRICT).validate_python(value)
        fits = not (field.choices and isinstance(value, str) and value not in field.choices)
    except ValidationError:
        fits = False
    if not fits:
        raise ValueError(f"{name}: got {_shown(value)}, expected {field.expected}")


def _check_range(key: str, value: Any) -> None:
    allowed = _TRAINING_RANGES.get(key)
    if allowed is not None and isinstance(value, (int, float)) and not allowed.holds(value):
        raise ValueError(f"training.{key}: got {value}, expected {allowed.expected}")


def _dataclass_fields(cls: type) -> dict[str, Field]:
    hints = typing.get_type_hints(cls)
    return {
        field.name: Field(
            _WIDER_TYPES.get(field.name, hints[field.name]),
            _choices(hints[field.name], field.metadata.get("choices", ())),
        )
        for field in dataclasses.fields(cls)
        if field.init
    }


def _choices(kind: Any, declared: Iterable[str]) -> tuple[str, ...]:
    # A field of words is typed `SomeEnum | str`: the words are the enum's.
    for part in typing.get_args(kind):
        if isinstance(part, type) and issubclass(part, enum.Enum):
            return tuple(str(member.value) for member in part)
    return tuple(declared)


def _nearest_key(section: str, key: str, fields: Mapping[str, Mapping[str, Field]]) -> str:
    elsewhere = [f"{other}.{key}" for other in fields if key in fields[other]]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    close = difflib.get_close_matches(key, fields[section], n=1)
    if close:
        return f"did you mean {section}.{close[0]}?"
    return _nearest(f"{section}.{key}", [f"{other}.{name}" for other in fields for name in fields[other]])


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    best = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    return f"the nearest known one is {best}" if len(known) > 4 else f"expected one of {', '.join(known)}"


def _type_name(kind: Any) -> str:
    if kind is type(None):
        return "null"
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).removeprefix("typing.")


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value!r} ({type(value).__name__})"
