import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transxssm.data.files import PART_BYTES, content_name, local_documents, local_files


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


@pytest.mark.parametrize(("content", "reason"), [(b"abc\0def", "NUL byte at offset 3"), (b"caf\xe9 ole", "utf-8")])
def test_a_binary_file_that_was_named_is_refused(write, content, reason):
    path = write({"named.txt": content}) / "named.txt"
    with pytest.raises(ValueError, match=reason) as refusal:
        documents_of(path)
    assert str(path) in str(refusal.value)
    assert "expected UTF-8" in str(refusal.value)


def test_one_text_file_is_cut_at_line_ends(write):
    text = "".join(f"line {n} é\r\n" for n in range(10_000))  # 148 KB
    path = write({"book.txt": text}) / "book.txt"
    documents = documents_of(path)
    assert "".join(document["text"] for document in documents) == text
    assert len(documents) == 5
    assert [document["name"] for document in documents] == [f"book.txt#{n}" for n in range(5)]
    assert all(PART_BYTES <= len(document["text"].encode()) < PART_BYTES + 20 for document in documents[:-1])
    assert all(document["text"].endswith("\n") for document in documents)


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
