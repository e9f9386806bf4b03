"""Which code made the figures."""

import sys

import torch

from transxssm.benchmarking.metadata import code_version, run_metadata


def test_a_copy_without_git_says_what_it_is_told(tmp_path, monkeypatch):
    source = tmp_path / "module.py"
    source.touch()
    monkeypatch.delenv("TRANSXSSM_COMMIT", raising=False)
    assert code_version(source)["commit"] is None
    monkeypatch.setenv("TRANSXSSM_COMMIT", "abc123")
    assert code_version(source)["commit"] == "abc123"


def test_a_package_that_cannot_be_imported_counts_as_missing(tmp_path, monkeypatch):
    """transformers falls back to its reference then, whatever is installed."""
    module = tmp_path / "mamba_ssm" / "ops" / "triton" / "ssd_combined.py"
    module.parent.mkdir(parents=True)
    information = tmp_path / "mamba_ssm-2.0.dist-info" / "METADATA"
    information.parent.mkdir()
    information.write_text("Metadata-Version: 2.1\nName: mamba_ssm\nVersion: 2.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    module.write_text("raise OSError('built for another machine')\n")
    assert run_metadata(torch.device("cpu"), None)["mamba_ssm"] is None
    module.write_text("")
    assert run_metadata(torch.device("cpu"), None)["mamba_ssm"] == "2.0"


def test_a_package_that_was_put_on_the_path_says_its_version_itself(tmp_path, monkeypatch):
    (tmp_path / "causal_conv1d.py").write_text("__version__ = '7.8'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "causal_conv1d", raising=False)
    assert run_metadata(torch.device("cpu"), None)["causal_conv1d"] == "7.8"
    del sys.modules["causal_conv1d"]
