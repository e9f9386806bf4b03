from dataclasses import field

import pytest
from pydantic import ConfigDict, StrictFloat, StrictInt
from pydantic.dataclasses import dataclass

from transxssm.training.schema import dump_yaml, load_yaml, read_document, sections_of, validated, within, words


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("-1E8", -1e8),
        ("1.", 1.0),
        (".5", 0.5),
        ("1_000_000", 1_000_000),
        ("-7", -7),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("", None),
        ("~", None),
        ("''", ""),
        ("'3e-4'", "3e-4"),
        ("[1, 2.5, a]", [1, 2.5, "a"]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    assert load_yaml(text) == value
    assert type(load_yaml(text)) is type(value)


@pytest.mark.parametrize(
    "value", ["no", "3e-4", "1:30", "", "null", "true", 3e-4, 1e-8, 0, None, False, "a: b", [1, "2"]]
)
def test_what_is_written_reads_back_as_the_same(value):
    assert load_yaml(dump_yaml({"key": value})) == {"key": value}


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: 1\na: 2", 2, "'a' is given twice"),
        ("a: 1\nb: [1", 2, "expected ',' or ']'"),
        ("a: b: c", 1, "mapping values are not allowed"),
        ("a: !!python/object/apply:os.getcwd []", 1, "could not determine a constructor"),
    ],
)
def test_bad_yaml_says_line_and_reason(text, line, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        load_yaml(text)
    assert f"line {line}:" in str(caught.value)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Planet:
    mass: StrictFloat
    moons: list[StrictInt] = field(default_factory=list)


SYSTEM = sections_of(
    "system",
    {
        "planets": dict[str, Planet],
        "star": sections_of(
            "star", {"age": within(float, lambda n: n > 0, "more than 0"), "kind": words(str | None, ["red", "white"])}
        ),
    },
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plants: {}", "unknown section 'plants': did you mean planets?"),
        ("xyz: {}", "unknown section 'xyz': expected one of planets, star"),
        ("star: {agge: 1.0}", "unknown key star.agge: did you mean star.age?"),
        ("star: {planet: 1.0}", "unknown key star.planet: expected one of age, kind"),
        ("star: {age: old}", "star.age: got 'old' (str), expected float"),
        ("star: {age: true}", "star.age: got True (bool), expected float"),
        ("star: {age: -1}", "star.age: got -1, expected more than 0"),
        ("star: {age: .nan}", "star.age: got nan, expected more than 0"),
        ("star: {kind: blue}", "star.kind: got 'blue' (str), expected one of red, white"),
        ("star: red", "star: got 'red' (str), expected keys with values"),
        ("planets: {a: {}}", "a system needs planets.a.mass: it is missing"),
        ("planets: {a: {mass: 1.0, moon: []}}", "unknown key planets.a.moon: did you mean planets.a.moons?"),
        ("planets: {a: {mass: 1.0, moons: [1, two]}}", "planets.a.moons.1: got 'two' (str), expected int"),
        ("planets: {a: {mass: 1.0, moons: 3}}", "planets.a.moons: got 3 (int), expected list[int]"),
        # What is unknown goes before what is wrong or missing: it often is what is meant.
        ("planets: {a: {maas: 1.0}}", "unknown key planets.a.maas: did you mean planets.a.mass?"),
    ],
)
def test_what_is_wrong_is_one_line_with_what_was_expected(text, message):
    with pytest.raises(ValueError, match=r".") as refused:
        validated(SYSTEM, load_yaml(text), "system")
    assert str(refused.value) == message


def test_what_is_right_is_given_back_unchanged():
    sections = load_yaml("planets: {a: {mass: 1, moons: [2]}}\nstar: {age: 3, kind: null}")
    assert validated(SYSTEM, sections, "system") == {
        "planets": {"a": Planet(1.0, [2])},
        "star": {"age": 3, "kind": None},
    }


def test_a_document_is_read_by_its_name_or_path(tmp_path):
    assert read_document("recipe", "transxssm", "tiny", ["model"])[0] == "tiny"
    (tmp_path / "own.yaml").write_text("a: 1")
    assert read_document("recipe", "transxssm", str(tmp_path / "own.yaml"), ["model"]) == ("own", {"a": 1})
    with pytest.raises(ValueError, match=r"no recipe 'tinny': did you mean tiny\? Expected a YAML file, or one of"):
        read_document("recipe", "transxssm", "tinny", ["model"])
