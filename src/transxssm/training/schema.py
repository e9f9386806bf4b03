"""Reads, overrides and checks the YAML of recipes and studies. Every error is one line.

The contents of a document are described by a type, from `sections_of` or a dataclass, which pydantic checks. Scalars follow YAML 1.2, so
that `3e-4` is a number and `no` is a word, and duplicate keys are refused.
"""

import dataclasses
import enum
import functools
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict, is_typeddict  # pydantic takes typing's own from Python 3.12 on

from transxssm.wording import nearest, one_line

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
# A key that shares this fraction of its letters with one of its section is a typing error. Others may belong to another section.
_TYPING_ERROR = 0.85
# A list of names up to this length is shown as a whole. From a longer one only the nearest names are shown.
_MANY = 20
# Nothing is coerced: the string "1" is not a number, 1.5 is not a whole number and 1 is not a truth value, but a whole number is a float.
_CLOSED = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


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
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers  # quotes strings exactly if the loader needs it


for _tag, _pattern, _first in _SCALARS:
    # PyYAML looks up the rules for a scalar by its first character, which is "" for the empty scalar.
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)


def load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: the YAML is invalid. The message gives the line and the reason.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise ValueError(where + (getattr(error, "problem", None) or one_line(error))) from None


def dump_yaml(value: Any) -> str:
    """A YAML text that `load_yaml` reads as the same value. Keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def bundled(package: str) -> list[str]:
    """Names of the documents in a package's folder `recipes`."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in _folder(package).iterdir() if entry.name.endswith(".yaml")
    )


def read_document(kind: str, package: str, name_or_path: str, known: Iterable[str]) -> tuple[str, dict[str, Any]]:
    """The name and the unchecked sections of a bundled document or a YAML file.

    Args:
        kind: the kind of document, for messages.
        package: the package with the bundled documents.
        name_or_path: the name of a bundled document, or the path of a file.
        known: names of the sections, for messages.

    Raises:
        ValueError: there is no document of this name (the message names the nearest one), it cannot be read, or is not a YAML mapping.
    """
    names = bundled(package)
    path = Path(name_or_path).expanduser()
    if name_or_path in names:
        name, text = name_or_path, (_folder(package) / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    elif path.is_dir():
        raise ValueError(f"{kind} {name_or_path} is a folder: expected a YAML file, or one of {', '.join(names)}")
    else:
        try:
            name, text = path.stem, path.read_text(encoding="utf-8")
        except FileNotFoundError:
            hint = f"did you mean {close}? " if (close := nearest(name_or_path, names)) else ""
            raise ValueError(
                f"no {kind} {name_or_path!r}: {hint}Expected a YAML file, or one of {', '.join(names)}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{kind} {name_or_path} cannot be read as text: {one_line(error)}") from None
    try:
        sections = load_yaml(text)
    except ValueError as error:
        raise ValueError(f"{name_or_path}: {error}") from None
    sections = {} if sections is None else sections
    if not isinstance(sections, dict):
        raise ValueError(
            f"{name_or_path}: got {type(sections).__name__}, expected the sections of a {kind}, {', '.join(known)}"
        )
    return name, sections


def apply_override(override: str, sections: dict[str, Any]) -> None:
    """Applies an override `section.key=value` in place.

    Raises:
        ValueError: the override has another form, or names a key below a value that is not a mapping.
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


def sections_of(name: str, fields: Mapping[str, Any]) -> Any:
    """The type of a mapping with these keys and no others, all optional."""
    kind: Any = TypedDict(name, dict(fields), total=False)  # type: ignore[misc]
    return with_config(_CLOSED)(kind)


def fields_of(cls: type, **others: Any) -> dict[str, Any]:
    """The types of a dataclass's fields by name, with the choices of each. `others` replace them or are added."""
    hints = typing.get_type_hints(cls)
    fields = {
        field.name: words(hints[field.name], field.metadata.get("choices", ()))
        for field in dataclasses.fields(cls)
        if field.init
    }
    return fields | others


def words(kind: Any, choices: Iterable[str] = ()) -> Any:
    """The type `kind`, in which a string must be one of the choices, or a value of an enum in the type (`SomeEnum | str`)."""
    parts = typing.get_args(kind) if _is_union(kind) else (kind,)
    enums = [part for part in parts if isinstance(part, type) and issubclass(part, enum.Enum)]
    chosen = tuple(str(member.value) for part in enums for member in part) or tuple(choices)
    if not chosen:
        return kind
    return functools.reduce(
        lambda one, other: one | other, [typing.Literal[chosen], *(part for part in parts if part is not str)]
    )


def within(kind: Any, holds: Callable[[float], bool], expected: str) -> Any:
    """The type `kind`, of whose numbers only those that `holds` accepts; it must refuse what is not a number.

    Args:
        expected: description of the accepted values, for the message.
    """

    def check(value: Any) -> Any:
        if isinstance(value, int | float) and not holds(value):
            raise ValueError(expected)
        return value

    return typing.Annotated[kind, AfterValidator(check)]


def validated(schema: Any, sections: Mapping[str, Any], kind: str, *, also_known: Sequence[str] = ()) -> Any:
    """Validates sections with pydantic. Returns the mapping for a type from `sections_of`, or an instance of a dataclass.

    Args:
        schema: the type.
        sections: sections read from YAML.
        kind: the kind of document, for messages.
        also_known: further sections, for messages.

    Raises:
        ValueError: a section or key is unknown (the message names the nearest known one), a value has a wrong type or is out of its range
            (the message says what is expected), or a value is missing.
    """
    try:
        return _adapter(schema).validate_python(sections)
    except ValidationError as error:
        errors = error.errors()
    first = next((one for one in errors if one["type"] in _UNKNOWN), errors[0])
    path = [str(part) for part in first["loc"]]
    if first["type"] in _UNKNOWN:
        raise ValueError(_unknown(path, schema, also_known))
    if first["type"] in _MISSING:
        raise ValueError(f"a {kind} needs {'.'.join(path)}: it is missing")
    at, value, where = schema, sections, []
    for part in first["loc"]:
        inner = _inside(at, part)
        if inner is None:  # the rest names the member of a union that failed
            break
        at, value = inner, value[part]  # type: ignore[index]
        where.append(str(part))
    if first["type"] == "value_error":  # of `within`
        raise ValueError(f"{'.'.join(where)}: got {value}, expected {first['ctx']['error']}")
    raise ValueError(f"{'.'.join(where)}: got {_shown(value)}, expected {_expected(at)}")


_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_MISSING = ("missing", "missing_argument")


@functools.cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _unknown(path: list[str], schema: Any, also_known: Sequence[str]) -> str:
    *above, key = path
    owner = schema
    for part in above:
        owner = _inside(owner, part)
    known = [*_keys(owner), *(() if above else also_known)]
    what = f"unknown key {'.'.join(path)}" if above else f"unknown section {key!r}"
    all_known = {f"{section}.{name}": name for section, inner in _keys(schema).items() for name in _keys(inner)}
    elsewhere = [whole for whole, name in all_known.items() if above and name == key]
    if elsewhere and not nearest(key, known, least=_TYPING_ERROR):
        return f"{what}: did you mean {elsewhere[0]}?"
    if close := nearest(key, known):
        return f"{what}: did you mean {'.'.join([*above, close])}?"
    if len(known) <= _MANY:
        return f"{what}: expected one of {', '.join(known)}"
    return f"{what}: the nearest known one is {nearest('.'.join(path), all_known, least=0)}"


def _keys(kind: Any) -> dict[str, Any]:
    """The keys of a mapping type, with their types. Empty for other types."""
    kind = _bare(kind)
    if is_typeddict(kind):
        return typing.get_type_hints(kind, include_extras=True)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind) if not field.metadata.get("is_own")}
    return {}


def _inside(kind: Any, part: str | int) -> Any:
    """The type of the value under a key or an index, or None if it is not known."""
    kind = _bare(kind)
    if typing.get_origin(kind) is dict:
        return typing.get_args(kind)[1]
    if typing.get_origin(kind) is list and isinstance(part, int):
        return typing.get_args(kind)[0]
    return _keys(kind).get(str(part))


def _bare(kind: Any) -> Any:
    """The type without annotations, and without null if there is one other type."""
    if typing.get_origin(kind) is typing.Annotated:
        return _bare(typing.get_args(kind)[0])
    if _is_union(kind):
        others = [part for part in typing.get_args(kind) if part is not type(None)]
        return _bare(others[0]) if len(others) == 1 else kind
    return kind


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _expected(kind: Any) -> str:
    """Describes a type in words, by its choices if it has any."""
    if typing.get_origin(kind) is typing.Annotated:
        return _expected(typing.get_args(kind)[0])
    parts = typing.get_args(kind) if _is_union(kind) else (kind,)
    literals = [
        str(value) for part in parts if typing.get_origin(part) is typing.Literal for value in typing.get_args(part)
    ]
    return f"one of {', '.join(literals)}" if literals else " or ".join(map(_type_name, parts))


def _type_name(kind: Any) -> str:
    kind = kind if kind is type(None) else _bare(kind)
    if kind is type(None):
        return "null"
    if _keys(kind):
        return "keys with values"
    if typing.get_origin(kind) is list:
        return f"list[{_type_name(typing.get_args(kind)[0])}]"
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).removeprefix("typing.")


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def _folder(package: str) -> Any:
    return files(package) / "recipes"
