"""A text file is replaced whole or not at all."""

import pytest

from transxssm.whole_files import write_text_whole


def test_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_text_whole(path, "first")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text_whole(path, "second")
    assert path.read_text() == "first"


def test_a_missing_folder_is_made_and_nothing_else_is_left(tmp_path):
    write_text_whole(tmp_path / "new" / "a.txt", "größer")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "größer"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]
