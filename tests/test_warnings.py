"""pytest's own settings: a warning out of our code fails the test it happens in, one inside a library does not."""

import warnings

import pytest


def warn_as(module: str) -> None:
    exec("import warnings; warnings.warn('old', DeprecationWarning)", {"__name__": module})


@pytest.mark.parametrize("module", ["transxssm", "transxssm.ops.rotary", "tests.ops.test_rotary"])
def test_a_warning_in_our_code_is_an_error(module):
    with pytest.raises(DeprecationWarning):
        warn_as(module)


@pytest.mark.parametrize("module", ["torch.nn.functional", "transxssm_plugin"])
def test_a_warning_among_libraries_is_theirs(module):
    with warnings.catch_warnings(record=True) as caught:
        warn_as(module)
    assert [warning.category for warning in caught] == [DeprecationWarning]


def test_test_modules_carry_the_name_that_the_filters_match():
    assert __name__ == "tests.test_warnings"
