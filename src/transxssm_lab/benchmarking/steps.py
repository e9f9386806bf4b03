"""One step of a contender that can be timed, what happens between two timings, and decoding after a prompt.

Letters: b batch, t time.
"""

import copy
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticCache

DECODE_TOKENS = 16  # tokens in one run of a decoding step


@dataclass(frozen=True)
class Step:
    """The step that a benchmark repeats.

    Args:
        run: the timed part.
        clean: restores what `run` needs to be called again. It is not timed.
    """

    run: Callable[[], object]
    clean: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Entry:
    """One contender's part in a group: how a child process builds its step, and how much work a run is.

    Args:
        name: name of the contender.
        build: a module-level function, called in the child as `build(*arguments, device=…)`. It returns a `Step`.
        arguments: picklable arguments of `build`.
        num_tokens: tokens that one run processes, or None if it processes no tokens.
        flops: FLOPs of one run, counted as in `transxssm.inspection.costs`, or None if it has no matrix products.
        compiles: whether the first run compiles, so that its time does not predict the next one.
    """

    name: str
    build: Callable[..., Step]
    arguments: tuple[Any, ...]
    num_tokens: int | None
    flops: float | None
    compiles: bool = False


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(step: Step, device: torch.device) -> float:
    """Wall time of one run, including the device's work. Cleans up after it."""
    synchronize(device)
    started = time.perf_counter()
    result = step.run()
    synchronize(device)
    seconds = time.perf_counter() - started
    del result
    step.clean()
    return seconds


@dataclass(frozen=True)
class Prompt:
    """A prompt that a model has read, and the cache that holds it.

    Args:
        model: a model in evaluation mode.
        input_ids: (b, t) the prompt.
        cache: the cache of the b rows. Decoding writes into it.
    """

    model: nn.Module
    input_ids: Tensor
    cache: Cache

    def step(self) -> Step:
        """Decodes `DECODE_TOKENS` tokens in each row, one at a time. Every run continues where the last one ended."""
        model, input_ids, cache = self.model, self.input_ids, self.cache
        parameters = inspect.signature(model.forward).parameters
        position = input_ids.shape[1]

        @torch.no_grad()
        def run() -> None:
            nonlocal position
            for index in range(DECODE_TOKENS):
                arguments: dict[str, Any] = {_cache_name(model): cache, "use_cache": True}
                if "position_ids" in parameters:  # as generate passes them
                    arguments["position_ids"] = torch.tensor([[position]], device=input_ids.device)
                model(input_ids=input_ids[:, index % input_ids.shape[1], None], **arguments)
                position += 1

        return Step(run)

    def repeated(self, batch: int) -> "Prompt":
        """Copies the one row that was read into `batch` rows with a cache of their own, as if all had been read together.

        Raises:
            ValueError: the prompt has several rows.
        """
        if len(self.input_ids) != 1:
            raise ValueError(f"a prompt of one row can be repeated: got {len(self.input_ids)} rows")
        rows = torch.zeros(batch, dtype=torch.long, device=self.input_ids.device)
        cache = copy.deepcopy(self.cache)
        # Every kind of layer can select rows, which beam search needs. Some have no `batch_repeat_interleave`.
        cache.reorder_cache(rows)
        if isinstance(cache, StaticCache):  # which marks its own tensors, too: a CUDA graph may write into them
            for tensor in _tensors_of_cache(cache):
                torch._dynamo.mark_static_address(tensor)
        return replace(self, input_ids=self.input_ids[rows], cache=cache)

    def cache_bytes(self) -> int:
        """Memory that the cache holds, including room that it has not filled yet, bytes."""
        storages = {
            storage.data_ptr(): storage.nbytes()
            for tensor in _tensors_of_cache(self.cache)
            if (storage := tensor.untyped_storage())
        }
        return sum(storages.values())


@torch.no_grad()
def read_prompt(model: nn.Module, input_ids: Tensor, cache: Cache | None) -> Prompt:
    """Reads (b, t) tokens into a cache. Without one, the model makes a cache of its own kind."""
    name = _cache_name(model)
    given = {} if cache is None else {name: cache}
    return Prompt(model, input_ids, model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **given)[name])


def _cache_name(model: nn.Module) -> str:
    """The name of the cache in the model's arguments and output."""
    return "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"


def _tensors_of_cache(cache: Cache) -> list[Tensor]:
    """Keys, values and states of all layers."""
    states: list[Any] = []
    for layer in cache.layers:
        states += [getattr(layer, name, None) for name in ("keys", "values")]
        for name in ("conv_states", "recurrent_states"):
            states += getattr(layer, name, {}).values()
    return [state for state in states if isinstance(state, Tensor)]
