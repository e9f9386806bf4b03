"""Names that torch, transformers and the libraries of training do not promise to keep: a version that lacks one fails by name.

`NAMES` is all that this package uses: the second half of the tests reads the sources and finds what is used and not named here.
"""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import sys

import pytest

import transxssm
from tests.test_layers import OTHERS, PACKAGE

NAMES = (
    # What looks on while an op runs (ops/dispatch.py), and what the processor multiplies (ops/devices.py, machine.py).
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._get_tracing_state",
    "torch._C._len_torch_dispatch_stack",
    "torch._subclasses.functional_tensor.FunctionalTensor",
    "torch._subclasses.functional_tensor.FunctionalTensorMode",
    "torch.autograd.forward_ad._current_level",
    "torch.cpu._is_amx_fp16_supported",
    "torch.cpu._is_amx_tile_supported",
    "torch.cpu._is_avx512_bf16_supported",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported",
    # Masks that are checked on the device, caches that keep their addresses, attention and collectives of context parallelism.
    "torch._assert_async",
    "torch._dynamo.config.recompile_limit",
    "torch._dynamo.mark_static_address",
    "torch.distributed._functional_collectives",
    "torch.ops.aten._scaled_dot_product_flash_attention",
    # Whether a layer is plain (models/linear.py), buffers of caches, names in checkpoints.
    "torch.nn.Module._backward_hooks",
    "torch.nn.Module._backward_pre_hooks",
    "torch.nn.Module._buffers",
    "torch.nn.Module._forward_hooks",
    "torch.nn.Module._forward_pre_hooks",
    "torch.nn.Module._load_from_state_dict",
    "torch.nn.Module._parameters",
    "torch.nn.modules.module._has_any_global_hook",
    # What a model of transformers says of itself.
    "transformers.PreTrainedConfig._attn_implementation",
    "transformers.PreTrainedModel._can_compile_fullgraph",
    "transformers.PreTrainedModel._can_record_outputs",
    "transformers.PreTrainedModel._from_config",
    "transformers.PreTrainedModel._fsdp_plan",
    "transformers.PreTrainedModel._init_weights",
    "transformers.PreTrainedModel._is_stateful",
    "transformers.PreTrainedModel._no_split_modules",
    "transformers.PreTrainedModel._pp_plan",
    "transformers.PreTrainedModel._skip_keys_device_placement",
    "transformers.PreTrainedModel._supports_attention_backend",
    "transformers.PreTrainedModel._supports_flash_attn",
    "transformers.PreTrainedModel._supports_flex_attn",
    "transformers.PreTrainedModel._supports_sdpa",
    "transformers.PreTrainedModel._tied_weights_keys",
    "transformers.PreTrainedModel._tp_plan",
    "transformers.GenerationConfig._mask_length",
    "transformers.GenerationMixin._prefill",
    "transformers.GenerationMixin._prepare_cache_for_generation",
    # The training loop (training/trainer.py, training/loop.py).
    "transformers.Trainer._get_grad_norm",
    "transformers.Trainer._get_output_dir",
    "transformers.Trainer._issue_warnings_after_load",
    "transformers.Trainer._load_best_model",
    "transformers.Trainer._load_from_checkpoint",
    "transformers.Trainer._load_optimizer_and_scheduler",
    "transformers.Trainer._prepare_inputs",
    "transformers.Trainer._run_epoch",
    "transformers.Trainer._save",
    "transformers.Trainer._save_checkpoint",
    "transformers.Trainer._save_optimizer_and_scheduler",
    "transformers.Trainer._train_batch_size",
    "transformers.TrainingArguments._n_gpu",
    "accelerate.state.AcceleratorState._reset_state",
    # Documents without copies, and hub data sets known again (data/corpus.py).
    "datasets.Dataset._fingerprint",
    "datasets.Dataset._indices",
)
LIBRARIES = ("torch", "transformers", "accelerate", "datasets")
OF_NAMED_TUPLES = {"_asdict", "_fields", "_replace"}
# vLLM's own are of the one minor version that its extra pins, and of a library that is not everywhere.
ELSEWHERE = ("transxssm/serving/vllm/",)


def found(dotted: str) -> bool:
    """Whether a name exists: of a module, of a class, or set on the instances of a class."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        break
    else:
        return False
    for name in parts[length:]:
        if inspect.isclass(value) and not hasattr(value, name):
            return any(
                f"self.{name}" in _source(base) or name in inspect.get_annotations(base) for base in value.__mro__
            )
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # of the interpreter itself
        return ""


@pytest.mark.parametrize("name", NAMES)
def test_is_there(name):
    assert found(name), f"{name} is gone: see what uses it, and state the versions that have it in pyproject.toml"


@pytest.mark.parametrize(
    "name",
    ["torch._is_no_such_thing", "torch.nn.Module._no_such_hooks", "no_such_library._x", "transformers.Trainer._no"],
)
def test_a_missing_one_is_seen(name):
    assert not found(name)


@functools.cache
def sources() -> dict[str, ast.Module]:
    files = [path for root in (PACKAGE, *OTHERS) for path in sorted(root.rglob("*.py"))]
    trees = {path.relative_to(PACKAGE.parent).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}
    return {name: tree for name, tree in trees.items() if not name.startswith(ELSEWHERE)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def used(tree: ast.Module) -> set[str]:
    """Private names that a source takes from the libraries: imported, or reached from one of them by dots."""
    names = set()
    nested = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Attribute) and id(node) not in nested:
            chain = ast.unparse(node)
            if re.fullmatch(rf"({'|'.join(LIBRARIES)})(\.\w+)+", chain):
                nested |= {id(inner) for inner in ast.walk(node.value)}
                names.add(chain)
    return {name for name in names if any(map(is_private, name.split(".")))}


def defined(tree: ast.Module) -> set[str]:
    """Private names that a source gives to something itself."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return names


def test_what_the_sources_reach_in_the_libraries_is_named():
    assert set().union(*map(used, sources().values())) - set(NAMES) == set()


def test_what_the_sources_read_of_the_libraries_objects_is_named():
    trees = sources()
    ours = set().union(*map(defined, trees.values())) | OF_NAMED_TUPLES
    named = {part for name in NAMES for part in name.split(".")}
    unknown = {
        f"{file}:{node.lineno}: {ast.unparse(node)}"
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and is_private(node.attr)
        and node.attr not in ours | named
        and ast.unparse(node).split(".")[0] not in sys.stdlib_module_names
    }
    assert unknown == set()


def test_what_classes_override_is_named():
    """A method that nothing calls any more would be dead without a word."""
    named = {name.rpartition(".")[2] for name in NAMES}
    unknown = set()
    for module in pkgutil.walk_packages(transxssm.__path__, "transxssm."):
        if any(
            part in module.name
            for part in (".vllm", "triton", "__main__", "transxssm.benchmarking", "transxssm.studies")
        ):
            continue
        for cls in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(cls) and cls.__module__ == module.name:
                foreign = [base for base in cls.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
                unknown |= {
                    f"{cls.__qualname__}.{name} overrides {base.__qualname__}'s"
                    for name in filter(is_private, vars(cls))
                    for base in foreign
                    if name in vars(base) and name not in named and name in _source(cls)
                }
    assert unknown == set()


def test_a_planted_use_is_found():
    tree = ast.parse(
        "import torch\nfrom torch._inductor import config\ntorch.compile(torch._C._x(1).y)\ntorch.nn.Linear"
    )
    assert used(tree) == {"torch._inductor.config", "torch._C._x"}
