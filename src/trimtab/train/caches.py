"""The cached rows of a run: which there are, where they are, and what is logged of them."""

import logging
from pathlib import Path
from typing import Any

from trimtab.data.examples import Example, answers
from trimtab.models.vocabulary import fingerprint_vocabulary
from trimtab.train.cache import ProposalCache
from trimtab.train.plan import Plan
from trimtab.train.ranks import Ranks
from trimtab.train.rows import ModelRows, RowSource
from trimtab.train.taught_rows import TaughtCache, TeacherRows

__all__ = ["open_caches"]

logger = logging.getLogger(__name__)


def open_caches(
    plan: Plan, rows: RowSource, tokenizer: Any, examples: list[Example], development: list[Example], ranks: Ranks
) -> dict[str, dict[str, ProposalCache]]:
    """The cached rows of both parts, by the kind of answer that they are on."""
    folder = Path(plan.asked.proposal_cache or Path(plan.asked.output_dir) / "proposal_cache")
    parts = {"train": examples, "dev": development}
    caches: dict[str, dict[str, ProposalCache]] = {part: {} for part in parts}
    for part, which in plan.cached_answers:
        name = part if which == "chosen" else f"{part}_{which}"
        source, kind, some, layout = rows, ProposalCache, parts[part], plan.row_layout
        if which == "teacher":
            assert isinstance(rows, ModelRows)  # as `refuse_contradictions` has it
            source, kind, layout = TeacherRows(rows), TaughtCache, plan.taught_layout
        cache = caches[part][which] = kind.build(
            folder / name,
            source,
            fingerprint_vocabulary(tokenizer),
            some if which == "teacher" else answers(some, which),
            layout=layout(rows.vocab_size),
            temperature=plan.temperatures.proposal,
            ranks=ranks,
        )
        facts = cache.facts
        error = "an error that is not known"
        mean, rms = (facts[name] for name in kind.losses[2:])
        if mean is not None:
            error = f"an error of {mean:.2g} nats a token (root mean square {rms:.2g}) in {kind.of}"
        logger.info("%s cache: %d tokens, %.0f bytes a token; %s", name, facts["tokens"], facts["bytes_per_token"], error)
    return caches
