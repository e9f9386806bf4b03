import pytest

from transxssm.data import DataArguments


@pytest.mark.parametrize(
    ("fields", "got", "advice"),
    [
        ({"corpus": ""}, "''", "leave it out"),
        ({"tokenizer": ""}, "''", "leave it out"),
        ({"held_out_fraction": 0.0}, "0.0", "between 0 and 1"),
        ({"held_out_fraction": 1.0}, "1.0", "between 0 and 1"),
        ({"held_out_fraction": float("nan")}, "nan", "between 0 and 1"),
        ({"max_documents": 1}, "got 1", "at least 2"),
        ({"vocab_size": 257}, "257", "at least 258"),
        ({"sequence_length": 0}, "got 0", "at least 2"),
        ({"sequence_length": 1}, "got 1", "at least 2"),
        ({"seed": -1}, "-1", "negative"),
    ],
)
def test_values_out_of_range_are_refused(fields, got, advice):
    with pytest.raises(ValueError, match=f"data.{next(iter(fields))}") as refusal:
        DataArguments(**fields)
    assert got in str(refusal.value)
    assert advice in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_vocabulary_of_another_tokenizer_is_its_own_matter():
    assert DataArguments(tokenizer="bytes", vocab_size=0).tokenizer == "bytes"


def test_the_smallest_values_are_accepted():
    DataArguments(vocab_size=258, sequence_length=2, max_documents=2, seed=0)
