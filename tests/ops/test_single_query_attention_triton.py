"""The GPU's attention of one query is its formula: whatever the parts, the strides and the mask; the compiler takes it too."""

import pytest
import torch

from tests.gpu_kernels import DTYPES, TOLERANCE, counted
from tests.tolerances import assert_close
from transxssm.ops import single_query_attention
from transxssm.ops.single_query_attention import SINGLE_QUERY_ATTENTION


def by_formula(q, k, v, mask=None):
    scores = 0.3 * torch.einsum("bhqd,bhtd->bhqt", q.double(), k.double())
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e30)
    return torch.einsum("bhqt,bhtd->bhqd", scores.softmax(-1), v.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_processor", [1, 100])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 33, 8), (2, 1, 600, 24), (1, 2, 1030, 64)], ids=str)
@pytest.mark.parametrize("pads", ["none", "of rows", "of all"])
def test_attention_of_a_query(pads, shape, per_processor, dtype, device, kernels, monkeypatch):
    """Parts of keys are put together, keys behind the last one and hidden ones count for nothing, a row that sees none takes the mean."""
    monkeypatch.setattr(kernels.single_query_attention, "_PROGRAMS_PER_PROCESSOR", per_processor)
    calls = counted(monkeypatch, kernels.single_query_attention, "attend_once")
    batch, heads, length, head_dim = shape
    q = torch.randn(batch, heads, 1, head_dim, device=device).mul(2).to(dtype)
    k, v = torch.randn(2, batch, heads, length + 7, head_dim, device=device).mul(2).to(dtype)[..., :length, :]
    mask = None
    if pads != "none":
        mask = torch.rand(batch if pads == "of rows" else 1, 1, 1, length, device=device) < 0.7
        mask[0] = mask[0] & (torch.arange(length, device=device) > 300)  # whole blocks
    output = single_query_attention(q, k, v, mask, scaling=0.3)
    assert len(calls) == 1
    assert output.dtype == dtype
    assert_close(output, by_formula(q, k, v, mask), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("head_dim", "itemsize", "num_keys"),
    [(32, 2, 128), (64, 2, 128), (64, 4, 64), (128, 2, 64), (128, 4, 32), (256, 2, 32)],
)
def test_blocks_fit_into_a_processor(head_dim, itemsize, num_keys, kernels):
    assert kernels.single_query_attention._num_keys(head_dim * itemsize, torch.device("cpu")) == num_keys


def test_attention_reads_queries_as_projections_lay_them(device, kernels):
    q, k, v = torch.randn(3, 2, 5, 3, 8, device=device).transpose(2, 3)  # (b, h, t, d) out of (b, t, h, d)
    q = q[:, :, -1:]
    assert_close(single_query_attention(q, k, v, scaling=0.3), by_formula(q, k, v), torch.float32)
    apart = [torch.stack((tensor, tensor), dim=-1)[..., 0] for tensor in (q, k, v)]
    assert_close(single_query_attention(*apart, scaling=0.3), by_formula(q, k, v), torch.float32)


def test_shared_keys_are_left_to_others(device, kernels, monkeypatch):
    calls = counted(monkeypatch, kernels.single_query_attention, "attend_once")
    q, k = torch.randn(1, 4, 1, 8, device=device), torch.randn(1, 2, 5, 8, device=device)
    assert SINGLE_QUERY_ATTENTION.choose(None, q, k, k).name != "triton"
    expected = by_formula(q, *(k.repeat_interleave(2, dim=1),) * 2)
    assert_close(single_query_attention(q, k, k, scaling=0.3), expected, torch.float32)
    assert not calls


def test_no_rows_are_no_rows(device, kernels):
    q, k = torch.randn(0, 4, 1, 8, device=device), torch.randn(0, 4, 5, 8, device=device)
    assert single_query_attention(q, k, k, scaling=0.3).shape == q.shape


@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_scores_far_below_zero(scale, device, kernels, monkeypatch):
    """Parts that are missing from a block count for nothing, however low what is there."""
    monkeypatch.setattr(kernels.single_query_attention, "_PROGRAMS_PER_PROCESSOR", 100)
    q, k = torch.ones(1, 1, 1, 8, device=device), torch.randn(1, 1, 800, 8, device=device) - scale
    v = torch.randn(1, 1, 800, 8, device=device)
    assert_close(single_query_attention(q, k, v, scaling=0.3), by_formula(q, k, v), torch.float32, num_ops=100)


def test_a_mask_whose_numbers_lie_apart(device, kernels):
    q, k, v = torch.randn(3, 2, 2, 40, 8, device=device)
    q = q[:, :, -1:]
    mask = (torch.rand(2, 1, 1, 80, device=device) < 0.5)[..., ::2]
    mask[..., 0] = True
    assert_close(single_query_attention(q, k, v, mask, scaling=0.3), by_formula(q, k, v, mask), torch.float32)


@pytest.mark.parametrize("shape", [(2, 3, 1, 5), (2, 1, 1, 4), (3, 1, 1, 5), (2, 1, 2, 5), (2, 5)], ids=str)
def test_other_masks_are_refused(shape, device, kernels):
    q, k = torch.randn(2, 3, 1, 8, device=device), torch.randn(2, 3, 5, 8, device=device)
    with pytest.raises(ValueError, match=r"mask must have shape \(2 or 1, 1, 1, 5\): got"):
        single_query_attention(q, k, k, torch.ones(shape, dtype=torch.bool, device=device), scaling=0.3)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "fits"), [(128, torch.float32, True), (256, torch.float32, False), (256, torch.float16, True)]
)
def test_heads_of_which_no_block_fits_are_left_to_torch(head_dim, dtype, fits, device, kernels, monkeypatch):
    calls = counted(monkeypatch, kernels.single_query_attention, "attend_once")
    q = torch.zeros(1, 1, 1, head_dim, dtype=dtype, device=device)
    single_query_attention(q, q, q, scaling=0.3)
    assert len(calls) == fits


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_compiler_takes_it_as_an_operator(masked, device, kernels, monkeypatch):
    calls = counted(monkeypatch, kernels.single_query_attention, "attend_once")
    q, k, v = torch.randn(3, 2, 3, 700, 8, device=device)
    q = q[:, :, :1].transpose(1, 2).contiguous().transpose(1, 2)
    mask = torch.rand(2, 1, 1, 700, device=device) < 0.7 if masked else None
    torch.compiler.reset()
    compiled = torch.compile(single_query_attention, fullgraph=True, backend="aot_eager")
    assert_close(compiled(q, k, v, mask, scaling=0.3), by_formula(q, k, v, mask), torch.float32)
    assert len(calls) == 1
    operator = torch.ops.transxssm.single_query_attention.default
    torch.library.opcheck(operator, (q, k, v, mask, 0.3), test_utils=("test_schema", "test_faketensor"))
