"""One measurable step of a contender: what is timed, and what must happen between two timings; decoding after a prompt.

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

DECODE_TOKENS = 16  # that one run of a decoding step goes through


@dataclass(frozen=True)
class Step:
    """What a benchmark repeats.

    Args:
        run: the timed part.
        clean: brings things back to where `run` can be called again; not timed.
    """

    run: Callable[[], object]
    clean: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Entry:
    """One contender's part in a group: how a child process builds its step, and what a run of it amounts to.

    Args:
        name: of the contender.
        build: a function of a module, called in the child as `build(*arguments, device=…)`; returns a `Step`.
        arguments: picklable.
        num_tokens: tokens that one run processes, or None where it processes no tokens.
        flops: of one run, counted as `transxssm.inspection.costs` does, or None where it has no matrix products.
        compiles: in its first run, which says nothing about the next.
    """

    name: str
    build: Callable[..., Step]
    arguments: tuple[Any, ...]
    num_tokens: int | None
    flops: float | None
    compiles: bool = False


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(step: Step, device: torch.device) -> float:
    """Wall time of one run, the device's work included; cleans up after it."""
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
    """A prompt that a model has read, and the cache it left.

    Args:
        model: in evaluation mode.
        input_ids: (b, t) the prompt.
        cache: of the b rows; decoding writes into it.
    """

    model: nn.Module
    input_ids: Tensor
    cache: Cache

    def step(self) -> Step:
        """Decodes `DECODE_TOKENS` tokens in each row, one at a time; every run goes on where the last one ended."""
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
        """The one row that was read in `batch` rows with a cache of their own, as if all had been read together.

        Raises:
            ValueError: a prompt of several rows.
        """
        if len(self.input_ids) != 1:
            raise ValueError(f"a prompt of one row can be repeated: got {len(self.input_ids)} rows")
        rows = torch.zeros(batch, dtype=torch.long, device=self.input_ids.device)
        cache = copy.deepcopy(self.cache)
        # Every kind of layer knows how to take rows, as a beam search asks for it; `batch_repeat_interleave` is missing in some.
        cache.reorder_cache(rows)
        if isinstance(cache, StaticCache):  # as it marks its own tensors: a CUDA graph may write into them
            for tensor in _tensors_of_cache(cache):
                torch._dynamo.mark_static_address(tensor)
        return replace(self, input_ids=self.input_ids[rows], cache=cache)

    def cache_bytes(self) -> int:
        """Memory that the cache holds, room that it has not filled yet included."""
        storages = {
            storage.data_ptr(): storage.nbytes()
            for tensor in _tensors_of_cache(self.cache)
            if (storage := tensor.untyped_storage())
        }
        return sum(storages.values())


@torch.no_grad()
def read_prompt(model: nn.Module, input_ids: Tensor, cache: Cache | None) -> Prompt:
    """Reads (b, t) tokens into a cache, of the model's own kind where none is given."""
    name = _cache_name(model)
    given = {} if cache is None else {name: cache}
    return Prompt(model, input_ids, model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **given)[name])


def _cache_name(model: nn.Module) -> str:
    """What the model calls its cache, in its arguments and its output."""
    return "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"


def _tensors_of_cache(cache: Cache) -> list[Tensor]:
    """Keys, values and states of all layers."""
    states: list[Any] = []
    for layer in cache.layers:
        states += [getattr(layer, name, None) for name in ("keys", "values")]
        for name in ("conv_states", "recurrent_states"):
            states += getattr(layer, name, {}).values()
    return [state for state in states if isinstance(state, Tensor)]
