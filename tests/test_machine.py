"""Which code made the figures."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

from transxssm.machine import code_version, run_metadata


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


@pytest.mark.parametrize(("package", "module"), [("causal_conv1d", ""), ("mamba_ssm", "ops/triton/ssd_combined")])
def test_a_package_that_was_put_on_the_path_says_its_version_itself(tmp_path, monkeypatch, package, module):
    (tmp_path / package / Path(module).parent).mkdir(parents=True)
    (tmp_path / package / "__init__.py").write_text("__version__ = '7.8'\n")
    if module:
        (tmp_path / package / f"{module}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", not_installed)
        found = run_metadata(torch.device("cpu"), None)[package]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    assert found == "7.8"


def not_installed(package):
    raise importlib.metadata.PackageNotFoundError(package)
