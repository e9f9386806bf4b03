"""The model inside vLLM: continuous batching, prefix caching, an OpenAI server. vLLM itself is imported by the modules in here only."""

from transxssm.serving.vllm.plugin import register, require_supported_vllm

__all__ = ["register", "require_supported_vllm"]
