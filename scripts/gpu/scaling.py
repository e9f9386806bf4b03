#!/usr/bin/env python3
"""A measurement of training on one GPU or on several: scaling.py MEASUREMENT FILE.json [options]; scaling.sh runs them all.

Started alone it takes one GPU, by torchrun as many as there are processes; on a CPU processes speak through gloo. The first one writes
what was found. Steps are whole ones: forward, backward, gradient norm, AdamW. Rows are random tokens. `whole-run` and `broken-run` start
`transxssm train` itself, and are started alone.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from transxssm import TransXSSMConfig, TransXSSMForCausalLM
from transxssm.inspection import TRAINING_PER_FORWARD, flops_per_token
from transxssm.training.sharding import compile_layers, shard

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
PEAK_FLOPS = 989e12  # of an H100 or H200, bfloat16 products
KIB = 1024
COMPARED_STEPS = (
    20  # over which logged losses are compared: what is lost in precision shows, what chaos makes of it does not
)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=[*MEASUREMENTS, "summary"])
    parser.add_argument("file", type=Path, help="to write; of a summary, the folder")
    parser.add_argument("--preset", default="1.3b")
    parser.add_argument("--sharding", choices=["none", "ddp", "fsdp"], default="none")
    parser.add_argument("--length", type=int, default=4096, help="tokens in a row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a process; of a run, of all of them")
    parser.add_argument("--steps", type=int, default=10, help="that are timed, or that a run has")
    parser.add_argument("--seconds", type=float, default=100, help="after which nothing more is begun")
    parser.add_argument("--checkpointing", action="store_true", help="compute layers again in the backward pass")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.measurement == "summary":
        summarize(options.file)
        return
    device = start()
    found = note(options, device, MEASUREMENTS[options.measurement](options, device))
    if RANK == 0:
        sys.stdout.write(json.dumps(found) + "\n")
    if WORLD > 1:
        dist.destroy_process_group()


def note(options: argparse.Namespace, device: torch.device, results: dict[str, Any]) -> dict[str, Any]:
    """Writes what has been found so far, with what it was found by."""
    found = {
        "measurement": options.measurement,
        "command": " ".join(["torchrun" if WORLD > 1 else "python3", *sys.argv]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": os.environ.get("TRANSXSSM_COMMIT"),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "gpus": WORLD,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        **{
            name: getattr(options, name) for name in ("preset", "sharding", "length", "batch", "eager", "checkpointing")
        },
        **results,
    }
    if RANK == 0:
        options.file.parent.mkdir(parents=True, exist_ok=True)
        options.file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def start() -> torch.device:
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
    if WORLD > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None
        )
    return device


def new_model(
    config: TransXSSMConfig, device: torch.device, sharding: str, *, eager: bool, checkpointing: bool = False
) -> Any:
    """The same weights in every process, float32."""
    torch.manual_seed(0)
    with device:
        model = TransXSSMForCausalLM(config).train()
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if sharding == "fsdp":
        shard(model, init_device_mesh(device.type, (WORLD,)))
    if not eager:
        compile_layers(model)
    if sharding == "ddp" and WORLD > 1:
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    return model


def new_optimizer(model: Any, device: torch.device, rate: float = 3e-4) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, fused=device.type == "cuda")


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> torch.Tensor:
    """One training step in mixed precision; the loss of this process's rows."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        loss = model(ids, labels=ids, skip_logits=True, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    if WORLD > 1:
        dist.barrier()


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def agreed(value: bool, device: torch.device) -> bool:
    """Whether it is so in all processes."""
    if WORLD == 1:
        return value
    answer = torch.tensor(int(value), device=device)
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return bool(answer)


def throughput(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Tokens a second, memory and use of the peak, of rows of one length."""
    config = TransXSSMConfig.from_preset(options.preset)
    model = new_model(config, device, options.sharding, eager=options.eager, checkpointing=options.checkpointing)
    optimizer = new_optimizer(model, device)
    generator = torch.Generator(device).manual_seed(RANK)
    ids = torch.randint(1, config.vocab_size, (options.batch, options.length), generator=generator, device=device)
    first = seconds_of(lambda: step(model, optimizer, ids), device)
    for _ in range(2):
        step(model, optimizer, ids)
    times = [seconds_of(lambda: step(model, optimizer, ids), device) for _ in range(options.steps)]
    together = seconds_of(lambda: [step(model, optimizer, ids) for _ in range(options.steps)], device) / options.steps
    tokens = options.batch * options.length
    flops = TRAINING_PER_FORWARD * flops_per_token(config, options.length).total * tokens
    return {
        "first_step_seconds": first,
        "step_seconds": together,
        "step_seconds_each": times,
        "tokens_per_second": WORLD * tokens / together,
        "model_flops_utilisation": flops / together / PEAK_FLOPS,
        "peak_bytes": peak_bytes(device),
        # Between two steps: weights and moments. What the peak has above it are gradients, activations and gathered weights.
        "held_bytes": torch.cuda.memory_allocated() if device.type == "cuda" else None,
    }


def context(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of a step of one long row that the processes share, and the longest row that trains, with gradient checkpointing."""
    config = TransXSSMConfig.from_preset(options.preset)
    sharding = "fsdp" if WORLD > 1 else "none"
    options.checkpointing = True
    model = new_model(config, device, sharding, eager=options.eager, checkpointing=True)
    if WORLD > 1:
        model.enable_context_parallel(dist.group.WORLD)
    optimizer = new_optimizer(model, device)
    started, tried = time.monotonic(), []

    def timed(found: dict[str, Any]) -> dict[str, Any]:
        seconds = found.get("step_seconds")
        if not seconds:
            return {}
        flops = TRAINING_PER_FORWARD * flops_per_token(config, options.length).total * options.length / WORLD
        return {
            "step_seconds": seconds,
            "tokens_per_second": options.length / seconds,
            "model_flops_utilisation": flops / seconds / PEAK_FLOPS,
            "longest": options.length,
            "tried": tried,
        }

    def attempt(length: int, repeats: int) -> dict[str, Any]:
        found: dict[str, Any] = {"length": length}
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(
            1, config.vocab_size, (1, length), generator=torch.Generator(device).manual_seed(0), device=device
        )
        try:
            found["first_step_seconds"] = seconds_of(lambda: step(model, optimizer, ids), device)
            times = [seconds_of(lambda: step(model, optimizer, ids), device) for _ in range(repeats)]
            found["step_seconds"] = statistics.median(times) if times else None
            found["trains"] = True
        except torch.cuda.OutOfMemoryError as error:  # alike in all processes, whose parts are equal
            found |= {"trains": False, "error": str(error)[:200]}
            optimizer.zero_grad(set_to_none=True)
        found["peak_bytes"] = peak_bytes(device)
        tried.append(found)
        return found

    def longest() -> int:
        return max((each["length"] for each in tried if each["trains"]), default=0)

    whole = attempt(options.length, 2)  # the first, so that its graphs are made for its length
    note(options, device, timed(whole))
    half = attempt(options.length // 2, 0)
    if device.type == "cuda" and half["trains"] and whole["trains"]:
        per_token = (whole["peak_bytes"] - half["peak_bytes"]) / (whole["length"] - half["length"])
        limit = torch.cuda.get_device_properties(device).total_memory - 3 * 2**30  # the context, NCCL, fragments
        predicted = whole["length"] + (limit - whole["peak_bytes"]) / per_token
        unit = 4 * KIB * WORLD
        # Upwards, since nothing can be believed of a process group after one of its steps has failed.
        for share in (0.85, 0.92, 0.97):
            length = int(predicted * share) // unit * unit
            seconds = whole["step_seconds"] * (length / whole["length"]) ** 1.6
            if length <= whole["length"]:
                continue
            if not agreed(time.monotonic() - started + seconds < options.seconds, device):
                break
            if not attempt(length, 0)["trains"]:
                break
            note(options, device, timed(whole) | {"longest": longest()})
    return timed(whole) | {"longest": longest(), "tried": tried}


def laws(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """How far rows in parts are from whole ones, in loss and gradients: ‖parts − whole‖ / ‖whole‖, float32 and mixed precision.

    Mixed precision is held to float32 too, since its own roundings are the measure of what two orders of summation may differ by.
    """
    config = TransXSSMConfig.from_preset(options.preset, num_hidden_layers=8)
    found: dict[str, Any] = {}
    for variant, fields in (("plain", {}), ("convolution", {"ssd_conv_kernel_size": 4, "ssd_skip": True})):
        torch.manual_seed(0)
        with device:
            model = TransXSSMForCausalLM(TransXSSMConfig(**(config.to_dict() | fields))).train()
        ids = torch.randint(
            1, config.vocab_size, (1, options.length), generator=torch.Generator(device).manual_seed(0), device=device
        )
        documents = torch.arange(options.length, device=device)[None] // (options.length * 3 // 8)
        for packed, seq_idx in (("one document", None), ("packed", documents)):
            outcomes = {}
            for way, group in (("whole", None), ("parts", dist.group.WORLD)):
                model.enable_context_parallel(group)
                for precision in ("float32", "bfloat16"):
                    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                        loss = model(ids, labels=ids, seq_idx=seq_idx, skip_logits=True, use_cache=False).loss
                    loss.backward()
                    gradients = [weight.grad for weight in model.parameters()]
                    model.zero_grad(set_to_none=True)
                    if group is not None:
                        for gradient in gradients:
                            dist.all_reduce(gradient)
                    outcomes[way, precision] = (
                        loss.item(),
                        torch.cat([g.flatten() for g in gradients]) / (WORLD if group else 1),
                    )
            for name, (one, other) in {
                "float32": (("parts", "float32"), ("whole", "float32")),
                "bfloat16": (("parts", "bfloat16"), ("whole", "bfloat16")),
                "bfloat16, parts against float32": (("parts", "bfloat16"), ("whole", "float32")),
                "bfloat16, whole against float32": (("whole", "bfloat16"), ("whole", "float32")),
            }.items():
                (loss, gradient), (expected_loss, expected) = outcomes[one], outcomes[other]
                found[f"{variant}, {packed}, {name}"] = {
                    "loss": abs(loss - expected_loss) / abs(expected_loss),
                    "gradients": ((gradient - expected).norm() / expected.norm()).item(),
                }
    return {"errors": found}


class Run:
    """A run of `transxssm train` on the source of Python's standard library, whose every step is logged.

    Rows of a step are the same whatever the number of processes.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device, folder: Path) -> None:
        self.options, self.device, self.folder, self.starts = options, device, folder, 0
        self.settings = [
            "small",
            f"model.preset={options.preset}",
            "data.corpus=python-stdlib",
            "data.max_bytes=6000000",
            f"data.sequence_length={options.length}",
            f"training.output_dir={folder}",
            f"training.max_steps={options.steps}",
            f"training.eval_steps={options.steps}",
            f"training.save_steps={COMPARED_STEPS // 2}",
            "training.logging_steps=1",
            "training.per_device_eval_batch_size=4",
            f"training.use_cpu={str(device.type != 'cuda').lower()}",
        ]

    def start(self, processes: int, *arguments: str) -> subprocess.Popen[bytes]:
        """On so many GPUs, which share the weights (FSDP2) where they are several."""
        command = [sys.executable, "-m", "transxssm", "train", *self.settings]
        # One process takes the rows of a step in as many parts as two have, so that all sums are over the same rows.
        command += [f"training.per_device_train_batch_size={self.options.batch // 2}"]
        command += [f"training.gradient_accumulation_steps={2 // processes}", "training.parallelism=fsdp", *arguments]
        visible = dict(os.environ)
        if processes > 1:
            command += ["--gpus", str(processes)]
        elif self.device.type == "cuda":
            visible["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        self.starts += 1
        self.log = self.options.file.parent / "logs" / f"{self.options.file.stem}-start-{self.starts}.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=visible)

    def last_line(self, process: subprocess.Popen[bytes]) -> str:
        """What the process says last, when it has ended."""
        process.wait(timeout=300)
        return ([line for line in self.log.read_text().splitlines() if line.strip()] or [""])[-1]

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl, as far as it is written."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines]

    def wait_for_step(self, process: subprocess.Popen[bytes], step: int) -> None:
        while process.poll() is None:
            try:
                if any(row["step"] >= step for row in self.rows()):
                    return
            except json.JSONDecodeError:  # a line is being written
                pass
            time.sleep(0.02)
        raise RuntimeError(f"the run ended before step {step}: {self.last_line(process)}")

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        said = self.last_line(process)
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}: {said}")


def of_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: [row.get(key) for row in rows] for key in ("step", "tokens", "loss", "grad_norm", "eval_loss")}


def whole_run(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Logged losses of a run of one process that nothing disturbs."""
    with tempfile.TemporaryDirectory(prefix="transxssm-") as folder:
        run = Run(options, device, Path(folder, "run"))
        run.finish(run.start(1))
        return of_rows(run.rows())


def broken_run(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The same run on two GPUs until one process is killed, then on one until it is interrupted, then on two to its end."""
    with tempfile.TemporaryDirectory(prefix="transxssm-") as folder:
        run = Run(options, device, Path(folder, "run"))
        first = run.start(2)
        run.wait_for_step(first, COMPARED_STEPS + 2)
        rows = [row for row in run.rows() if row["step"] <= COMPARED_STEPS]
        found: dict[str, Any] = {"sharded": of_rows(rows)}
        workers = {child.environ().get("RANK"): child for child in psutil.Process(first.pid).children()}
        workers["1"].send_signal(signal.SIGKILL)
        killed = time.perf_counter()
        found["said_after_kill"] = run.last_line(first)
        found["seconds_after_kill"] = time.perf_counter() - killed
        found["exit_code_after_kill"] = first.returncode
        found["left_after_kill"] = sum(child.is_running() for child in workers.values())
        second = run.start(1, "--resume")
        run.wait_for_step(second, (COMPARED_STEPS + options.steps) // 2)
        second.send_signal(signal.SIGINT)
        found["said_after_interrupt"] = run.last_line(second)
        found["exit_code_after_interrupt"] = second.returncode
        run.finish(run.start(2, "--resume"))
        return found | of_rows(run.rows())


def furthest(values: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference, over as many as there are of both."""
    return max(abs(value - other) / abs(other) for value, other in zip(values, expected, strict=False))


def summarize(folder: Path) -> None:
    """What the files of scaling.sh say together, as far as they are there: summary.json."""
    found = {
        path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stem != "summary"
    }
    summary: dict[str, Any] = {}

    def ratio(name: str, key: str, one: str, other: str) -> None:
        values = [found.get(each, {}).get(key) for each in (one, other)]
        if all(values):
            summary[name] = values[0] / values[1]

    ratio("tokens a second, large, 2 GPUs over 1", "tokens_per_second", "large-2", "large-1")
    ratio("tokens a second, small, 2 GPUs over 1", "tokens_per_second", "small-2", "small-1")
    ratio("memory of a GPU, large, 2 GPUs over 1", "peak_bytes", "large-2", "large-1")
    ratio("memory of a GPU, large, gradient checkpointing, 2 GPUs over 1", "peak_bytes", "memory-2", "memory-1")
    ratio("weights and moments of a GPU, large, 2 GPUs over 1", "held_bytes", "large-2", "large-1")
    ratio("seconds of a long step, 2 GPUs over 1", "step_seconds", "context-2", "context-1")
    ratio("longest row, 2 GPUs over 1", "longest", "context-2", "context-1")
    for name in ("large-1", "large-2", "small-1", "small-2", "context-1", "context-2"):
        for key in ("model_flops_utilisation", "first_step_seconds"):
            if found.get(name, {}).get(key) is not None:
                summary[f"{key}, {name}"] = found[name][key]
    whole, broken = found.get("run-1"), found.get("run-2")
    if whole and broken:
        name = f"logged losses, first {COMPARED_STEPS} steps, 2 GPUs (FSDP2) against 1, largest relative difference"
        summary[name] = furthest(broken["sharded"]["loss"], whole["loss"])
        summary["2, 1, 2 GPUs against 1: steps and tokens are the same"] = all(
            broken[key] == whole[key] for key in ("step", "tokens")
        )
        for key in ("loss", "eval_loss"):
            summary[f"2, 1, 2 GPUs against 1, last {key}, relative difference"] = furthest(
                broken[key][-1:], whole[key][-1:]
            )
        for key in ("seconds_after_kill", "exit_code_after_kill", "left_after_kill", "said_after_kill"):
            summary[key] = broken[key]
    for name, errors in found.get("laws", {}).get("errors", {}).items():
        summary[f"parts against whole rows, {name}"] = errors
    text = json.dumps(summary, indent=1)
    (folder / "summary.json").write_text(text + "\n")
    sys.stdout.write(text + "\n")


MEASUREMENTS = {
    "throughput": throughput,
    "context": context,
    "laws": laws,
    "whole-run": whole_run,
    "broken-run": broken_run,
}

if __name__ == "__main__":
    main()
