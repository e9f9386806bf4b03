"""A whole benchmark at a tiny size: what it writes, how it is interrupted and gone on with."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from tests.models.tiny import tiny_config
from transxssm_lab.benchmarking import CONTENDERS, Budget, Setup, ThroughputSettings, run_throughput, throughput
from transxssm_lab.benchmarking.contenders import build_step
from transxssm_lab.benchmarking.steps import Entry
from transxssm_lab.benchmarking.throughput import num_parts, plan, prefill_exponents, share_of, ssd_share

ONCE = Budget(repeats=1, minutes=5)
SMALL = ThroughputSettings("tiny", ("transxssm",), ("train", "prefill"), (8,))
CELL_FIELDS = {
    "contender",
    "mode",
    "length",
    "reference",
    "status",
    "detail",
    "repeat_seconds",
    "seconds",
    "repeat_ratios",
    "ratio_to_reference",
    "num_tokens",
    "tokens_per_second",
    "milliseconds_per_token",
    "peak_bytes",
    "step_bytes",
    "first_seconds",
    "build_seconds",
    "flops",
    "flops_per_second",
    "floor_seconds",
    "times_floor",
}
METADATA_FIELDS = {
    "command",
    "date",
    "version",
    "commit",
    "dirty",
    "device",
    "gpu",
    "cpu",
    "cores",
    "logical_cores",
    "threads",
    "memory_bytes",
    "cpu_capability",
    "cpu_bfloat16_products",
    "cpu_kernels",
    "gpu_kernels",
    "python",
    "torch",
    "transformers",
    "triton",
    "mamba_ssm",
    "causal_conv1d",
    "system",
}

SETUP = Setup(torch.device("cpu"), 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("throughput")
    settings = ThroughputSettings("tiny", modes=("train", "decode"), lengths=(16, 8))
    run_throughput(settings, folder, setup=SETUP, budget=ONCE)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "throughput.json").read_text(encoding="utf-8"))


def test_json_has_every_field(results):
    assert results["status"] == "complete"
    assert set(results["metadata"]) == METADATA_FIELDS
    assert results["metadata"]["threads"] == 1
    assert results["settings"]["preset"] == "tiny"
    assert results["peak"]["flops_per_second"] == max(p["flops_per_second"] for p in results["peak"]["products"])
    order = [(length, mode) for length in (8, 16) for mode in ("train", "decode")]
    names = ["transxssm", "llama", "mamba2", "jamba"]
    got = [(cell["length"], cell["mode"], cell["contender"]) for cell in results["cells"]]
    assert got == [(*group, name) for group in order for name in names]
    for cell in results["cells"]:
        assert set(cell) == CELL_FIELDS
        assert cell["status"] == "ok", cell["detail"]
        assert all(cell[field] is not None for field in CELL_FIELDS)
        assert cell["times_floor"] == pytest.approx(
            cell["seconds"]["median"] * results["peak"]["flops_per_second"] / cell["flops"]
        )
    assert [share["length"] for share in results["ssd_share"]] == [8, 16]
    assert all(0 < share["share"] < 1 for share in results["ssd_share"])


def test_contenders_match_in_parameters(results):
    assert set(results["contenders"]) == {"transxssm", "llama", "mamba2", "jamba"}
    assert all(abs(each["parameters_relative"] - 1) <= 0.02 for each in results["contenders"].values())


def test_page_and_picture(folder, results):
    page = (folder / "throughput.md").read_text(encoding="utf-8")
    for each in results["contenders"].values():
        assert f"{each['parameters']:,}" in page
    (cell,) = [c for c in results["cells"] if (c["contender"], c["mode"], c["length"]) == ("jamba", "decode", 16)]
    assert f"| {cell['tokens_per_second']:,.0f} | {cell['ratio_to_reference']['median']:.2f} (" in page
    assert (folder / "throughput.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_is_gone_on_with(tmp_path, caplog):
    def stop_before_prefill(what, done):
        if what.startswith("prefill"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_throughput(SMALL, tmp_path, setup=SETUP, budget=ONCE, notify=stop_before_prefill)
    path = tmp_path / "throughput.json"
    first = json.loads(path.read_text(encoding="utf-8"))
    assert first["status"] == "interrupted"
    assert [(c["mode"], c["status"]) for c in first["cells"]] == [("train", "ok"), ("prefill", "interrupted")]
    assert (tmp_path / "throughput.png").is_file()

    with caplog.at_level(logging.WARNING, logger="transxssm_lab"):
        second = run_throughput(SMALL, tmp_path, setup=SETUP, budget=ONCE)
    assert f"going on with {path}" in caplog.text
    assert second["status"] == "complete"
    assert [(c["mode"], c["status"]) for c in second["cells"]] == [("train", "ok"), ("prefill", "ok")]
    assert second["cells"][0] == first["cells"][0]
    assert second["peak"] == first["peak"]

    other = ThroughputSettings("tiny", ("transxssm",), ("train", "prefill"), (8,), batch=2)
    with pytest.raises(ValueError, match="of another run, batch was 1 and is 2 now"):
        run_throughput(other, tmp_path, setup=SETUP, budget=ONCE)


def test_without_time_nothing_is_measured_and_that_is_said(tmp_path):
    results = run_throughput(SMALL, tmp_path, setup=SETUP, budget=Budget(repeats=1, minutes=1e-6))
    assert results["status"] == "out of time"
    assert {cell["status"] for cell in results["cells"]} == {"out of time"}
    assert "out of time" in (tmp_path / "throughput.md").read_text(encoding="utf-8")


def test_progress_counts_to_the_end():
    settings = ThroughputSettings(
        "tiny", ("transxssm", "llama-static"), ("train", "decode", "optimizer"), (8, 16), dtype="bfloat16"
    )
    configs = {name: settings.model_config() for name in settings.contenders}
    groups = plan(settings, configs, SETUP.device)
    assert [(g.mode, g.length, len(g.entries)) for g in groups] == [
        ("train", 8, 1),
        ("decode", 8, 2),
        ("optimizer", 8, 1),
        ("train", 16, 1),
        ("decode", 16, 2),
    ]
    assert num_parts(settings) == 1 + sum(group.num_parts for group in groups)


def test_exponents():
    cells = [
        {"contender": name, "mode": "prefill", "length": length, "seconds": {"median": length**power}}
        for name, power, lengths in (("a", 1, (1, 2, 4)), ("b", 2, (8, 16, 64)), ("c", 1, (1, 2)))
        for length in lengths
    ]
    fits = prefill_exponents(cells)
    assert set(fits) == {"a", "b"}
    assert (fits["a"]["exponent"], fits["b"]["exponent"]) == pytest.approx((1, 2))


@pytest.mark.parametrize(
    ("name", "compiles"), [("transxssm", False), ("transxssm-compiled", True), ("transxssm-graph", True)]
)
def test_a_first_run_that_compiles_says_nothing_about_the_next(name, compiles):
    settings = ThroughputSettings("tiny", (name,), ("decode",), (8,))
    entry = throughput._entry(
        name, CONTENDERS[name].config(settings.model_config()), "decode", 8, settings, torch.device("cpu")
    )
    assert entry.compiles == compiles


def event(name, seconds, parent=None):
    return SimpleNamespace(name=name, cpu_time_total=1e6 * seconds, cpu_parent=parent)


def test_an_operator_inside_itself_counts_once():
    outer = event("transxssm::ssd_chunked", 2.0)
    between = event("aten::mm", 1.9, outer)
    inner = event("transxssm::ssd_chunked", 1.8, between)
    backward = event("transxssm::ssd_chunked_backward", 3.0)
    share = share_of([outer, between, inner, backward], 10.0, on_device=False)
    assert share == {"step_seconds": 10.0, "forward_seconds": 2.0, "backward_seconds": 3.0, "share": 0.5}


def test_renamed_operators_are_an_error():
    with pytest.raises(RuntimeError, match=r"got \['transxssm::scan'\]"):
        share_of([event("transxssm::scan", 1.0), event("aten::mm", 1.0)], 1.0, on_device=False)


def test_a_real_step():
    arguments = ("transxssm", tiny_config(), "train", 12, 1, torch.float32)
    share = ssd_share(print, SETUP, Entry("transxssm", build_step, arguments, num_tokens=12, flops=1.0))
    assert share["forward_seconds"] > 0
    assert share["backward_seconds"] > 0
    assert 0 < share["share"] < 1
    assert share["share"] == pytest.approx(
        (share["forward_seconds"] + share["backward_seconds"]) / share["step_seconds"]
    )
