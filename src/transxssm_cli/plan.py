"""`transxssm plan`."""

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from transxssm.inspection.training_plan import GPU_BYTES, MEASURED_RATE, Links, plan_training
from transxssm.models import TransXSSMConfig, read_config
from transxssm_cli.plan_rates import measured_flops_per_second, measured_link_bytes_per_second
from transxssm_cli.tables import table_of

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_tokens(text: str) -> float:
    """Reads a number such as "100B", "2.5T" or "1000000".

    Raises:
        ValueError: the text is not such a number.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.strip().upper())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"--tokens: got {text!r}, expected a number of tokens such as 100B")
    return float(found[1]) * _SUFFIXES[found[2]]


def describe(
    model: str,
    folder: Path | None,
    *,
    tokens: str,
    link_gigabytes: tuple[float | None, float],
    is_measured: bool = False,
    **sizes: Any,
) -> dict[str, Any]:
    """The plans as plain values, beginning with the fastest that fits.

    Args:
        link_gigabytes: rates in GB/s, inside a machine and between machines. The former defaults to the measured or else the assumed rate.
        is_measured: whether rates are measured on this machine's GPUs.
        sizes: as for `plan_training`.

    Raises:
        ValueError: the model is not a TransXSSM, sizes do not fit, or there is no GPU to measure.
    """
    config = TransXSSMConfig.from_preset(model) if folder is None else read_config(folder)
    if not isinstance(config, TransXSSMConfig):
        raise ValueError(f"{model}: got a {config.model_type}, expected a TransXSSM")
    inside, between = link_gigabytes
    for given in link_gigabytes:
        if given is not None and given <= 0:
            raise ValueError(f"links: got {given} GB/s, expected more than 0")
    links = Links(Links.inside if inside is None else 1e9 * inside, 1e9 * between)
    num_tokens, rate, measured = parse_tokens(tokens), MEASURED_RATE, None
    plans = plan_training(config, num_tokens=num_tokens, links=links, **sizes)
    if is_measured:
        if not torch.cuda.is_available():
            raise ValueError("--measure: torch sees no GPU here; leave it out for rates that were measured on an H100")
        gpus = torch.cuda.device_count()
        # One GPU's part of a row, as in the plan.
        length = sizes["length"] // sizes["cp"]
        rate = measured_flops_per_second(config, length=length, rows=sizes["rows"], device=torch.device("cuda"))
        torch.cuda.empty_cache()
        if inside is None and gpus > 1:
            links = Links(measured_link_bytes_per_second(gpus, "cuda"), links.between)
        measured = {"gpu": torch.cuda.get_device_name(), "gpus": gpus, "has_link": inside is None and gpus > 1}
        plans = plan_training(config, num_tokens=num_tokens, links=links, rate=rate, **sizes)
    return {
        "model": model,
        "tokens": num_tokens,
        **sizes,
        "flops_per_second": rate,
        "link_bytes_per_second": links.inside,
        "measured": measured,
        "gpu_bytes": GPU_BYTES[sizes["gpu"]],
        "plans": [{**asdict(plan), "memory": {**plan.memory._asdict(), "total": plan.memory.total}} for plan in plans],
    }


def tables(description: dict[str, Any]) -> Iterator[str | Table]:
    """Formats the result of `describe` for the terminal."""
    gpus, rows, length = description["gpus"], description["rows"], description["length"]
    yield (
        f"[bold]{description['model']}[/] on {gpus} {description['gpu'].upper()}, {description['tokens']:.3g} tokens in rows of "
        f"{length:,}, {rows} in a step of {'each GPU' if description['cp'] == 1 else 'every ' + str(description['cp']) + ' GPUs'}"
    )
    names = ("weights", "optimizer", "gathered", "activations")
    headings = ("parallelism", *names, "in all", "fits", "step", "links", "tokens/s", "days", "GPU-hours")
    yield table_of(
        headings,
        (
            (
                plan["data"] + (", checkpointing" if plan["is_checkpointing"] else ""),
                *(f"{plan['memory'][name] / 1e9:,.1f}" for name in (*names, "total")),
                "yes" if plan["fits"] else "no",
                f"{plan['step_seconds']:.3g} s",
                f"{plan['communication_seconds']:.2g} s",
                f"{plan['tokens_per_second']:,.0f}",
                f"{plan['days']:,.1f}",
                f"{plan['gpu_hours']:,.0f}",
            )
            for plan in description["plans"]
        ),
    )
    best = description["plans"][0]
    if not best["fits"]:
        yield (
            f"Nothing fits into {description['gpu_bytes'] / 1e9:.0f} GB: take more GPUs, fewer rows or a larger --cp."
        )
        return
    settings = [f"training.per_device_train_batch_size={rows}"]
    if best["data"] != "ddp" or description["cp"] > 1:
        cp = f", cp: {description['cp']}" if description["cp"] > 1 else ""
        settings.append(f'"training.parallelism={{data: {best["data"]}{cp}}}"')
    if best["is_checkpointing"]:
        settings.append("training.gradient_checkpointing=true")
    yield f"The first row, in a recipe: {' '.join(settings)}"
    yield f"Memory in GB. {_about_rates(description)}"


def _about_rates(description: dict[str, Any]) -> str:
    measured = description["measured"]
    if measured is None:
        return (
            "Steps are computed at the rate that 1.3b has on one H100; smaller models reach less of it. Rates of links are assumed "
            "(--link, --node-link); --measure measures both on this machine's GPUs."
        )
    link = f"{description['link_bytes_per_second'] / 1e9:.3g} GB/s"
    links = (
        f"Its {measured['gpus']} GPUs exchange at {link}, measured; --node-link is assumed."
        if measured["has_link"]
        else f"Links are taken to have {link} (--link, --node-link)."
    )
    return f"Steps are computed at {description['flops_per_second'] / 1e12:.3g} TFLOP/s, measured on {measured['gpu']}. {links}"
