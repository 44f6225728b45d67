"""The flags that name a rewriter, and how it is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab.data.options import TemplateOptions
from trimtab.data.rewrite_template import PRESETS, RewriteTemplate, read_template
from trimtab.decode.options import RowOptions, load_aligned_model
from trimtab.errors import InvalidOption
from trimtab.files import expand_home
from trimtab.options import option

if TYPE_CHECKING:
    from trimtab.decode.request import Completion, SamplingParams
    from trimtab.rewriting.rewriter import Rewriter, Rewritten

__all__ = ["RewriterOptions", "Rewriting", "load_rewriter", "rewriting_params"]


class Rewriting(NamedTuple):
    """Who rewrites, and what was asked of them."""

    rewriter: "Rewriter"
    options: "RewriterOptions"

    def rewrite(
        self, prompts: Sequence[Any], completions: Sequence["Completion"], params: "SamplingParams"
    ) -> dict[int, "Rewritten"]:
        """What becomes of completions, by their places; those that died stay as they are.

        Args:
            prompts: texts or chats, each with `params.n` consecutive completions.
            completions: of what was asked.
            params: of that request: its limit and its knobs of drawing are the rewriter's, too.
        """
        from trimtab.core.noise import seed_after

        alive = [place for place, one in enumerate(completions) if one.error is None]
        seeds = [seed_after(completions[place].seed, completions[place].index) for place in alive]
        how = [rewriting_params(self.options, params, seed) for seed in seeds]
        asked = [prompts[place // params.n] for place in alive]
        found = self.rewriter.rewrite(asked, [completions[place].text for place in alive], how)
        return dict(zip(alive, found, strict=True))


DEFAULT = "chat"
"""How a rewriter is asked that does not say how it was trained."""


@dataclass(frozen=True)
class RewriterOptions:
    """Who rewrites what was written."""

    rewriter: str | None = option(
        None,
        "a model that rewrites every answer, from the prompt and the answer: a folder or a hub id, or an aligner of --proposal",
        metavar="MODEL",
    )
    rewriter_template: str | None = option(
        None,
        f"how it is asked: {', '.join(PRESETS)}, or a file with {{prompt}} and {{answer}}, chat:FILE as a user's message"
        f" [default: as it was trained, otherwise {DEFAULT}]",
        metavar="T",
    )
    rewrite_rounds: int | None = option(
        None, "times that an answer is rewritten at most; where nothing changes, it ends [default: 1]", low=1, high=100
    )
    rewriter_temperature: float | None = option(
        None, "temperature that it is rewritten at; the other knobs of drawing are the request's own [default: 0]", low=0
    )

    def __post_init__(self) -> None:
        """Refuse a template that is none, before anything is loaded."""
        getattr(super(), "__post_init__", lambda: None)()
        if self.rewriter_template is not None:
            read_template(self.rewriter_template)

    def idle(self) -> dict[str, str]:
        """What says nothing without one."""
        names = ("rewriter_template", "rewrite_rounds", "rewriter_temperature")
        return {} if self.rewriter is not None else dict.fromkeys(names, "needs a --rewriter")


def rewriting_params(options: RewriterOptions, params: "SamplingParams", seed: int) -> "SamplingParams":
    """How the rewriter draws in the place of a request's parameters."""
    from trimtab.decode.request import SamplingParams

    temperature = 0.0 if options.rewriter_temperature is None else options.rewriter_temperature
    names = ("max_tokens", "top_p", "top_k", "min_p", "stop")
    return SamplingParams(**{name: getattr(params, name) for name in names}, temperature=temperature, seed=seed)


def load_rewriter(options: RewriterOptions, rows: RowOptions, date: str | None = None) -> "Rewriter":
    """The rewriter that is named.

    Args:
        options: its flags.
        rows: the flags that say which proposal there is, and how models are loaded.
        date: what chat templates take for today.

    Raises:
        InvalidOption: the template is none, or the rewriter takes a chat and has no chat template.
        ModelError: it cannot be loaded.
    """
    from trimtab.models.aligner import manifest_of
    from trimtab.rewriting.rewriter import Rewriter

    assert options.rewriter is not None  # or nobody asks
    manifest = manifest_of(expand_home(options.rewriter))
    known = None if manifest is None else manifest.rewriter_template
    if options.rewriter_template is not None or known is None:
        template = read_template(options.rewriter_template or DEFAULT)
    else:
        template = RewriteTemplate.parse(known)
    if manifest is not None and not rows.proposal:
        raise InvalidOption(f"--proposal is required: the rewriter '{options.rewriter}' is an aligner of one")
    names = ("dtype", "device", "cuda_graphs", "quantize", "backend", "max_num_seqs")
    how: dict[str, Any] = {name: getattr(rows, name) for name in names}
    pair = (options.rewriter, ()) if manifest is None else (rows.proposal, (options.rewriter,))
    model = load_aligned_model(RowOptions(*pair, **how), TemplateOptions(None, date))
    if template.chat and not model.tokenizer.chat_template:
        raise InvalidOption(
            f"rewriter '{options.rewriter}' is asked by a chat, and has no chat template: give another --rewriter_template"
        )
    return Rewriter(model, template, rounds=options.rewrite_rounds or 1)
