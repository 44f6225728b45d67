"""`trimtab serve`: many aligners over one frozen proposal, behind OpenAI's API."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.data.options import TemplateOptions
from trimtab.decode.options import ModelOptions, settings_of
from trimtab.errors import InvalidOption, InvalidRequest, TrimtabError
from trimtab.extras import need
from trimtab.files import expand_home
from trimtab.options import option, same
from trimtab.rewriting.options import RewriterOptions, Rewriting, load_rewriter

if TYPE_CHECKING:
    from trimtab.serve.registry import Registry
    from trimtab.serve.service import Opened, Settings
    from trimtab.users.settings import UserSettings

__all__ = ["Options", "render", "run"]

KEY_VARIABLE = "TRIMTAB_API_KEY"
LOG_Z_EVERY = 8
"""Steps between two observations of log Z: enough for a mean, and too few to be felt."""


@dataclass(frozen=True)
class Options(RewriterOptions, TemplateOptions, ModelOptions):
    """Flags of `trimtab serve`."""

    date: str | None = option(
        None, "what a chat template that writes the date takes for today, YYYY-MM-DD [default: the day of each request]"
    )
    aligner: tuple[str, ...] = option(
        (), "an aligner, and what requests call it; may repeat. It stays in memory", metavar="NAME=PATH"
    )
    weight: tuple[float, ...] = same(
        ModelOptions, "weight", help="default weight of each --aligner [default: the manifest's, or the rule's]"
    )
    engine: str = option(
        "trimtab", "what decodes: our own engine, or vLLM with our plugin (needs the extra 'vllm')", choices=("trimtab", "vllm")
    )
    vllm_args: str = option(
        "", "further flags of `vllm serve`, such as '--tensor-parallel-size 2'", metavar="FLAGS", verbatim=True
    )
    host: str = option("127.0.0.1", "address to listen on; the default lets in this machine alone")
    port: int = option(8000, "port to listen on; 0 for any that is free", low=0, high=65535)
    api_key: tuple[str, ...] = option((), f"a key that clients must send; may repeat [default: ${KEY_VARIABLE}]", metavar="KEY")
    allowed_origins: tuple[str, ...] = option(
        (),
        "web pages that may use the server beside its own, as https://example.com; '*' for all; may repeat [default: none]",
        metavar="ORIGIN",
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "names that the server answers to beside localhost; '*' for any; may repeat [default: none where only this machine "
        "reaches it, else any]",
        metavar="NAME",
    )
    served_model_name: tuple[str, ...] = option(
        (),
        "what the proposal is called; may repeat, the first counts [default: its folder's name, or hub id]",
        metavar="NAME",
    )
    aligner_root: str | None = option(
        None, "let clients load and unload aligners under this folder, by /v1/load_aligner", metavar="FOLDER"
    )
    max_aligner_memory: float | None = option(
        None,
        "GiB that aligners may take; those unused longest are evicted, but not those named here [default: no limit]",
        above=0,
    )
    max_num_batched_tokens: int = option(512, "prompt tokens read between two decoding steps", low=1)
    max_cache_tokens: int | None = option(
        None,
        "tokens that all sequences together may hold in the cache [default: what half of the free memory holds]",
        above=0,
    )
    prefix_cache_tokens: int = option(
        8192,
        "tokens of finished requests to keep for prompts that begin alike, within the memory for caches; 0 for none",
        low=0,
    )
    max_waiting: int = option(256, "sequences that may wait for a slot; more are refused with 429", above=0)
    max_prompt_tokens: int | None = option(None, "longest prompt [default: what fits the context]", above=0)
    max_tokens: int | None = option(
        None, "longest completion [default: what fits the context; a chat that does not say gets up to 4096]", above=0
    )
    max_body_bytes: int = option(2**20, "longest request body", above=0)
    request_timeout: float = option(600.0, "seconds a request may take", above=0)
    stream_interval: float = option(
        0.02, "seconds between two chunks of a stream at the least; 0 sends each step's tokens", low=0
    )
    shutdown_timeout: float = option(30.0, "seconds that running requests get when the server stops", low=0)
    users: str | None = option(
        None,
        "learn users' weights of the aligners by /v1/users/NAME/preferences, and keep them in this folder; needs an API key",
        metavar="FOLDER",
    )
    max_users: int = option(10_000, "users that are kept", low=1)
    max_user_pairs: int = option(100, "preferences that are kept of each user; the oldest go", low=1)
    user_days: float | None = option(
        None, "days that a preference is kept [default: until its user is deleted]", above=0, high=36_500
    )
    feedback: str | None = option(
        None,
        "take votes, corrections and thumbs by /v1/feedback, and keep them here, with their texts, in the layout that training"
        " reads; needs an API key",
        metavar="FILE",
    )
    feedback_per_hour: int = option(600, "how many of them one API key may give in an hour", low=1)
    log_prompts: bool = option(False, "write prompts and completions to the log")
    playground: bool = option(False, "show the playground at /playground (needs the extra 'playground')")
    votes: str | None = option(None, "where the playground's arena keeps its votes [default: votes.jsonl]", metavar="FILE")
    ssl_keyfile: str | None = option(None, "private key for https", metavar="FILE")
    ssl_certfile: str | None = option(None, "certificate for https", metavar="FILE")

    @property
    def weights_of_a_row(self) -> list[tuple[float, ...]]:
        """Each alone: requests say which aligners they want."""
        return [(weight,) for weight in self.weight]

    @property
    def aligns(self) -> bool:
        """Whether there is, or may come, an aligner."""
        return bool(self.aligner or self.aligner_root)

    def idle(self) -> dict[str, str]:
        """What is for the other engine, for aligners, or for the playground."""
        if self.engine == "vllm":
            from trimtab.vllm.launch import idle_options

            return idle_options(self)
        idle = {"vllm_args": "belongs to --engine vllm"}
        idle |= {} if self.playground else {"votes": "belongs to --playground"}
        idle |= {} if self.users else dict.fromkeys(("max_users", "max_user_pairs", "user_days"), "belongs to --users")
        idle |= {} if self.feedback else {"feedback_per_hour": "belongs to --feedback"}
        idle |= {} if self.aligner else {"users": "needs an --aligner: their weights are what users have"}
        return idle | ({} if self.aligns else {"max_aligner_memory": "needs an --aligner, or --aligner_root"})


def run(options: Options) -> dict[str, Any]:
    """Serve until the process is told to stop."""
    if options.engine == "vllm":
        return _run_vllm(options)
    need("serve", "serving", "fastapi", "prometheus_client", "uvicorn")
    if options.playground:
        need("playground", "the playground", "gradio")
    from trimtab.data.template import check_date, read_chat_template
    from trimtab.models.loading import quiet_loading
    from trimtab.serve.app import make_app
    from trimtab.serve.run import run_server
    from trimtab.serve.service import Opened, Service

    settings = _settings(options)
    named = _aligners(options)
    check_date(options.date)
    read_chat_template(options.chat_template_path)  # what is wrong with it is said before the server listens
    quiet_loading()

    def load() -> Opened:
        try:
            return _load(options, named)
        except InvalidRequest as error:
            raise InvalidOption(str(error)) from error

    service = Service(settings, load)
    app = make_app(service, on_failure=lambda: app.state.stop())
    if options.playground:
        _add_playground(app, service, options)
    tls = {"ssl_keyfile": options.ssl_keyfile, "ssl_certfile": options.ssl_certfile}
    return run_server(app, service, host=options.host, port=options.port, **tls)


def _run_vllm(options: Options) -> dict[str, Any]:
    from trimtab.vllm.launch import launch

    settings, named = _settings(options), _aligners(options)
    status = launch(
        dataclasses.replace(options, api_key=settings.api_keys, allowed_origins=tuple(settings.origins.allowed)),
        named,
        [settings.name, *settings.aliases],
    )
    if status:
        raise TrimtabError(f"vllm serve ended with status {status}; its messages stand above")
    return {"model": settings.name, "engine": "vllm"}


def render(report: dict[str, Any]) -> str:
    """A line when the server has stopped."""
    if report.get("engine") == "vllm":
        return f"{report['model']}: vllm serve has stopped"
    line = f"{report['model']}: served {report['requests']} requests"
    left = report["unfinished_sequences"]
    return f"{line}; {left} sequences could not be finished" if left else line


def _settings(options: Options) -> "Settings":
    """The limits among the flags, checked."""
    from trimtab.serve.service import Settings

    if bool(options.ssl_keyfile) != bool(options.ssl_certfile):
        raise InvalidOption("--ssl_keyfile and --ssl_certfile go together")
    for name in ("ssl_keyfile", "ssl_certfile"):
        if (file := getattr(options, name)) and not Path(file).is_file():
            raise InvalidOption(f"--{name}: there is no file '{file}'")
    if options.aligner_root is not None and not Path(options.aligner_root).is_dir():
        raise InvalidOption(f"--aligner_root: there is no folder '{options.aligner_root}'")
    names = options.served_model_name or _names_of(options.proposal)
    from trimtab.origins import Origins
    from trimtab.serve.feedback import FeedbackBook
    from trimtab.serve.guard import check_keys

    keys = options.api_key or tuple(filter(None, [os.environ.get(KEY_VARIABLE)]))
    check_keys(keys)
    for name in ("users", "feedback"):
        if getattr(options, name) is not None and not keys:
            raise InvalidOption(f"--{name} needs an --api_key: without one, anybody could teach")
    if options.feedback is not None:
        FeedbackBook(options.feedback, options.feedback_per_hour)  # refuses what cannot be its file
    return Settings(
        name=names[0],
        aliases=tuple(names[1:]),
        api_keys=keys,
        origins=Origins(options.allowed_origins, host=options.host, hosts=options.allowed_hosts),
        max_body_bytes=options.max_body_bytes,
        max_prompt_tokens=options.max_prompt_tokens,
        max_tokens=options.max_tokens,
        max_waiting=options.max_waiting,
        request_timeout=options.request_timeout,
        stream_interval=options.stream_interval,
        shutdown_timeout=options.shutdown_timeout,
        log_prompts=options.log_prompts,
        allow_loading=options.aligner_root is not None,
        users=_users(options),
        feedback=None if options.feedback is None else Path(options.feedback),
        feedback_per_hour=options.feedback_per_hour,
    )


def _users(options: Options) -> "UserSettings | None":
    """What is kept of users."""
    from trimtab.serve.values import MAX_ALIGNERS
    from trimtab.users.settings import UserSettings

    if options.users is None:
        return None
    names = tuple(name for name, _, _ in _aligners(options))
    if len(names) > MAX_ALIGNERS:
        raise InvalidOption(f"--users: a request may have {MAX_ALIGNERS} aligners, and users would have {len(names)}")
    limits: dict[str, Any] = {"max_users": options.max_users, "max_pairs": options.max_user_pairs, "days": options.user_days}
    return UserSettings(expand_home(options.users), names, **limits)


def _names_of(proposal: str) -> tuple[str, ...]:
    """What a proposal is called: the last part of a folder, and the folder as it was typed; or a hub id."""
    folder = expand_home(proposal)
    return tuple(dict.fromkeys([folder.resolve().name, proposal])) if folder.is_dir() else (proposal,)


def _aligners(options: Options) -> list[tuple[str, str, float | None]]:
    """Name, path and weight of each aligner."""
    from trimtab.names import parse_named

    weights = options.weight or (None,) * len(options.aligner)
    named = [(*parse_named(text), weight) for text, weight in zip(options.aligner, weights, strict=True)]
    bases = options.served_model_name or _names_of(options.proposal)
    for i, (name, _, _) in enumerate(named):
        if name in [other for other, _, _ in named[:i]] or name in bases:
            raise InvalidOption(f"--aligner: two models are called '{name}'; say NAME=PATH with another name")
    return named


def _load(options: Options, named: list[tuple[str, str, float | None]]) -> "Opened":
    """The proposal, its aligners, and an engine."""
    from trimtab.data.template import read_chat_template, refuse_idle_date
    from trimtab.decode.aligned import AlignedModel
    from trimtab.decode.assemble import Loader, check_graphs, runs_by_llamacpp
    from trimtab.decode.engine import Engine
    from trimtab.models.fingerprint import fingerprint_of
    from trimtab.models.gguf import load_gguf_tokenizer
    from trimtab.models.loading import load_tokenizer
    from trimtab.serve.registry import Registry
    from trimtab.serve.rewriting import RewriteDesk
    from trimtab.serve.service import Opened
    from trimtab.users.features import check_rule

    by_llamacpp = runs_by_llamacpp(options.proposal, options.backend)
    tokenizer = load_gguf_tokenizer(options.proposal) if by_llamacpp else load_tokenizer(options.proposal)
    if (template := read_chat_template(options.chat_template_path)) is not None:
        tokenizer.chat_template = template
    refuse_idle_date(options.date, tokenizer)
    if options.cuda_graphs:
        check_graphs(options.device)
    loader = Loader(
        tokenizer,
        dtype=options.aligner_dtype or options.dtype,
        device=options.device,
        cuda_graphs=options.cuda_graphs,
        quantize=options.quantize,
        backend=options.backend,
    )
    for _, path, _ in named:
        loader.find(path)  # what is not there is said before the proposal is loaded
    rewriting = None if options.rewriter is None else Rewriting(load_rewriter(options, options, options.date), options)
    base = AlignedModel.from_pretrained(
        options.proposal,
        tokenizer=tokenizer,
        **settings_of(options) | {"weight": None},  # weights are those of the aligners that are named
        prefix_cache_tokens=options.prefix_cache_tokens,
        date=options.date,
    )
    memory, root = options.max_aligner_memory, options.aligner_root
    registry = Registry(
        base,
        loader,
        max_bytes=None if memory is None else int(memory * 2**30),
        root=None if root is None else Path(root),
    )
    for name, path, weight in named:
        registry.load(name, path, weight=weight, pinned=True)
    if options.users is not None:
        bank = registry.fetch([name for name, _, _ in named])
        check_rule(bank.shaping(bank.defaults).rule)
        for part in (bank.proposal, *bank.aligners):  # while the files are those that were loaded
            fingerprint_of(part)
    engine = Engine(
        base.proposal,
        base.pace,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_cache_tokens=options.max_cache_tokens,
        max_cache_bytes=None if options.max_cache_tokens else _cache_bytes(base.proposal.device, registry),
        prefixes=base.prefixes,
        log_z_every=LOG_Z_EVERY,
    )
    return Opened(registry, engine, RewriteDesk(rewriting))


def _cache_bytes(device: Any, registry: "Registry") -> int | None:
    """Half of the memory that is free once all is loaded, aligners that may still come included."""
    from trimtab.hardware import free_memory

    free = free_memory(device)
    return None if free is None else max(1, (free - registry.room) // 2)


def _add_playground(app: Any, service: Any, options: Options) -> None:
    from trimtab.serve.playground.page import add_playground

    add_playground(app, service, votes=Path(options.votes or "votes.jsonl"))
