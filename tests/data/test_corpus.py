import itertools
import json
import sysconfig
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from tests.data.conftest import random_text
from transxssm.data import build_datasets, build_tokenizer, load_corpus
from transxssm.data import corpus as corpora
from transxssm.data.corpus import (
    cut_and_chosen,
    embedded_documents,
    embedded_files,
    is_held_out,
    is_near,
    is_table,
    piece_bounds,
)
from transxssm.data.files import TextFile

TEXTS = st.text(alphabet="ab. \n\ré\u0301🙂", max_size=300)


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


OWN_TEXTS = {
    "one file of 18 kB": ({"a.txt": 18_000}, 0.05),
    "two files": ({"a.txt": 30_000, "b.txt": 9_000}, 0.05),
    "three files": ({"a.txt": 5_000, "b.txt": 90_000, "c.txt": 20_000}, 0.05),
    "twenty files": ({f"{n}.txt": 1_000 + 500 * n for n in range(20)}, 0.1),
    "a file of 700 kB": ({"a.txt": 700_000}, 0.05),
    "half": ({"a.txt": 18_000, "b.txt": 2_000}, 0.5),
    "nearly all": ({"a.txt": 18_000, "b.txt": 2_000}, 0.9),
    "hardly any": ({"a.txt": 18_000, "b.txt": 2_000}, 0.001),
    # Of these the hash of names takes 1.txt alone.
    "the long one of ten by name": ({f"{n}.txt": 50_000 if n == 1 else 1_000 for n in range(10)}, 0.05),
    "the short one of ten by name": ({f"{n}.txt": 100 if n == 1 else 20_000 for n in range(10)}, 0.05),
    "two words": ({"a.txt": 3, "b.txt": 3}, 0.05),
}


@pytest.mark.parametrize(("sizes", "fraction"), OWN_TEXTS.values(), ids=OWN_TEXTS)
@pytest.mark.parametrize("line_ends", [True, False], ids=["lines", "one line"])
def test_of_ones_own_text_about_the_fraction_is_held_out_however_few_files_there_are(
    write, arguments, sizes, fraction, line_ends
):
    texts = {name: random_text(n, size)[:size] for n, (name, size) in enumerate(sizes.items())}
    texts = {name: text if line_ends else text.replace("\n", "_").replace(" ", "_") for name, text in texts.items()}
    corpus = load_corpus(arguments(write(texts), held_out_fraction=fraction))
    held_out, trained = ("".join(split["text"]) for split in (corpus.held_out, corpus.train))
    assert sorted(held_out + trained) == sorted("".join(texts.values()))
    total = sum(sizes.values())
    wanted = fraction * total
    assert wanted / 2 - 1 <= len(held_out) <= wanted * 2 + 1
    assert f"{len(held_out) / total:.1%} of the text" in corpus.description


def test_pieces_that_were_cut_otherwise_are_not_taken_from_the_cache(write, arguments, monkeypatch):
    data = arguments(write({"a.txt": random_text(0, 40_000)}), held_out_fraction=0.05)
    before = load_corpus(data)
    monkeypatch.setattr(corpora, "LONGEST_PIECE", 5_000)
    monkeypatch.setattr(corpora, "SHORTEST_PIECE", 1_000)
    monkeypatch.setattr(corpora, "PIECES", 9)
    after = load_corpus(data)
    assert len(after.held_out) > len(before.held_out)
    assert sorted("".join([*after.held_out["text"], *after.train["text"]])) == sorted(random_text(0, 40_000))


@pytest.mark.parametrize("name", ["my.txt", None], ids=["the file", "its folder"])
def test_a_long_text_is_cut_into_as_few_documents_as_it_takes(write, arguments, name):
    text = "".join(f"This is line {n} of one text.\n" for n in range(9_000))  # 260 kB
    folder = write({"my.txt": text})
    corpus = load_corpus(arguments(folder if name is None else folder / name, held_out_fraction=0.05))
    documents = [*corpus.held_out, *corpus.train]
    assert 1 <= len(corpus.held_out) <= 4
    assert len(documents) <= 2 * len(corpus.held_out) + 1
    assert all(document["text"].endswith("\n") for document in documents)
    assert "".join(d["text"] for d in sorted(documents, key=lambda d: int(d["name"].split("@")[1]))) == text
    again = load_corpus(arguments(folder if name is None else folder / name, held_out_fraction=0.05))
    assert list(again.held_out) == list(corpus.held_out)
    assert again.identity == corpus.identity


def test_a_lone_file_can_be_packed_and_trained_on(write, arguments):
    data = arguments(write({"a.txt": random_text(0, 4000)}), held_out_fraction=0.05, sequence_length=64)
    corpus = load_corpus(data)
    packed = build_datasets(data, corpus, build_tokenizer(data, corpus))
    assert len(packed.train)
    assert packed.held_out_bytes == sum(len(text.encode()) for text in corpus.held_out["text"])


def test_a_text_of_one_character_is_refused(write, arguments):
    with pytest.raises(
        ValueError, match=r"cannot be split in two: it is one character; add text, or name data\.validation"
    ):
        load_corpus(arguments(write({"a.txt": "a"})))


def test_the_embedded_corpus_is_split_by_its_files_names_and_no_file_is_cut(arguments):
    """Published figures are of these files: a split that moves would make them another measurement."""
    corpus = load_corpus(arguments("python-stdlib", held_out_fraction=0.05))
    held_out, trained = set(names(corpus.held_out)), set(names(corpus.train))
    assert all(is_held_out(name, 0.05) for name in held_out)
    assert not any(is_held_out(name, 0.05) for name in trained)
    assert {
        "copyreg.py",
        "opcode.py",
        "sched.py",
        "secrets.py",
        "token.py",
        "traceback.py",
        "tomllib/__init__.py",
    } <= held_out
    assert {"argparse.py", "ast.py", "json/decoder.py", "typing.py", "zipapp.py"} <= trained
    for name in ("traceback.py", "typing.py"):
        split = corpus.held_out if name in held_out else corpus.train
        (text,) = (document["text"] for document in split if document["name"] == name)
        assert text.encode() == (Path(sysconfig.get_path("stdlib")) / name).read_bytes()


def test_what_the_names_take_of_an_embedded_corpus_stands_however_little_it_is(write, arguments, monkeypatch):
    root = write({f"{n}.py": f"x = {n}\n" * (1 if is_held_out(f"{n}.py", 0.05) else 99) for n in range(60)})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    corpus = load_corpus(arguments("python-environment", held_out_fraction=0.05))
    assert set(names(corpus.held_out)) == {f"{n}.py" for n in range(60) if is_held_out(f"{n}.py", 0.05)}


def test_a_text_of_its_own_can_be_held_out(write, arguments):
    folder = write({"train/a.txt": "some text", "val/x.txt": "held out", "val/y.jsonl": '{"text": "too"}'})
    corpus = load_corpus(arguments(folder / "train", validation=str(folder / "val"), held_out_fraction=0.0))
    assert (list(corpus.train["text"]), sorted(corpus.held_out["text"])) == (["some text"], ["held out", "too"])
    inside = load_corpus(arguments(folder, validation=str(folder / "val")))
    assert (list(inside.train["text"]), sorted(inside.held_out["text"])) == (["some text"], ["held out", "too"])
    (folder / "val" / "x.txt").write_text("edited")
    assert load_corpus(arguments(folder, validation=str(folder / "val"))).identity != inside.identity


@pytest.mark.parametrize(
    ("validation", "words"),
    [("missing", "a file or folder that exists"), ("corpus", "would leave no text"), (".", "would leave no text")],
)
def test_a_text_to_hold_out_must_be_there_and_be_another(write, arguments, validation, words):
    folder = write({"a.txt": "some text", "b.txt": "more"})
    with pytest.raises(ValueError, match=r"data\.validation") as refusal:
        load_corpus(arguments(folder, validation=str(folder.parent / validation)))
    assert words in str(refusal.value)


def test_max_bytes_draws_documents_from_all_over_the_corpus(folder, arguments):
    whole, part = load_corpus(arguments(folder)), load_corpus(arguments(folder, max_bytes=5_000))
    size = sum(len(text.encode()) for text in [*part.train["text"], *part.held_out["text"]])
    assert 5_000 <= size < 6_000
    assert {*names(part.train)} | {*names(part.held_out)} < {*names(whole.train)} | {*names(whole.held_out)}
    assert len({name.split("/")[0] for name in names(part.train)}) == 3
    assert list(load_corpus(arguments(folder, max_bytes=5_000)).train) == list(part.train)
    assert load_corpus(arguments(folder, max_bytes=10**9)).identity == whole.identity


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


@pytest.fixture(scope="module")
def stdlib() -> dict[str, str]:
    documents = embedded_documents("python-stdlib", embedded_files("python-stdlib"))
    return {document["name"]: document["text"] for document in documents}


def test_the_standard_library_is_there_without_its_tests_and_packages(stdlib):
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py", "encodings/__init__.py"} <= stdlib.keys()
    parts = {part for name in stdlib for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert list(stdlib) == sorted(stdlib)
    assert 5e6 < sum(len(text.encode()) for text in stdlib.values()) < 20e6


def test_generated_tables_are_left_out(stdlib):
    tables = {"encodings/cp1252.py", "encodings/mac_roman.py", "pydoc_data/topics.py", "html/entities.py"}
    assert tables <= {file.name for file in embedded_files("python-stdlib")}
    assert not tables & stdlib.keys()


def test_documents_are_the_files_to_the_byte(stdlib):
    file = next(file for file in embedded_files("python-stdlib") if file.name == "argparse.py")
    assert stdlib["argparse.py"].encode() == file.path.read_bytes()


def test_the_environment_has_what_is_installed():
    names = {file.name for file in embedded_files("python-environment")}
    assert {"torch/__init__.py", "transformers/__init__.py"} <= names
    assert "argparse.py" not in names


def test_platform_packages_in_a_folder_of_their_own_are_found_too(monkeypatch, write):
    root = write({"lib/pure.py": "a = 1", "lib64/compiled.py": "b = 1"})
    folders = {"purelib": str(root / "lib"), "platlib": str(root / "lib64")}
    monkeypatch.setattr(sysconfig, "get_path", folders.__getitem__)
    assert [file.name for file in embedded_files("python-environment")] == ["compiled.py", "pure.py"]


@pytest.mark.parametrize(
    ("source", "table"),
    [
        ("X = {\n" + "    0x80: 'a', # EURO SIGN\n" * 20 + "}\n", True),
        ("X = (\n" + "    '\\x00'  #  0x00 -> NULL\n" * 20 + ")\n", True),
        ("X = '" + "ab" * 400 + "'\n", True),
        ("def f(x):\n    '''Say\n    something.'''\n    return [1, 2][x]\n" * 9, False),
        ('"""Docstring."""\n' * 9, False),
        ("colours = {\n    'red': 1,\n}\n\ndef colour_of(name):\n    return colours[name] # a dictionary\n", False),
        ("", False),
    ],
)
def test_a_table_is_a_file_that_is_mostly_data(source, table):
    assert is_table(source.encode()) is table


def test_copies_empty_and_unreadable_files_are_left_out_and_counted(write, caplog):
    root = write({"a.py": "x = y\n", "b.py": "x = y\n", "empty.py": " \n", "latin.py": b"# \xe9\n", "nul.py": b"a\0"})
    files = [TextFile(path.name, path) for path in sorted(root.iterdir())]
    with caplog.at_level("INFO", logger="transxssm"):
        documents = list(embedded_documents("python-environment", files))
    assert documents == [{"name": "a.py", "text": "x = y\n"}]
    assert "'copies': 1" in caplog.text
    assert "'empty': 1" in caplog.text
    assert "'unreadable': 2" in caplog.text


@hypothesis.given(text=TEXTS, size=st.integers(1, 40))
def test_pieces_are_the_text_and_none_is_blank(text, size):
    bounds = piece_bounds(text, size)
    assert "".join(text[begin:end] for begin, end in bounds) == text
    assert all(begin < end for begin, end in bounds)
    if text.strip():
        assert all(text[begin:end].strip() for begin, end in bounds)


@hypothesis.given(texts=st.lists(TEXTS.filter(str.strip), min_size=1, max_size=6), fraction=st.floats(0.01, 0.99))
def test_every_character_is_on_one_side_and_neither_is_empty(texts, fraction):
    total = sum(map(len, texts))
    names = [f"{n}.txt" for n in range(len(texts))]
    try:
        runs = cut_and_chosen(names, texts, total, fraction)
    except ValueError:
        assert len(texts) == 1
        assert len(piece_bounds(texts[0], 1)) == 1
        return
    assert {run.is_held_out for run in runs} == {True, False}
    for index, text in enumerate(texts):
        own = [run for run in runs if run.document == index]
        assert [run.begin for run in own] == [0, *(run.end for run in own[:-1])]
        assert own[-1].end == len(text)
        assert all(a.is_held_out != b.is_held_out for a, b in itertools.pairwise(own)), "neighbours are joined"
    assert runs == cut_and_chosen(names, texts, total, fraction)


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.1, 0.5, 0.9, 0.99])
def test_what_is_held_out_is_about_the_fraction(fraction):
    texts = ["word " * 100_000, "another line\n" * 2_000, "x" * 40_000]
    total = sum(map(len, texts))
    runs = cut_and_chosen(["a", "b", "c"], texts, total, fraction)
    assert is_near(sum(run.end - run.begin for run in runs if run.is_held_out), total, fraction)


def test_copies_of_a_text_stay_on_one_side():
    texts = ["first line of it\nsecond line of it\n" * 20] * 4 + ["something else\n" * 30]
    names = ["copy"] * 4 + ["other"]
    runs = cut_and_chosen(names, texts, sum(map(len, texts)), 0.2)
    held = {(names[r.document], r.begin, r.end) for r in runs if r.is_held_out}
    trained = {(names[r.document], r.begin, r.end) for r in runs if not r.is_held_out}
    assert not held & trained


@pytest.mark.parametrize(("held_out", "near"), [(49, True), (24, False), (101, False), (0, False), (100, True)])
def test_near_is_between_half_and_twice(held_out, near):
    assert is_near(held_out, 1000, 0.05) is near
