"""The model as a graph of torch's own operations, for any length: `torch.export`, and ONNX made of it."""

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from tests.models.tiny import VOCAB_SIZE, logits_of, one_of_each, pad_rows, tiny_model, tokens
from tests.tolerances import assert_close
from transxssm import TransXSSMForCausalLM

SHAPE = {0: Dim("batch", max=64), 1: Dim("length", min=8, max=4096)}
LENGTHS = (8, 33)  # the chunks are of 4 tokens


def exported(model: TransXSSMForCausalLM, **inputs: Tensor) -> ExportedProgram:
    shapes = {**dict.fromkeys(inputs, SHAPE), "use_cache": None}
    with torch.no_grad():
        return torch.export.export(model, (), {**inputs, "use_cache": False}, dynamic_shapes=shapes)


def own_operators(program: ExportedProgram) -> list[str]:
    """What a program would need this package for."""
    return [str(node.target) for node in program.graph.nodes if "transxssm" in str(node.target)]


def padded(length: int) -> tuple[Tensor, Tensor]:
    """A row without pads, one with some on the left and one with some on the right."""
    return pad_rows([tokens(1, size, seed=size)[0] for size in (length, length - 3, length - 1)], [0, 3, 0], length)


@pytest.mark.parametrize("variant", ["hybrid", "everything"])
def test_any_length_with_pads(variant):
    model = tiny_model(variant, dtype=torch.float32, **one_of_each(variant))
    ids, mask = padded(11)
    program = exported(model, input_ids=ids, attention_mask=mask)
    assert own_operators(program) == []
    for length in LENGTHS:
        ids, mask = padded(length)
        expected = logits_of(model, ids, attention_mask=mask, use_cache=False)
        with torch.no_grad():
            logits = program.module()(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert_close(logits[mask.bool()], expected[mask.bool()], torch.float32)


def test_any_length_with_documents():
    model, ids = tiny_model("everything", dtype=torch.float32), tokens(2, 11)
    program = exported(model, input_ids=ids, seq_idx=torch.zeros_like(ids))
    assert own_operators(program) == []
    for length in LENGTHS:
        ids = tokens(3, length)
        documents = (torch.arange(length) >= torch.tensor([[3], [4], [length]])).long()
        expected = logits_of(model, ids, seq_idx=documents, use_cache=False)
        with torch.no_grad():
            logits = program.module()(input_ids=ids, seq_idx=documents, use_cache=False).logits
        assert_close(logits, expected, torch.float32)


def test_half_precision_needs_no_kernel_of_ours_either():
    """Attention in bfloat16 has operators on CPUs that multiply it, for heads of 32."""
    model = tiny_model("everything", dtype=torch.bfloat16, hidden_size=64, num_attention_heads=2)
    program = exported(model, input_ids=tokens(2, 21))
    assert own_operators(program) == []
    ids = tokens(3, 33)
    with torch.no_grad():
        logits = program.module()(input_ids=ids, use_cache=False).logits
    assert (logits - logits_of(model, ids)).norm() < 0.05 * logits.norm()


@pytest.mark.slow
def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    model, ids = tiny_model("everything", dtype=torch.float32), tokens(2, 21)
    torch.onnx.export(exported(model, input_ids=ids), f=tmp_path / "model.onnx", dynamo=True)
    graph = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(graph)
    assert {node.domain for node in graph.graph.node} == {""}  # ONNX's own operators
    evaluator = reference.ReferenceEvaluator(graph)
    for length in LENGTHS:
        ids = tokens(3, length)
        (logits,) = evaluator.run(None, {"input_ids": ids.numpy()})
        assert logits.shape == (3, length, VOCAB_SIZE)
        assert_close(torch.from_numpy(logits), logits_of(model, ids), torch.float32)
