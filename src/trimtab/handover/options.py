"""Who leads and who goes on, as options of commands; and what they become."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trimtab.endpoints.options import AskingOptions
from trimtab.options import option

__all__ = ["HandoverOptions", "Opened", "open_handover"]

REMOTE = ("endpoint", "endpoint_model", *(one.name for one in dataclasses.fields(AskingOptions)))
"""Options of a proposal behind endpoints: where it runs, which decides no text, apart from its name."""


@dataclass(frozen=True)
class HandoverOptions(AskingOptions):
    """A leader that the proposal takes over from, as texts."""

    leader: str | None = option(
        None,
        "a small model, an aligner or an adapter, with any tokenizer and a chat template of its own, which begins each answer;"
        " the proposal takes over"
        " where --handover says, 'confidence' unless it is said [default: nobody leads but the --aligner, which has the"
        " proposal's tokens]",
        metavar="MODEL",
    )
    endpoint: tuple[str, ...] = option(
        (),
        "with --leader, an OpenAI-compatible server that has the proposal, and echoes the log-probabilities of prompts, such as"
        " http://localhost:8000/v1: then of --proposal only the tokenizer is loaded; may repeat",
        metavar="URL",
    )
    endpoint_model: str | None = option(None, "the proposal's name there [default: the first that is served]", metavar="NAME")

    @property
    def has_leader(self) -> bool:
        """Whether it is named."""
        return self.leader is not None

    def idle(self) -> dict[str, str]:
        """What says how to ask where nobody is asked, and what is of a proposal that runs here."""
        if self.leader is None:
            return dict.fromkeys(REMOTE, "needs a --leader")
        if not self.endpoint:
            return dict.fromkeys(REMOTE, "needs --endpoint")
        here = ("draft", "draft_temperature", "num_speculative_tokens")
        shaping = ("proposal_temperature", "proposal_top_k", "proposal_top_p")
        return dict.fromkeys(("aligner", *here, *shaping), "is for a proposal that runs here, not for --endpoint")


@dataclass(frozen=True)
class Opened:
    """A hand-over that is ready, and what tells it from others."""

    handover: Any
    """The `TextHandover`."""
    facts: dict[str, Any]
    """What decides its texts, beside the options: for files that are resumed."""
    kernels: dict[str, Any]
    """What computes the passes of the models that run here."""
    tokenizers: list[Any]


@contextlib.contextmanager
def open_handover(options: Any, kept_date: Any = None) -> Iterator[Opened]:
    """The models that the flags name; `kept_date` is that of the run that is resumed, if one is.

    Raises:
        ModelError: a model cannot be loaded.
        EndpointError: no endpoint answers.
    """
    from trimtab.data.template import pick_date, read_chat_template
    from trimtab.decode.options import facts_of, kernels_of, load_aligned_model
    from trimtab.endpoints.client import Endpoints
    from trimtab.handover.leader import load_leader
    from trimtab.handover.sides import RemoteProposal
    from trimtab.handover.writing import TextHandover, read_handover
    from trimtab.models.fingerprint import fingerprint_of
    from trimtab.models.huggingface import describe_kernels
    from trimtab.models.loading import load_tokenizer_alone, quiet_loading

    rule = read_handover(options.handover or "confidence")
    limits = options.limits_of("endpoint", options.endpoint)
    date = pick_date(options.date, kept_date)
    quiet_loading()
    names = ("dtype", "device", "cuda_graphs", "quantize", "backend", "max_num_seqs")
    leader = load_leader(options.leader, date=date, **{name: getattr(options, name) for name in names})
    own = {
        "handover": str(rule),
        "leader_weights": fingerprint_of(leader.proposal),
        "leader_chat": leader.encoder.chat_settings,
    }
    kernels = {"leader": describe_kernels(leader.proposal)}
    if not options.endpoint:
        model = load_aligned_model(dataclasses.replace(options, handover=None), options, kept_date)
        facts = _with_date({**facts_of(options, model), **own})
        yield Opened(TextHandover(leader, model, rule), facts, kernels | kernels_of(model), [leader.tokenizer, model.tokenizer])
        return
    tokenizer = load_tokenizer_alone(options.proposal)
    if (template := read_chat_template(options.chat_template_path)) is not None:
        tokenizer.chat_template = template
    with Endpoints(options.endpoint, limits) as endpoints:
        remote = RemoteProposal(endpoints, tokenizer, options.endpoint_model, date)
        facts = _with_date({**remote.encoder.chat_settings, **own, "endpoint_model": remote.name})
        yield Opened(TextHandover(leader, remote, rule), facts, kernels, [leader.tokenizer, tokenizer])


def _with_date(facts: dict[str, Any]) -> dict[str, Any]:
    """The same with the date that any of the two templates writes, where a run that goes on looks for it."""
    return facts | {"date": facts["date"] or facts["leader_chat"]["date"]}
