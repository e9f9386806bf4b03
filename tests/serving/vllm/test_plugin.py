"""The plugin without vLLM, and with another version of it."""

import logging
import sys
from types import SimpleNamespace

import pytest

from transxssm.serving.vllm import plugin


@pytest.fixture
def other_vllm(monkeypatch):
    module = SimpleNamespace(__version__="0.99.1", __version_tuple__=(0, 99, 1))
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(plugin, "find_spec", lambda name: module)


def test_names_the_version_it_needs(other_vllm):
    with pytest.raises(ValueError, match=r"needs vLLM 0\.32.*got 0\.99\.1"):
        plugin.require_supported_vllm()


def test_leaves_another_version_alone(other_vllm, caplog):
    with caplog.at_level(logging.WARNING):
        plugin.register()  # which must not stop vLLM from serving other models
    assert "got 0.99.1" in caplog.text


def test_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(plugin, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed.*transxssm\[vllm\]"):
        plugin.require_supported_vllm()


def test_registers_as_often_as_asked():
    pytest.importorskip(
        "vllm", reason="vLLM is not installed here: `make test-serving` builds an environment that has it"
    )
    from vllm import ModelRegistry

    plugin.register()
    plugin.register()
    assert plugin.ARCHITECTURE in ModelRegistry.get_supported_archs()
