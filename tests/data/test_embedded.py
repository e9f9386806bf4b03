import sysconfig

import pytest

from transxssm.data.embedded import embedded_documents, embedded_files, is_table
from transxssm.data.files import TextFile


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
