"""A text fed in pieces is the text fed at once: every split, token by token, with pads, and in each kind of cache."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin

from tests.models.tiny import (
    ALL_VARIANTS,
    WITH_ATTENTION,
    combinations,
    logits_of,
    one_of_each,
    pad_rows,
    tiny_config,
    tiny_model,
    tokens,
    transformers_is_wrong,
)
from tests.tolerances import assert_close
from transxssm import TransXSSMCache, TransXSSMForCausalLM
from transxssm.models.cache_transxssm import GrowingLayer
from transxssm.ops import ssd_step_

LENGTH = 10


def in_pieces(model: TransXSSMForCausalLM, ids: Tensor, pieces: list[int], cache: Cache, mask: Tensor | None = None):
    """Logits of `ids` fed in calls of `pieces` tokens."""
    logits, end = [], 0
    for piece in pieces:
        end += piece
        so_far = None if mask is None else mask[:, :end]
        logits.append(logits_of(model, ids[:, end - piece : end], past_key_values=cache, attention_mask=so_far))
    assert end == ids.shape[1]
    return torch.cat(logits, dim=1)


SPLITS = [[split, LENGTH - split] for split in range(1, LENGTH)] + [[1] * LENGTH, [3, 1, 1, 4, 1], [5] + [1] * 5]


@pytest.mark.parametrize("variant", ALL_VARIANTS)
class TestPieces:
    def test_every_split(self, variant):
        model, ids = tiny_model(variant), tokens(2, LENGTH)
        whole = logits_of(model, ids, use_cache=False)
        for pieces in SPLITS:
            logits = in_pieces(model, ids, pieces, TransXSSMCache(config=model.config))
            assert_close(logits, whole, torch.float64, name=f"pieces of {pieces}")

    def test_every_split_of_a_left_padded_batch(self, variant):
        model = tiny_model(variant)
        rows = [tokens(1, length, seed=length)[0] for length in (LENGTH, 4, 7)]
        ids, mask = pad_rows(rows, left=[0, LENGTH - 4, LENGTH - 7], width=LENGTH)
        alone = [logits_of(model, row[None], use_cache=False)[0] for row in rows]
        for pieces in SPLITS:
            logits = in_pieces(model, ids, pieces, TransXSSMCache(config=model.config), mask)
            for expected, got in zip(alone, logits, strict=True):
                name = f"{len(expected)} tokens in pieces of {pieces}"
                assert_close(got[-len(expected) :], expected, torch.float64, name=name)

    def test_counts_its_tokens_and_starts_again_after_reset(self, variant):
        if transformers_is_wrong(variant, WITH_ATTENTION):
            pytest.skip("this transformers does not reset a dynamic cache")
        model, ids = tiny_model(variant), tokens(2, LENGTH)
        cache = TransXSSMCache(config=model.config)
        assert cache.get_seq_length() == 0
        first = in_pieces(model, ids, [3, 1, 6], cache)
        assert cache.get_seq_length() == LENGTH
        cache.reset()
        assert cache.get_seq_length() == 0
        assert_close(in_pieces(model, ids, [3, 1, 6], cache), first, torch.float64)


@pytest.mark.parametrize("variant", WITH_ATTENTION)
@pytest.mark.parametrize("pieces", [[6, 4], [1] * LENGTH, [4, 1, 5]], ids=str)
def test_caches_of_transformers(variant, pieces):
    model, ids = tiny_model(variant), tokens(2, LENGTH)
    whole = logits_of(model, ids, use_cache=False)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LENGTH + 3)):
        assert_close(in_pieces(model, ids, pieces, cache), whole, torch.float64, name=type(cache).__name__)


@pytest.mark.parametrize("window", [1, 2, LENGTH + 5])
def test_windows_of_any_width(window):
    """The narrowest sees a token itself and keeps nothing."""
    model, ids = tiny_model("sliding", sliding_window=window), tokens(2, LENGTH)
    whole = logits_of(model, ids, use_cache=False)
    for pieces in ([5, 5], [4, 1, 5], [1] * LENGTH):
        cache = TransXSSMCache(config=model.config)
        assert_close(in_pieces(model, ids, pieces, cache), whole, torch.float64, name=str(pieces))
        assert cache.layers[1].keys.shape[2] == min(window - 1, LENGTH)


def test_a_forward_call_returns_a_cache_that_goes_on():
    model, ids = tiny_model(), tokens(2, LENGTH)
    with torch.no_grad():
        first = model(ids[:, :6], use_cache=True)
        second = model(ids[:, 6:], past_key_values=first.past_key_values)
        assert model(ids[:, :6], use_cache=False).past_key_values is None
    assert isinstance(first.past_key_values, TransXSSMCache)
    assert_close(second.logits, logits_of(model, ids)[:, 6:], torch.float64)


def test_gradients_flow_through_a_cached_state():
    """Calls in a row build one graph, although the cache overwrites its states in place."""
    model, ids = tiny_model("convolution"), tokens(1, LENGTH)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    (whole,) = torch.autograd.grad(model(inputs_embeds=embeds).logits[:, -1].square().sum(), embeds)
    cache = TransXSSMCache(config=model.config)
    for piece in embeds.split([4, 3, 1, 2], dim=1):
        logits = model(inputs_embeds=piece, past_key_values=cache).logits
    (pieces,) = torch.autograd.grad(logits[:, -1].square().sum(), embeds)
    assert_close(pieces, whole, torch.float64)


@pytest.mark.parametrize("variant", ["all_ssd", "all_ssd_mamba2"])
def test_compiled_layers_share_one_graph_a_call(variant):
    """A prompt and two tokens: two graphs, whatever the number of layers, and the same logits."""
    model, ids, graphs = tiny_model(variant), tokens(2, LENGTH), []
    pieces = [LENGTH - 2, 1, 1]
    expected = in_pieces(model, ids, pieces, TransXSSMCache(config=model.config))

    def count(graph: GraphModule, inputs: list[Tensor]) -> GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    for layer in model.model.layers:
        layer.compile(backend=count)
    logits = in_pieces(model, ids, pieces, TransXSSMCache(config=model.config))
    assert len(graphs) == 2, "one of the prompt, one of a token"
    assert_close(logits, expected, torch.float64)


@pytest.mark.parametrize(
    ("variant", "given"),
    [("hybrid", {}), ("everything", {"position_ids": torch.full((2, 1), LENGTH - 1)})],
    ids=["no positions", "positions"],
)
def test_a_token_after_a_static_cache_compiles_as_one_graph(variant, given):
    """As `generate` does on a GPU with cache_implementation="static"."""
    model, ids = tiny_model(variant, **one_of_each(variant)), tokens(2, LENGTH)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 3)
    expected = logits_of(model, ids)[:, -1:]
    logits_of(model, ids[:, :-1], past_key_values=cache)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        got = compiled(ids[:, -1:], past_key_values=cache, **given).logits
    assert_close(got, expected, torch.float64)


@pytest.mark.parametrize("cache", [DynamicCache(), DynamicCache(config=LlamaConfig(num_hidden_layers=8))])
def test_refuses_a_cache_of_another_model(cache):
    with pytest.raises(
        ValueError, match=r"must be made from the model's config, as TransXSSMCache\(config=model\.config\) is: got"
    ):
        tiny_model("hybrid")(tokens(1, 3), past_key_values=cache)


def ssd_bytes(cache: Cache) -> int:
    states = [
        state
        for layer in cache.layers
        if isinstance(layer, LinearAttentionCacheLayerMixin)
        for state in (*layer.recurrent_states.values(), *layer.conv_states.values())
        if state is not None
    ]
    return sum(state.untyped_storage().nbytes() for state in states)


@pytest.mark.parametrize("variant", ["hybrid", "all_ssd_mamba2"])
def test_ssd_memory_is_constant_in_length(variant):
    model = tiny_model(variant, dtype=torch.float32, ssd_chunk_size=None)
    sizes = {}
    for length in (16, 4096):
        cache = TransXSSMCache(config=model.config)
        with torch.no_grad():
            model(tokens(1, length), past_key_values=cache, logits_to_keep=1)
        sizes[length] = ssd_bytes(cache)
    config = model.config
    num_ssd_layers = config.layer_types.count("linear_attention")
    state = config.ssd_num_heads * config.ssd_head_dim * config.ssd_state_size
    channels = config.ssd_num_heads * config.ssd_head_dim + 2 * config.ssd_num_groups * config.ssd_state_size
    window = channels * max(config.ssd_conv_kernel_size - 1, 0)
    assert sizes[16] == sizes[4096] == 4 * num_ssd_layers * (state + window)  # float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_without_gradients_is_written_over_the_old_state(dtype, monkeypatch):
    model, ids, states = tiny_model(dtype=dtype), tokens(2, 3), []

    def spy(state, *arguments, **options):
        states.append(state)
        return ssd_step_(state, *arguments, **options)

    monkeypatch.setattr("transxssm.models.ssd_mixer.ssd_step_", spy)
    cache = TransXSSMCache(config=model.config)
    logits_of(model, ids[:, :-1], past_key_values=cache)
    assert not states
    logits_of(model, ids[:, -1:], past_key_values=cache)
    of_layers = [cache.layers[index].recurrent_states[0] for index in (0, 2)]
    assert [state.data_ptr() for state in states] == [state.data_ptr() for state in of_layers]
    model(ids[:, -1:], past_key_values=cache).logits.sum().backward()
    assert len(states) == 2


def test_a_state_of_another_precision_is_replaced():
    """A cache that somebody has rounded to save memory goes on, in its own format."""
    model, ids = tiny_model(dtype=torch.float32), tokens(2, LENGTH)
    cache = TransXSSMCache(config=model.config)
    logits_of(model, ids[:, :-1], past_key_values=cache)
    for index in (0, 2):
        cache.layers[index].recurrent_states[0] = cache.layers[index].recurrent_states[0].bfloat16()
    got = logits_of(model, ids[:, -1:], past_key_values=cache)
    assert cache.layers[0].recurrent_states[0].dtype == torch.bfloat16
    assert_close(got, logits_of(model, ids)[:, -1:], torch.bfloat16, num_ops=4)


def test_states_are_float32_in_a_bfloat16_model():
    model = tiny_model("convolution", dtype=torch.bfloat16)
    cache = TransXSSMCache(config=tiny_config("convolution"))
    logits_of(model, tokens(2, 5), past_key_values=cache)
    logits_of(model, tokens(2, 1), past_key_values=cache)
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32


def filled(layer: GrowingLayer, num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`num_tokens` random keys and values, appended one by one."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, 3, num_tokens, 4, generator=generator).unbind(0)
    for t in range(num_tokens):
        layer.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    return keys, values


def test_a_token_is_written_in_place_and_the_rest_stays_where_it_is():
    layer = GrowingLayer()
    filled(layer, 1)
    copies, where = 0, layer.keys.data_ptr()
    for _ in range(1000):
        layer.update(torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4))
        copies += layer.keys.data_ptr() != where
        where = layer.keys.data_ptr()
    assert layer.get_seq_length() == 1001
    assert copies <= 12  # each at least a quarter farther on than the one before
    assert layer.keys.untyped_storage().nbytes() <= 1.5 * layer.keys.nbytes


def drop_first_tokens(layer: DynamicLayer) -> None:
    """Views of the same strides that no longer begin where the buffers do."""
    layer.keys, layer.values = layer.keys[..., 2:, :], layer.values[..., 2:, :]


@pytest.mark.parametrize(
    "change",
    [
        drop_first_tokens,
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.crop(-3),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
    ],
    ids=["drop", "reorder", "crop", "repeat", "select"],
)
def test_grows_on_after_its_rows_were_changed(change):
    """The same as transformers' layer, which copies everything at every token."""
    growing, plain = GrowingLayer(), DynamicLayer()
    for layer in (growing, plain):
        filled(layer, 7)
        change(layer)
        new = torch.randn(2, layer.keys.shape[0], 3, 2, 4, generator=torch.Generator().manual_seed(1))
        layer.update(*new.unbind(0))
    assert torch.equal(growing.keys, plain.keys)
    assert torch.equal(growing.values, plain.values)


def test_a_copied_cache_goes_its_own_way():
    original = GrowingLayer()
    keys, values = filled(original, 5)
    copied = copy.deepcopy(original)
    original.update(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4))
    copied.update(torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4))
    for layer, last in ((original, 1.0), (copied, 0.0)):
        assert torch.equal(layer.keys[:, :, :5], keys)
        assert torch.equal(layer.values[:, :, :5], values)
        assert (layer.keys[:, :, 5] == last).all()


@pytest.mark.parametrize("variant", ["hybrid", "sliding", "mamba2", "all_ssd_mamba2", "grouped_queries"])
@pytest.mark.parametrize("autocast", [[True, False, False], [False, True, False]], ids=["then without", "then with"])
def test_a_cache_made_under_autocast_goes_on_without(variant, autocast):
    """Nothing is rounded to the cache's first format: as in transformers' cache, the wider one stays."""
    model, ids, logits = tiny_model(variant, dtype=torch.float32), tokens(2, LENGTH), []
    cache = TransXSSMCache(config=model.config)
    for piece, is_on in zip(ids.split([7, 2, 1], dim=1), autocast, strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            logits.append(logits_of(model, piece, past_key_values=cache))
    assert_close(torch.cat(logits, dim=1).float(), logits_of(model, ids), torch.bfloat16, num_ops=16)
    for layer in cache.layers:
        kept = (layer.keys, layer.values) if isinstance(layer, DynamicLayer) else (layer.conv_states[0],)
        assert all(tensor is None or tensor.dtype == torch.float32 for tensor in kept)


PACKED = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 2, 2]])


CHANGES_OF_ROWS = {
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
}


@pytest.mark.parametrize(("variant", "kind", "packed"), combinations(CHANGES_OF_ROWS, [False, True]))
def test_rows_of_a_cache_go_on_as_they_were(variant, kind, packed):
    """In keys, windows, states, convolutions and the starts of documents."""
    change, rows = CHANGES_OF_ROWS[kind]
    marks = {"seq_idx": PACKED} if packed else {}
    model, ids, more = tiny_model(variant), tokens(3, 6), tokens(len(rows), 3, seed=1)
    cache = TransXSSMCache(config=model.config)
    logits_of(model, ids, past_key_values=cache, **marks)
    change(cache)
    got = in_pieces(model, more, [1, 2], cache)
    marks = {name: mark[rows] for name, mark in marks.items()}
    expected = TransXSSMCache(config=model.config)
    logits_of(model, ids[rows], past_key_values=expected, **marks)
    assert_close(got, in_pieces(model, more, [1, 2], expected), torch.float64)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
class TestSnapshots:
    def test_what_was_read_is_taken_back(self, variant):
        """As often as one likes, by calls of one token and of several, from a snapshot of nothing too."""
        model, ids = tiny_model(variant), tokens(2, LENGTH)
        cache = TransXSSMCache(config=model.config)
        empty = cache.snapshot()
        first = in_pieces(model, ids, [1, 5, 4], cache)
        cache.restore(empty)
        assert cache.get_seq_length() == 0
        logits_of(model, ids[:, :6], past_key_values=cache)
        snapshot = cache.snapshot()
        for seed, pieces in enumerate(([1, 1, 2], [4], [1, 3])):
            in_pieces(model, tokens(2, 4, seed=seed + 1), pieces, cache)
            cache.restore(snapshot)
            assert cache.get_seq_length() == snapshot.num_tokens == 6
        assert_close(in_pieces(model, ids[:, 6:], [1, 3], cache), first[:, 6:], torch.float64)

    def test_its_size_is_the_same_at_any_length(self, variant):
        model = tiny_model(variant)
        sizes = []
        for length in (6, 60):
            cache = TransXSSMCache(config=model.config)
            logits_of(model, tokens(1, length), past_key_values=cache)
            sizes.append(cache.snapshot().num_bytes)
        assert sizes[0] == sizes[1]
        assert (sizes[0] == 0) == (variant == "all_attention")

    def test_a_saved_cache_goes_on(self, variant, tmp_path):
        """Bit by bit, packed rows and copies included."""
        model, ids = tiny_model(variant), tokens(3, 6)
        cache = TransXSSMCache(config=model.config)
        logits_of(model, ids, past_key_values=cache, seq_idx=PACKED)
        cache.save(tmp_path / "text.safetensors", model)
        loaded = TransXSSMCache.load(tmp_path / "text.safetensors", model)
        assert loaded.get_seq_length() == 6
        more = tokens(3, 4, seed=1)
        expected = in_pieces(model, more, [1, 3], cache)
        assert torch.equal(in_pieces(model, more, [1, 3], loaded), expected)
        again = TransXSSMCache.load(tmp_path / "text.safetensors", model)
        snapshot = again.snapshot()
        in_pieces(model, tokens(3, 2, seed=2), [2], again)
        again.restore(snapshot)
        assert torch.equal(in_pieces(model, more, [1, 3], again), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache, _: cache.batch_repeat_interleave(2),
        lambda cache, _: cache.batch_select_indices(torch.tensor([0])),
        lambda cache, _: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache, _: cache.reset(),
        lambda cache, earlier: cache.restore(earlier),
    ],
    ids=["repeat", "select", "reorder", "reset", "restore"],
)
def test_a_snapshot_that_no_longer_fits_is_refused(change):
    model = tiny_model()
    cache = TransXSSMCache(config=model.config)
    logits_of(model, tokens(2, 3), past_key_values=cache)
    earlier = cache.snapshot()
    logits_of(model, tokens(2, 3), past_key_values=cache)
    later = cache.snapshot()
    with pytest.raises(ValueError, match="of another cache"):
        copy.deepcopy(cache).restore(later)
    cache.restore(later)
    change(cache, earlier)
    with pytest.raises(ValueError, match="the snapshot of 6 tokens no longer fits"):
        cache.restore(later)


def test_a_snapshot_before_tokens_were_cropped_is_refused():
    model = tiny_model("all_attention")
    cache = TransXSSMCache(config=model.config)
    logits_of(model, tokens(2, 6), past_key_values=cache)
    snapshot = cache.snapshot()
    cache.crop(-1)
    with pytest.raises(ValueError, match="no longer fits"):
        cache.restore(snapshot)


class TestFiles:
    @pytest.fixture
    def path(self, tmp_path):
        model, path = tiny_model(), tmp_path / "text.safetensors"
        cache = TransXSSMCache(config=model.config)
        logits_of(model, tokens(1, 6), past_key_values=cache)
        cache.save(path, model)
        return path

    @pytest.mark.parametrize(
        "another",
        [
            {"dtype": torch.float32},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
            {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
        ],
        ids=["dtype", "rotation", "layers"],
    )
    def test_another_models_is_refused(self, another, path):
        with pytest.raises(ValueError, match="is another model's: got fingerprint"):
            TransXSSMCache.load(path, tiny_model(**another))

    def test_that_of_other_weights_is_refused(self, path):
        model = tiny_model()
        with torch.no_grad():
            model.model.layers[2].ssd.out_proj.weight.mul_(1.001)
        with pytest.raises(ValueError, match="is another model's: got fingerprint"):
            TransXSSMCache.load(path, model)

    def test_what_is_no_cache_is_refused(self, path, tmp_path):
        model = tiny_model()
        with pytest.raises(ValueError, match=r"absent.*cannot be read"):
            TransXSSMCache.load(tmp_path / "absent", model)
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(ValueError, match="cannot be read"):
            TransXSSMCache.load(path, model)
        model.save_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match="holds no cache: got format"):
            TransXSSMCache.load(tmp_path / "model" / "model.safetensors", model)


class TestCrop:
    def test_takes_tokens_back_where_all_layers_attend(self):
        model, ids = tiny_model("all_attention"), tokens(2, LENGTH)
        cache = TransXSSMCache(config=model.config)
        logits_of(model, torch.cat((ids[:, :6], tokens(2, 3, seed=1)), dim=1), past_key_values=cache)
        cache.crop(-3)
        assert_close(in_pieces(model, ids[:, 6:], [4], cache), logits_of(model, ids)[:, 6:], torch.float64)

    @pytest.mark.parametrize("variant", ["hybrid", "all_ssd"])
    def test_refuses_to_take_tokens_out_of_a_state(self, variant):
        """And changes nothing: attention would otherwise have forgotten what the states remember."""
        model, ids = tiny_model(variant), tokens(2, LENGTH)
        cache = TransXSSMCache(config=model.config)
        logits_of(model, ids[:, :6], past_key_values=cache)
        with pytest.raises(ValueError, match=r"crop\(-2\) would take back tokens that the states .*restore\(\)"):
            cache.crop(-2)
        cache.crop(0)
        assert not cache.is_croppable
        assert_close(in_pieces(model, ids[:, 6:], [4], cache), logits_of(model, ids)[:, 6:], torch.float64)

    def test_refuses_to_go_back_into_an_earlier_document(self):
        model, cache = tiny_model("all_attention"), TransXSSMCache(config=tiny_config("all_attention"))
        logits_of(model, tokens(3, 6), past_key_values=cache, seq_idx=PACKED)
        with pytest.raises(ValueError, match=r"before a packed row's last document: got 6 .* from \[3, 0, 4\] on"):
            cache.crop(-4)


@pytest.mark.parametrize("variant", ["hybrid", "all_attention", "all_ssd"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_to_read_is_refused(variant, shape):
    with pytest.raises(
        ValueError, match=rf"expected one row and one token or more: got \(b, t\) = \({shape[0]}, {shape[1]}\)"
    ):
        tiny_model(variant)(torch.zeros(shape, dtype=torch.long))


def compiled_graphs(model: nn.Module, cache: Cache) -> int:
    """How many graphs a prompt and 24 tokens of two rows make, none of them broken."""
    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
    for t in range(25):
        logits_of(compiled, tokens(2, 9 if t == 0 else 1), past_key_values=cache)
    return len(graphs)


@pytest.fixture(scope="module")
def graphs_of_llama() -> int:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)).eval()
    return compiled_graphs(llama, DynamicCache(config=llama.config))


@pytest.mark.parametrize("variant", ["convolution", "all_ssd"])
def test_decoding_makes_as_few_graphs_as_llama(variant, graphs_of_llama):
    model = tiny_model(variant, **one_of_each(variant))
    assert compiled_graphs(model, TransXSSMCache(config=model.config)) <= graphs_of_llama


@pytest.mark.parametrize(("variant", "is_prompt_compiled"), [("hybrid", True), ("everything", False)])
def test_a_compiled_step_appends_what_an_uncompiled_one_does(variant, is_prompt_compiled):
    model, ids = tiny_model(variant, **one_of_each(variant)), tokens(2, LENGTH)
    cache = TransXSSMCache(config=model.config)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    logits = logits_of(compiled if is_prompt_compiled else model, ids[:, :5], past_key_values=cache)
    steps = [logits_of(compiled, ids[:, t : t + 1], past_key_values=cache) for t in (5, 6, 7)]
    rest = in_pieces(model, ids[:, 8:], [1, 1], cache)
    assert_close(torch.cat((logits, *steps, rest), dim=1), logits_of(model, ids), torch.float64)


@pytest.mark.parametrize("variant", ["convolution", "all_ssd"])
def test_an_exported_step_has_no_room_among_its_outputs(variant):
    """As transformers' exporter takes a cache to pieces: every tensor in it is filled, and the program is right for another text."""
    exporters = pytest.importorskip("transformers.exporters.exporter_dynamo")
    model, ids = tiny_model(variant, dtype=torch.float32, **one_of_each(variant)), tokens(2, LENGTH)

    def inputs(seed: int) -> dict[str, Any]:
        cache = TransXSSMCache(config=model.config)
        logits_of(model, tokens(2, 6, seed=seed), past_key_values=cache)
        logits_of(model, tokens(2, 1, seed=seed), past_key_values=cache)  # in place, with room behind
        return {"input_ids": ids[:, :1], "position_ids": torch.full((2, 1), 7), "past_key_values": cache}

    program, _ = exporters.DynamoExporter().export_program(model, inputs(0), exporters.DynamoConfig())
    leaves, _ = exporters._pytree_flatten(inputs(0)["past_key_values"])
    num_tokens = {leaf.shape[-2] for leaf in leaves if leaf.dim() == 4 and leaf.dtype == torch.float32}
    config = model.config
    assert num_tokens <= {7, config.ssd_head_dim}
    with torch.no_grad():
        got, expected = program.module()(**copy.deepcopy(inputs(1))), model(**inputs(1))
    assert_close(got.logits, expected.logits, torch.float32, num_ops=4)
    for one, other in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        if isinstance(other, DynamicLayer):
            assert_close(one.keys, other.keys, torch.float32, num_ops=4)


class TestStatesAlone:
    """Caches that hold no keys count their tokens on their states."""

    @pytest.fixture(params=["all_ssd", "all_ssd_mamba2"])
    def model(self, request) -> TransXSSMForCausalLM:
        return tiny_model(request.param)

    @pytest.fixture(params=[DynamicCache, functools.partial(StaticCache, max_cache_len=LENGTH)])
    def cache(self, request, model) -> Cache:
        return request.param(config=model.config)

    def test_caches_of_transformers(self, model, cache):
        ids = tokens(2, LENGTH)
        whole = logits_of(model, ids)
        for _ in range(2):
            assert_close(in_pieces(model, ids, [6, 1, 3], cache), whole, torch.float64)
            cache.reset()

    def test_generate_takes_caches_of_transformers(self, model, cache):
        ids, options = tokens(2, LENGTH), {"max_new_tokens": 4, "do_sample": False}
        logits_of(model, ids[:, :6], past_key_values=cache)
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))

    def test_generate_compiles_a_static_step_once(self, model):
        """The number of tokens is a tensor: no token makes a graph of its own."""
        ids, graphs, options = tokens(2, 6), [], {"max_new_tokens": 8, "do_sample": False}
        config = CompileConfig(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph, mode=None)
        config._compile_all_devices = True
        torch.compiler.reset()
        output = model.generate(
            ids, cache_implementation="static", compile_config=config, return_dict_in_generate=True, **options
        )
        assert torch.equal(output.sequences, model.generate(ids, **options))
        assert len(graphs) == 1
        assert isinstance(output.past_key_values, StaticCache)
        assert output.past_key_values.get_seq_length() == 6 + 8 - 1

    def test_a_static_cache_starts_again_after_reset(self, model):
        ids, options = tokens(2, 6), {"max_new_tokens": 4, "do_sample": False}
        output = model.generate(ids, cache_implementation="static", return_dict_in_generate=True, **options)
        cache = output.past_key_values
        cache.reset()
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), output.sequences)
