"""Every contender's step runs in every mode that it names, and leaves nothing behind that the next run would see."""

import pytest
import torch

from tests.models.tiny import tiny_config
from transxssm.models import TransXSSMForCausalLM
from transxssm_lab.benchmarking import contenders
from transxssm_lab.benchmarking.contenders import CONTENDERS, DEFAULT_CONTENDERS, build_prompt, build_step, compile_step
from transxssm_lab.benchmarking.steps import DECODE_TOKENS, seconds_of

CPU = torch.device("cpu")
# Compiling takes longer than all other tests of this folder together.
CASES = [(n, m) for n, c in CONTENDERS.items() if n != "transxssm-compiled" for m in c.modes]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_step_runs_twice(name, mode):
    dtype = torch.bfloat16 if mode == "train-autocast" else torch.float32
    config = CONTENDERS[name].config(tiny_config())
    step = build_step(name, config, mode, 6, 1, dtype, device=CPU)
    assert all(seconds_of(step, CPU) > 0 for _ in range(2))


def test_the_defaults_are_contenders():
    assert set(DEFAULT_CONTENDERS) < set(CONTENDERS)


def test_a_training_step_leaves_no_gradients(monkeypatch):
    models = []
    monkeypatch.setattr(torch.nn.Module, "train", lambda self, mode=True: models.append(self) or self)
    step = build_step("transxssm", tiny_config(), "train", 6, 1, torch.float32, device=CPU)
    step.run()
    assert all(p.grad is not None for p in models[-1].parameters())
    step.clean()
    assert all(p.grad is None for p in models[-1].parameters())


def test_a_training_step_forms_no_logits_where_the_model_can_do_without(monkeypatch):
    outputs, forward = [], TransXSSMForCausalLM.forward
    monkeypatch.setattr(
        TransXSSMForCausalLM, "forward", lambda *args, **kwargs: outputs.append(forward(*args, **kwargs)) or outputs[-1]
    )
    build_step("transxssm", tiny_config(), "train", 6, 1, torch.float32, device=CPU).run()
    assert [output.logits for output in outputs] == [None]


@pytest.mark.parametrize("name", DEFAULT_CONTENDERS)
@pytest.mark.parametrize(("mode", "times"), [("train", 1), ("train-checkpointed", 2)])
def test_checkpointing_runs_every_layer_twice(name, mode, times, monkeypatch):
    models, calls, training_step = [], [], contenders._training_step
    monkeypatch.setattr(
        contenders, "_training_step", lambda model, *rest: models.append(model) or training_step(model, *rest)
    )
    step = build_step(name, CONTENDERS[name].config(tiny_config()), mode, 6, 1, torch.float32, device=CPU)
    layers = list(models[0].base_model.layers)
    for index, layer in enumerate(layers):
        part = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
        part.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    step.run()
    assert sorted(calls) == sorted(times * list(range(len(layers))))


@pytest.mark.parametrize("name", ["transxssm", "llama", "llama-static", "mamba2", "jamba"])
def test_decoding_goes_on_after_the_prompt(name, monkeypatch):
    """Each token's position follows the last one's, and the cache holds them all."""
    positions, config = [], CONTENDERS[name].config(tiny_config())
    step = build_step(name, config, "decode", 6, 1, torch.float32, device=CPU)
    (model,) = [
        cell.cell_contents for cell in step.run.__wrapped__.__closure__ if hasattr(cell.cell_contents, "config")
    ]
    forward = model.forward

    def watch(**arguments):
        positions.append(int(arguments["position_ids"]) if "position_ids" in arguments else None)
        return forward(**arguments)

    monkeypatch.setattr(model, "forward", watch)
    step.run()
    expected = [None] * DECODE_TOKENS if name == "mamba2" else list(range(6, 6 + DECODE_TOKENS))
    assert positions == expected


@pytest.mark.parametrize("name", ["transxssm-graph", "llama-graph"])
def test_a_graph_is_compiled_behind_the_prompt(name, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **options: compiled.append((model, options)))
    prompt = build_prompt(name, CONTENDERS[name].config(tiny_config()), 6, 1, torch.float32, 8, device=CPU)
    assert [(id(model), options) for model, options in compiled] == [
        (id(prompt.model), {"fullgraph": True, "mode": None})
    ]


def test_on_a_gpu_it_is_a_cuda_graph(monkeypatch):
    class OnGPU(torch.nn.Linear):
        def parameters(self):
            yield type("Parameter", (), {"device": torch.device("cuda")})

    options = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **given: options.append(given))
    compile_step(OnGPU(1, 1))
    assert options == [{"fullgraph": True, "mode": "reduce-overhead"}]


def test_all_ssd_has_no_attention():
    config = CONTENDERS["transxssm-ssd"].config(tiny_config())
    assert set(config.layer_types) == {"linear_attention"}
    assert tiny_config().layer_types.count("full_attention") == 1
