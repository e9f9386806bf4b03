"""The layers that PEFT adapts by default: those of a Llama, and their counterparts in an SSD layer."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

TABLES = "peft.utils.constants"
# State-space duality (Eq. 6): C, B and x are to a state what Q, K and V are to attention. The norms and the FFN have Llama's names.
IN_SSD_LAYERS = {"q_proj": "C_proj", "k_proj": "B_proj", "v_proj": "x_proj", "o_proj": "out_proj"}


def add_peft_targets(model_type: str) -> None:
    """Enters a model type in PEFT's tables of default `target_modules`, one for each kind of adapter.

    If PEFT has not been imported yet, this happens when it is. Importing it here would add a second to the import of this package for
    everyone who has PEFT installed.
    """
    if TABLES in sys.modules:
        _enter(model_type, sys.modules[TABLES])
    else:
        sys.meta_path.insert(0, _WhenImported(model_type))


def _enter(model_type: str, constants: ModuleType) -> None:
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
            layers = table["llama"]
            table[model_type] = [*layers, *(IN_SSD_LAYERS[layer] for layer in layers if layer in IN_SSD_LAYERS)]


class _WhenImported(importlib.abc.MetaPathFinder):
    """An import hook that finds PEFT's tables once, and enters the model type when they have been imported."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_enter(module: ModuleType) -> None:
                execute(module)
                _enter(self.model_type, module)

            spec.loader.exec_module = execute_and_enter  # type: ignore[method-assign]
        return spec
