"""Where a server's answers are rewritten: whole, in a thread of its own, one request's after another."""

import asyncio
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trimtab.data.prompts import Prompt
from trimtab.decode.request import Completion, SamplingParams
from trimtab.rewriting.options import Rewriting
from trimtab.serve.refusal import Refusal

__all__ = ["RewriteDesk"]


class RewriteDesk:
    """A server's rewriter.

    Args:
        rewriting: who rewrites, and how that was asked for; None if nobody does.
    """

    def __init__(self, rewriting: Rewriting | None) -> None:
        self._rewriting = rewriting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trimtab-rewrite")
        """One, so that a request whose client has gone keeps the next one waiting, and the two never share a model."""

    def check(self) -> None:
        """Refuse to rewrite where nobody does.

        Raises:
            Refusal: it is so.
        """
        if self._rewriting is None:
            raise Refusal(404, "rewrite: this server has no rewriter; start it with --rewriter MODEL", param="rewrite")

    async def rewrite(
        self, prompts: Sequence[Prompt], done: Mapping[int, Completion], params: SamplingParams
    ) -> tuple[dict[int, Completion], dict[int, dict[str, Any]]]:
        """The completions of a request with their texts rewritten, and by choice what they were before.

        Args:
            prompts: of the request, each with `params.n` choices.
            done: by choice, all that there are; one that died stays as it is.
            params: of the request: its limit and its knobs of drawing are the rewriter's, too.

        Raises:
            Refusal: nobody rewrites here.
            InvalidRequest: an answer cannot be put to the rewriter.
        """
        self.check()
        assert self._rewriting is not None
        places = sorted(done)
        work = functools.partial(self._rewriting.rewrite, prompts, [done[choice] for choice in places], params)
        found = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        choices, before = dict(done), {}
        for place, new in found.items():
            choice = places[place]
            choices[choice] = dataclasses.replace(done[choice], text=new.text, finish_reason=new.finish_reason, error=new.error)
            before[choice] = {"rewritten_from": list(new.before)}
        return choices, before
