import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transxssm.data import files
from transxssm.data.files import content_name, cut_end, local_documents, local_files


def documents_of(path, text_column="text"):
    return list(local_documents(path, local_files(path), text_column))


def test_in_a_folder_a_file_is_a_document(write):
    folder = write({"b/two.md": "two", "a.txt": "one\r\n", "b/c/three.py": "three", "blank.txt": " \n"})
    assert documents_of(folder) == [
        {"name": "a.txt", "text": "one\r\n"},
        {"name": "b/c/three.py", "text": "three"},
        {"name": "b/two.md", "text": "two"},
    ]


def test_hidden_files_and_bytecode_are_left_out(write):
    folder = write({"a.txt": "one", ".git/config": "x", ".hidden.txt": "x", "__pycache__/a.pyc": "x"})
    assert [document["name"] for document in documents_of(folder)] == ["a.txt"]


def test_binary_files_in_a_folder_are_skipped_and_counted(write, caplog):
    folder = write({"a.txt": "one", "image.png": b"\x89PNG\0", "latin.txt": b"caf\xe9"})
    assert [document["name"] for document in documents_of(folder)] == ["a.txt"]
    assert "skipped 2 of 3 files" in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"), [(b"abc\0def", "NUL byte at offset 3"), (b"caf\xe9 ole", "byte 0xe9 at offset 3")]
)
def test_a_binary_file_that_was_named_is_refused(write, content, reason):
    path = write({"named.txt": content}) / "named.txt"
    with pytest.raises(ValueError, match=reason) as refusal:
        documents_of(path)
    assert str(path) in str(refusal.value)
    assert "expected UTF-8" in str(refusal.value)


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_text_file_is_one_document_and_a_long_one_several_wherever_it_lies(write, in_folder):
    text = "".join(f"line {n} é\r\n" for n in range(75_000))  # 0.98 million characters
    folder = write({"book.txt": text, "short.txt": "short"})
    documents = [d for d in documents_of(folder if in_folder else folder / "book.txt") if d["name"] != "short.txt"]
    assert "".join(document["text"] for document in documents) == text
    assert [document["name"] for document in documents] == [f"book.txt#{n}" for n in range(3)]
    assert all(len(document["text"]) < 2 * files.PART_CHARACTERS for document in documents)
    assert all(document["text"].endswith("\n") for document in documents)


@pytest.mark.parametrize("text", ["é" * 2_000_000, "🙂a" * 500_000], ids=["two bytes", "four bytes"])
def test_a_single_line_of_any_length_is_read_in_parts(write, text):
    documents = documents_of(write({"a.txt": text}) / "a.txt")
    assert "".join(document["text"] for document in documents) == text
    assert max(len(document["text"]) for document in documents) < 2 * files.PART_CHARACTERS


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("one. two\nthree four five", "one. two\n"),
        ("one two, st. four five", "one two, st. "),
        ("一二三四五六七。八九十一二三四五六", "一二三四五六七。"),
        ("one two three four", "one two three "),
        ("onetwothreefourfive", "onetwothreefou"),
        ("1234567890123\r\nrest", "1234567890123\r\n"),
        ("1234567890123e\u0301rest", "1234567890123e\u0301"),
        ("1234567890123\U0001f469\u200d\U0001f467rest", "1234567890123\U0001f469\u200d\U0001f467"),
    ],
)
def test_a_text_is_cut_after_a_line_else_a_sentence_else_a_word_else_a_character(text, first):
    assert text[: cut_end(text, 0, 14)] == first
    assert cut_end(text, 5, len(text)) == len(text)


def test_a_folder_without_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no files"):
        local_files(tmp_path)


def test_a_line_of_jsonl_is_a_document(write):
    records = [{"text": "one", "name": "first"}, {"text": "two"}, {"text": ""}, {"text": None}, {"text": "é\u2028🙂"}]
    path = write({"a.jsonl": "\n".join(map(json.dumps, records)) + "\n\n"}) / "a.jsonl"
    assert documents_of(path) == [
        {"name": "first", "text": "one"},
        {"name": content_name("two"), "text": "two"},
        {"name": content_name("é\u2028🙂"), "text": "é\u2028🙂"},
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "is not JSON"),
        ('{"body": "x"}', "has no 'text': got ['body']"),
        ('["x"]', "has no 'text': got list"),
        ('{"text": 3}', "must be a string, got int"),
        (b"\xff", "is not JSON"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(write, line, words):
    line = line if isinstance(line, bytes) else line.encode()
    path = write({"a.jsonl": b'{"text": "fine"}\n' + line + b"\n"}) / "a.jsonl"
    with pytest.raises(ValueError, match="line 2") as refusal:
        documents_of(path)
    assert str(refusal.value).startswith(str(path))
    assert words in str(refusal.value)


def test_what_is_left_out_or_mended_is_counted_and_named_with_file_and_line(write, caplog):
    lines = [
        '{"text": "fine"}',
        '{"text": null}',
        '{"text": "half \\ud83d of it", "name": "a\\udc00"}',
        *['{"text": null}'] * 3,
    ]
    folder = write({"a.jsonl": "\n".join(lines), "b.json": '[{"text": "x"}, {"text": null}]'})
    assert [(document["name"], document["text"]) for document in documents_of(folder)] == [
        (content_name("fine"), "fine"),
        ("a\ufffd", "half \ufffd of it"),
        (content_name("x"), "x"),
    ]
    path = folder / "a.jsonl"
    nulls = f"5 records without a text (null) are left out: {path}, line 2; {path}, line 4; {path}, line 5; …"
    halves = f"1 texts have half a character (a lone surrogate), replaced by U+FFFD: {path}, line 3"
    assert caplog.messages == [nulls, halves]


COMPRESSIBLE = {
    "a.txt": "one\ntwo\n",
    "a.jsonl": '{"text": "one", "name": "first"}\n{"text": "two"}\n',
    "a.json": '[{"text": "one", "name": "first"}, {"text": "two", "label": 3}]',
    "a.csv": '\ufeffname,text\nfirst,"one, ""two""\nthree"\n\n,four\n',
    "a.tsv": "text\tname\none, two\tfirst\nNA\n",
}
READ = {
    "a.txt": [("a.txt", "one\ntwo\n")],
    "a.jsonl": [("first", "one"), (content_name("two"), "two")],
    "a.json": [("first", "one"), (content_name("two"), "two")],
    "a.csv": [("first", 'one, "two"\nthree'), (content_name("four"), "four")],
    "a.tsv": [("first", "one, two"), (content_name("NA"), "NA")],
}


@pytest.mark.parametrize("name", COMPRESSIBLE)
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
def test_a_file_is_read_as_what_its_name_says(write, name, compressed):
    content = COMPRESSIBLE[name].encode()
    path = write({f"{name}.gz": gzip.compress(content)} if compressed else {name: content}) / name
    path = path.with_name(f"{name}.gz") if compressed else path
    for where in (path, path.parent):
        expected = [(f"{a}.gz" if compressed and a == "a.txt" else a, b) for a, b in READ[name]]
        assert [(document["name"], document["text"]) for document in documents_of(where)] == expected


def test_a_long_field_of_csv_is_read(write):
    path = write({"a.csv": "text\n" + "word " * 100_000 + "\n"}) / "a.csv"
    assert len(documents_of(path)[0]["text"]) == 500_000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "label,body\n1,x\n", "has no column 'text': got ['label', 'body']"),
        ("a.csv", "text,label\nx,1\na,b,2\n", "line 3 has 3 fields, expected 2"),
        ("a.csv", 'text\nfine\n"x" y\n', "line 3 is not CSV"),
        ("a.csv", b"text\ncaf\xe9\n", "is not CSV in UTF-8"),
        ("a.json", '{"name": "x", "version": 3}', "got ['name', 'version']; set data.text_column"),
        ("a.json", "[1, 2]", "is no array of objects with a 'text'"),
        ("a.json", '[{"text": "x"}, {"body": "y"}]', "item 2 has no 'text': got ['body']"),
        ("a.json", "{", "is not JSON"),
        ("a.txt.gz", b"not gzip", "is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 99, mtime=0)[:-10], "is not a whole gzip file"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_by_name(write, name, content, words):
    path = write({name: content}) / name
    with pytest.raises(ValueError, match="a") as refusal:
        documents_of(path)
    assert str(refusal.value).startswith(str(path))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_in_a_folder_settings_and_tables_without_a_text_are_skipped_and_named(write, caplog):
    folder = write({"main.py": "x = 1", "package.json": '{"name": "x"}', "prices.csv": "price\n3\n"})
    assert [document["name"] for document in documents_of(folder)] == ["main.py"]
    assert "skipped 2 of 3 files, such as package.json, which is no array of objects with a 'text'" in caplog.text


def test_a_folder_with_nothing_to_read_says_why(write):
    with pytest.raises(
        ValueError, match=r"skipped 1, such as prices\.csv, which has no column 'text': got \['price'\]"
    ):
        documents_of(write({"prices.csv": "price\n3\n", "blank.txt": " "}))


def test_a_row_of_parquet_is_a_document(tmp_path):
    table = pa.table({"body": ["one", None, "two"], "name": ["first", "empty", "second"], "other": [1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert documents_of(tmp_path / "a.parquet", "body") == [
        {"name": "first", "text": "one"},
        {"name": "second", "text": "two"},
    ]


def test_bad_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file"):
        documents_of(path)
    pq.write_table(pa.table({"body": ["one"], "size": [1]}), path)
    with pytest.raises(ValueError, match=r"no column 'text': got \['body', 'size'\]"):
        documents_of(path)
    with pytest.raises(ValueError, match="row 1: the text must be a string, got int"):
        documents_of(path, "size")
