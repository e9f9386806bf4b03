import json

import pytest

from transxssm.data import load_corpus
from transxssm.data.corpus import is_held_out


def names(split) -> list[str]:
    return list(split["name"])


def test_the_splits_share_the_documents_between_them(folder, arguments):
    corpus = load_corpus(arguments(folder))
    assert len(corpus.train) + len(corpus.held_out) == 40
    assert not set(names(corpus.train)) & set(names(corpus.held_out))
    assert all(is_held_out(name, 0.25) for name in names(corpus.held_out))
    texts = dict(zip(corpus.train["name"], corpus.train["text"], strict=True))
    assert all((folder / name).read_bytes().decode() == text for name, text in texts.items())


def test_a_document_keeps_its_side_whatever_is_added(folder, arguments):
    before = load_corpus(arguments(folder))
    for number in range(20):
        (folder / f"another{number}.txt").write_text(f"text {number}")
    after = load_corpus(arguments(folder))
    assert len(after.train) + len(after.held_out) == 60
    assert set(names(before.train)) <= set(names(after.train))
    assert set(names(before.held_out)) <= set(names(after.held_out))


def test_the_hash_holds_out_the_fraction_asked_for():
    held_out = sum(is_held_out(f"file{n}.py", 0.05) for n in range(20_000))
    assert held_out == pytest.approx(1000, rel=0.1)
    assert is_held_out("argparse.py", 0.999)
    # The hash is part of what a result means: a split that moves would compare different texts.
    assert [n for n in range(60) if is_held_out(f"{n}.txt", 0.05)] == [1, 18, 39]


def test_copies_without_a_name_share_a_side(write, arguments):
    lines = [json.dumps({"text": f"text {n % 20}"}) for n in range(60)]
    corpus = load_corpus(arguments(write({"a.jsonl": "\n".join(lines)}) / "a.jsonl"))
    assert len(corpus.train) + len(corpus.held_out) == 60
    assert not set(corpus.train["text"]) & set(corpus.held_out["text"])


def test_an_edited_file_is_read_again(folder, arguments):
    before = load_corpus(arguments(folder))
    path = folder / names(before.train)[0]
    path.write_text("edited")
    after = load_corpus(arguments(folder))
    assert before.identity != after.identity
    assert after.train[0]["text"] == "edited"


def test_max_documents_caps_the_corpus(folder, arguments):
    corpus = load_corpus(arguments(folder, max_documents=20))
    assert len(corpus.train) + len(corpus.held_out) == 20


def test_text_files_can_be_named_relative_to_home(folder, arguments, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(load_corpus(arguments("~/corpus")).train) > 0


@pytest.mark.parametrize(
    ("corpus", "words"),
    [
        ("python-stdlb", "did you mean python-stdlib?"),
        ("missing.txt", "no corpus 'missing.txt'"),
        ("texts/missing.jsonl", "a file or folder that exists"),
        ("/no/such/folder", "expected python-stdlib or python-environment"),
    ],
)
def test_an_unknown_corpus_is_refused(arguments, corpus, words):
    with pytest.raises(ValueError, match="no corpus") as refusal:
        load_corpus(arguments(corpus))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_empty_corpus_is_refused(write, arguments):
    with pytest.raises(ValueError, match="is empty"):
        load_corpus(arguments(write({"a.txt": "", "b.txt": "  \n"})))


def test_too_few_documents_for_two_splits_are_refused(write, arguments):
    with pytest.raises(ValueError, match="leaves none for the held-out split; change the fraction or add documents"):
        load_corpus(arguments(write({"a.txt": "one", "b.txt": "two"}), held_out_fraction=1e-6))
    with pytest.raises(ValueError, match="leaves none for the train split"):
        load_corpus(arguments(write({"a.txt": "one", "b.txt": "two"}), held_out_fraction=1 - 1e-6))


@pytest.mark.parametrize("field", [{"streaming": True}, {"corpus_config": "small"}])
def test_what_only_the_hub_has_is_refused_for_local_files(folder, arguments, field):
    with pytest.raises(ValueError, match=f"data.{next(iter(field))} is for hub data sets"):
        load_corpus(arguments(folder, **field))


def test_what_is_wrong_with_a_file_reaches_the_user_and_no_cache(write, arguments):
    path = write({"a.jsonl": '{"text": "fine"}\nbroken\n'}) / "a.jsonl"
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is not JSON"):
            load_corpus(arguments(path))
    path.write_text("\n".join(json.dumps({"text": f"text {n}"}) for n in range(20)))
    assert len(load_corpus(arguments(path)).train) > 0
