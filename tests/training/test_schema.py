import pytest

from transxssm.training.schema import dump_yaml, load_yaml


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
