"""Which code made the figures."""

from transxssm.benchmarking.metadata import code_version


def test_a_copy_without_git_says_what_it_is_told(tmp_path, monkeypatch):
    source = tmp_path / "module.py"
    source.touch()
    monkeypatch.delenv("TRANSXSSM_COMMIT", raising=False)
    assert code_version(source)["commit"] is None
    monkeypatch.setenv("TRANSXSSM_COMMIT", "abc123")
    assert code_version(source)["commit"] == "abc123"
