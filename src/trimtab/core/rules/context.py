"""What a rule may know of the text before a row: some tokens, what the proposal gave them, and a state of the rule's own.

`first_context` makes the context of the row after a prompt, and `follow` that of the next row, once a token was decided.
`unroll` makes those of a run of rows whose tokens are known or drafted, and `follow_run` that of the row behind so many of
them. All are pure, work on a batch `[b]` of texts, and never wait for the device.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trimtab.core.draw import NO_TOKEN
from trimtab.core.transfer import to_device
from trimtab.errors import InvalidOption

__all__ = ["Context", "LooksBack", "first_context", "follow", "follow_run", "unroll"]


class Context(NamedTuple):
    """What stands before rows; the leading dimensions are those of the rows. All numbers are float64, all ids int64."""

    tokens: Tensor
    """`[..., w]` the last w tokens before each row, the latest last; `NO_TOKEN` where the text is shorter."""
    logp: Tensor
    """`[..., w]` log p̃ of each of them, in nats: NaN where the token is the prompt's or there is none, and throughout if the
    rule does not ask for it (`reads_logp`)."""
    position: Tensor
    """`[...]` tokens before the row, the prompt's included: the index in the text of the token that the row is for."""
    prompt_length: Tensor
    """`[...]` tokens of the prompt. The row of an answer's first token has this position."""
    state: Tensor
    """`[..., s]` the rule's own."""


class LooksBack(Protocol):
    """Of a rule, what says what it looks at; see `trimtab.core.rules.base.Rule`."""

    @property
    def window(self) -> int:
        """Tokens."""

    @property
    def reads_logp(self) -> bool:
        """Whether it wants their log p̃."""

    @property
    def state_size(self) -> int:
        """Numbers."""

    def initial_state(self) -> Sequence[float]:
        """Before the first token."""

    def advance(self, context: Context, tokens: Tensor, logp: Tensor) -> Tensor:
        """The state after a token."""


def first_context(rule: LooksBack, prompts: Sequence[Sequence[int]], device: torch.device) -> Context:
    """The contexts `[b]` of the rows after b prompts."""
    w, lengths = rule.window, to_device([len(prompt) for prompt in prompts], device, torch.long)
    seen = [list(prompt[-w:]) if w else [] for prompt in prompts]
    tokens = to_device([[NO_TOKEN] * (w - len(ids)) + ids for ids in seen], device, torch.long)
    state = to_device([list(rule.initial_state())] * len(prompts), device, torch.float64)
    return Context(tokens, torch.full_like(tokens, math.nan, dtype=torch.float64), lengths, lengths, state)


def follow(rule: LooksBack, context: Context, tokens: Tensor, logp: Tensor) -> Context:
    """The contexts of the next rows.

    Args:
        rule: whose contexts they are.
        context: those of rows `[...]`.
        tokens: `[...]` what was decided there.
        logp: `[...]` log p̃ of it; NaN if the rule does not ask for it.
    """
    state = _advanced(rule, context, tokens, logp) if rule.state_size else context.state
    return Context(
        torch.cat([context.tokens, tokens.unsqueeze(-1)], -1)[..., 1:],
        torch.cat([context.logp, logp.unsqueeze(-1)], -1)[..., 1:],
        context.position + 1,
        context.prompt_length,
        state,
    )


def _advanced(rule: LooksBack, context: Context, tokens: Tensor, logp: Tensor) -> Tensor:
    """The state after tokens, of the shape that it had before them.

    Raises:
        InvalidOption: the rule gives another shape, which would be read as other texts'.
    """
    state = rule.advance(context, tokens, logp)
    if state.shape != context.state.shape:
        shapes = f"{list(state.shape)}, and must give one of {list(context.state.shape)}"
        raise InvalidOption(f"rule '{rule}': advance gives a state of shape {shapes}")
    return state.to(context.state.dtype)


def unroll(rule: LooksBack, first: Context, tokens: Tensor, logp: Tensor) -> Context:
    """The contexts `[b, P]` of rows in a run.

    Args:
        rule: whose contexts they are.
        first: `[b]` those of the first rows.
        tokens: `[b, P − 1]` what follows each row but the last, as far as it is known.
        logp: `[b, P − 1]` log p̃ of it; NaN if the rule does not ask for it.
    """
    w, (b, rows) = rule.window, (tokens.shape[0], tokens.shape[1] + 1)
    seen, weighed = torch.cat([first.tokens, tokens], 1), torch.cat([first.logp, logp], 1)
    windows = [part.unfold(1, w, 1) if w else part.new_empty(b, rows, 0) for part in (seen, weighed)]
    position = first.position[:, None] + torch.arange(rows, device=tokens.device)
    length = first.prompt_length[:, None].expand(b, rows)
    states = [first.state]
    if rule.state_size:
        for j in range(rows - 1):
            at = Context(windows[0][:, j], windows[1][:, j], position[:, j], first.prompt_length, states[-1])
            states.append(_advanced(rule, at, tokens[:, j], logp[:, j]))
        state = torch.stack(states, 1)
    else:
        state = first.state[:, None].expand(b, rows, 0)
    return Context(windows[0], windows[1], position, length, state)


def follow_run(rule: LooksBack, first: Context, run: Context, tokens: Tensor, logp: Tensor, counts: Tensor) -> Context:
    """The contexts `[b]` of the rows behind the first `counts[b]` tokens of a run: `first` where that is 0.

    Args:
        rule: whose contexts they are.
        first: `[b]` those of the first rows.
        run: `[b, P]` those of all rows, see `unroll`; right for as many rows as the tokens that they were made of stayed.
        tokens: `[b, P]` what was decided at each row.
        logp: `[b, P]` log p̃ of it.
        counts: `[b]` from 0 to P.
    """
    last = (counts - 1).clamp(min=0)
    rows = torch.arange(len(last), device=last.device)
    after = follow(rule, Context(*(part[rows, last] for part in run)), tokens[rows, last], logp[rows, last])
    some = counts > 0
    pairs = zip(after, first, strict=True)
    return Context(*(torch.where(some.view(-1, *[1] * (new.ndim - 1)), new, old) for new, old in pairs))
