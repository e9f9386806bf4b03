"""The laws of the model with one SSD and one attention layer of the paper's widths, on the device of `--device`.

The other tests of the models run at widths of a few numbers, in float64 on a CPU. Here both kinds of layer are as wide as the
presets', in the dtypes that models are trained and served in, with the kernels that the device has for them. A CPU runs the same
tests with narrow layers, so that they are known to work before a GPU is at hand.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from tests.models.tiny import gradients_of, logits_of, pad_rows
from tests.real_sizes import COMPILER, DTYPES, PRESETS, documents_of
from tests.tolerances import NEGLIGIBLE, assert_close, tolerance
from transxssm import TransXSSMCache, TransXSSMConfig, TransXSSMForCausalLM

LENGTH = {"cuda": 2048, "cpu": 150}
CPU_SIZES = {
    "320m": {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 160, "vocab_size": 101},
    "1.3b": {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 320, "vocab_size": 203},
}
NUM_STEPS = 5
FORWARD_OPS = 5  # two mixers, two feed-forward networks, the head
BACKWARD_OPS = 2 * FORWARD_OPS  # a gradient goes through all of them twice


def real_model(preset: str, dtype: torch.dtype, device: torch.device) -> TransXSSMForCausalLM:
    """Two layers of the preset's width, in evaluation mode; the same weights at every call.

    Weights are drawn so that a product is about as large as what goes in: every layer moves the logits at any width.
    """
    sizes = CPU_SIZES[preset] if device.type == "cpu" else {}
    width = TransXSSMConfig.from_preset(preset, **sizes).hidden_size
    config = TransXSSMConfig.from_preset(
        preset,
        **sizes,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        initializer_range=width**-0.5,
    )
    torch.manual_seed(1)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture
def model(preset, dtype, device) -> TransXSSMForCausalLM:
    return real_model(preset, dtype, device)


def tokens(model: TransXSSMForCausalLM, batch: int = 1) -> Tensor:
    """(b, t) random ids, as many as the device takes."""
    length = LENGTH[model.device.type]
    return torch.randint(model.config.vocab_size, (batch, length), device=model.device)


def packed_row(model: TransXSSMForCausalLM) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Documents, and the row that holds them: ids, seq_idx and labels, in which no document's first token counts."""
    ids = tokens(model)
    lengths = documents_of(ids.shape[1])
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None].to(ids.device)
    is_first = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
    return ids.split(lengths, dim=1), {
        "input_ids": ids,
        "seq_idx": numbers,
        "labels": ids.masked_fill(is_first, -100),
    }


def loss_and_gradients(model: TransXSSMForCausalLM, loss_of: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = loss_of()
    loss.backward()
    return loss.detach(), gradients_of(model)


def size_of_dt_terms(model: TransXSSMForCausalLM, loss_of: Callable[[], Tensor]) -> float:
    """The size of the terms that the gradients of A_log and dt_bias sum.

    Each has one number a head, a sum over all tokens in which terms of both signs cancel. dt_bias sums what reaches the output of
    dt_proj, and A_log, which meets the tokens in dt·A alone, sums terms of that size.
    """
    sizes = []

    def measure(_module: nn.Module, _inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        sizes.append(outputs[0].double().abs().sum((0, 1)))

    handle = model.model.layers[0].ssd.dt_proj.register_full_backward_hook(measure)
    loss_and_gradients(model, loss_of)
    handle.remove()
    return sizes[0].norm().item()


def assert_equal_gradients(
    actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype, dt_terms: float
) -> None:
    for name, gradient in expected.items():
        scale = dt_terms if name.endswith(("A_log", "dt_bias")) else NEGLIGIBLE
        assert actual[name].isfinite().all(), name
        assert_close(actual[name], gradient, dtype, name, scale, num_ops=BACKWARD_OPS)


@DTYPES
@PRESETS
def test_prefill_and_decoding_are_one_pass(model, dtype):
    ids = tokens(model)
    prompt = ids.shape[1] - NUM_STEPS
    cache = TransXSSMCache(config=model.config)
    pieces = ids.split([prompt] + [1] * NUM_STEPS, dim=1)
    decoded = [logits_of(model, piece, past_key_values=cache, logits_to_keep=1) for piece in pieces]
    whole = logits_of(model, ids, use_cache=False, logits_to_keep=NUM_STEPS + 1)
    assert_close(torch.cat(decoded, dim=1), whole, dtype, num_ops=FORWARD_OPS)


@DTYPES
@PRESETS
def test_packed_logits_are_those_of_separate_documents(model, dtype):
    documents, row = packed_row(model)
    packed = logits_of(model, row["input_ids"], seq_idx=row["seq_idx"], use_cache=False)
    separate = [logits_of(model, document, use_cache=False) for document in documents]
    assert_close(packed, torch.cat(separate, dim=1), dtype, num_ops=FORWARD_OPS)


@DTYPES
@PRESETS
def test_packed_gradients_are_those_of_separate_documents(model, dtype):
    documents, row = packed_row(model)
    num_labels = (row["labels"] != -100).sum()

    def separate() -> Tensor:
        losses = [
            model(document, labels=document, num_items_in_batch=num_labels, skip_logits=True).loss
            for document in documents
            if document.shape[1] > 1
        ]
        return sum(losses)

    def packed() -> Tensor:
        return model(**row, skip_logits=True).loss

    loss, gradients = loss_and_gradients(model, packed)
    wanted_loss, wanted = loss_and_gradients(model, separate)
    assert_close(loss, wanted_loss, dtype, num_ops=FORWARD_OPS)
    assert_equal_gradients(gradients, wanted, dtype, size_of_dt_terms(model, packed))


@DTYPES
@PRESETS
def test_a_padded_batch_is_each_row_alone(model, dtype):
    """Prompts with pads on both sides, and what is decoded after them: pads on the right stand between a state and its next token."""
    ids = tokens(model, batch=2)
    prompt = ids.shape[1] - NUM_STEPS
    short, left = prompt // 2 | 1, prompt // 3
    rows = [ids[0, :prompt], ids[1, :short]]
    padded, mask = (tensor.to(ids.device) for tensor in pad_rows(rows, [0, left], prompt))
    cache = TransXSSMCache(config=model.config)
    logits = [logits_of(model, padded, attention_mask=mask, past_key_values=cache)]
    for step in ids[:, prompt:].split(1, dim=1):
        mask = F.pad(mask, (0, 1), value=1)
        logits.append(logits_of(model, step, attention_mask=mask, past_key_values=cache))
    for row, after, got, is_real in zip(rows, ids[:, prompt:], torch.cat(logits, dim=1), mask.bool(), strict=True):
        alone = logits_of(model, torch.cat((row, after))[None], use_cache=False)[0]
        assert_close(got[is_real], alone, dtype, f"{len(row)} tokens", num_ops=FORWARD_OPS)


@DTYPES
@pytest.mark.parametrize("preset", ["320m"])
def test_compiles_as_one_graph(model, dtype, device):
    _, row = packed_row(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=COMPILER[device.type])

    def loss_of(function: Callable) -> Callable[[], Tensor]:
        return lambda: function(**row, skip_logits=True, use_cache=False).loss

    wanted_loss, wanted = loss_and_gradients(model, loss_of(model))
    loss, gradients = loss_and_gradients(model, loss_of(compiled))
    assert_close(loss, wanted_loss, dtype, num_ops=FORWARD_OPS)
    assert_equal_gradients(gradients, wanted, dtype, size_of_dt_terms(model, loss_of(model)))


@DTYPES
@PRESETS
def test_two_trainings_are_equal_to_the_bit(preset, dtype, device):
    """With attention as plain products: the backward passes of its fused kernels on GPUs add in no fixed order."""

    def trained() -> tuple[list[float], list[Tensor]]:
        model = real_model(preset, dtype, device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        torch.manual_seed(2)
        for _ in range(2):
            loss = model(**packed_row(model)[1]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, [parameter.detach() for parameter in model.parameters()]

    with sdpa_kernel(SDPBackend.MATH):
        losses, parameters = trained()
        losses_again, parameters_again = trained()
    assert losses == losses_again
    assert losses[0] != losses[1]
    assert all(torch.equal(one, other) for one, other in zip(parameters, parameters_again, strict=True))


def generate(model: TransXSSMForCausalLM, ids: Tensor, use_cache: bool) -> Tensor:
    return model.generate(ids, do_sample=False, max_new_tokens=NUM_STEPS, use_cache=use_cache)


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@PRESETS
def test_greedy_tokens_with_a_cache_are_those_without(model):
    ids = tokens(model)
    assert torch.equal(generate(model, ids, use_cache=True), generate(model, ids, use_cache=False))


@DTYPES
@PRESETS
def test_greedy_tokens_are_the_likeliest_of_one_pass(model, dtype):
    """Up to rounding: in bfloat16 the two largest of 50 000 logits are often the same number."""
    sequence = generate(model, tokens(model), use_cache=True)
    logits = logits_of(model, sequence, use_cache=False, logits_to_keep=NUM_STEPS + 1)[:, :-1].float()
    chosen = logits.gather(-1, sequence[:, -NUM_STEPS:, None])[..., 0]
    missed = logits.amax(-1) - chosen
    assert missed.max() <= 2 * tolerance(dtype, FORWARD_OPS) * logits.abs().max()
