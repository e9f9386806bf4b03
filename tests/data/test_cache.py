import pytest
from datasets import Features, Value

from transxssm.data import cache
from transxssm.data.cache import cache_folder, fingerprint, generated_dataset

FEATURES = Features({"number": Value("int32")})


@pytest.fixture
def generate(tmp_path):
    def make(generator, identity="identity", **arguments):
        return generated_dataset(
            generator,
            arguments,
            features=FEATURES,
            split="numbers",
            identity=identity,
            cache_dir=str(tmp_path),
            if_empty="no numbers",
        )

    return make


def count(to, calls):
    calls.append(to)
    return ({"number": number} for number in range(to))


def test_rows_are_generated_once(generate):
    calls = []
    first = generate(count, to=3, calls=calls)
    again = generate(count, to=3, calls=calls)
    assert calls == [3]
    assert again["number"][:] == first["number"][:] == [0, 1, 2]
    assert again.cache_files == first.cache_files


def test_another_identity_is_another_data_set(generate):
    generate(count, to=3, calls=[])
    assert len(generate(count, identity="other", to=5, calls=[])) == 5


def test_a_list_among_the_arguments_is_one_argument(generate):
    def numbers(these):
        return ({"number": number} for number in these)

    assert generate(numbers, these=[5, 6, 7])["number"][:] == [5, 6, 7]


@pytest.mark.parametrize("error", [ValueError("line 3 is wrong"), OSError(28, "No space left on device")])
def test_what_a_generator_raises_arrives_as_it_is(generate, error):
    def fail():
        yield {"number": 1}
        raise error

    with pytest.raises(type(error)) as raised:
        generate(fail)
    assert raised.value is error
    assert len(generate(count, to=3, calls=[])) == 3


def test_no_rows_are_an_error_that_says_what_to_do(generate):
    with pytest.raises(ValueError, match=r"^no numbers$"):
        generate(count, to=0, calls=[])


def test_a_fingerprint_stands_for_its_parts_and_the_version(monkeypatch):
    assert fingerprint("a", 1, ["b", None]) == fingerprint("a", 1, ["b", None])
    assert len({fingerprint("a", 1), fingerprint("a", "1"), fingerprint("a1"), fingerprint(["a", 1])}) == 4
    before = fingerprint("a")
    monkeypatch.setattr(cache, "CACHE_VERSION", cache.CACHE_VERSION + 1)
    assert fingerprint("a") != before


def test_the_cache_is_that_of_datasets_unless_named(monkeypatch, tmp_path):
    monkeypatch.setattr(cache.datasets_config, "HF_DATASETS_CACHE", str(tmp_path / "theirs"))
    assert cache_folder(None) == tmp_path / "theirs"
    assert cache_folder(str(tmp_path / "mine")) == tmp_path / "mine"
